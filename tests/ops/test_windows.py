"""Windows of a convolution, gathered and scattered, against PyTorch's unfold and fold."""

import pytest
import torch
import torch.nn.functional as F

from dmcp.backends import native_module
from dmcp.ops.windows import CpuKernels, EagerKernels

KERNELS = {"eager": EagerKernels()}
if native_module() is not None:
    KERNELS["native"] = CpuKernels(native_module())

# kernel, stride, padding, dilation
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((5, 3), (1, 2), (2, 0), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((2, 4), (3, 1), (0, 3), (2, 1)),
]


def image(dtype, channels=5, shape=(2, 7, 6)):
    generator = torch.Generator().manual_seed(0)
    batch, height, width = shape
    x = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def unfolded(x, kernel, stride, padding, dilation):
    """[N, kh kw C, L] in float64."""
    columns = F.unfold(x.double(), kernel, dilation, padding, stride)
    taps = columns.unflatten(1, (x.shape[1], kernel[0] * kernel[1]))
    return taps.transpose(1, 2).flatten(1, 2)


@pytest.fixture(params=KERNELS)
def kernels(request):
    return KERNELS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_windows_hold_the_pixels_under_the_kernel(kernels, geometry, dtype):
    x = image(dtype)
    windows = kernels.gather_windows(x, *geometry)
    assert windows.dtype == dtype
    assert windows.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(windows.flatten(2).double(), unfolded(x, *geometry))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_scattering_adds_up_what_windows_say_of_a_pixel(kernels, geometry, dtype):
    kernel, stride, padding, dilation = geometry
    x = image(torch.float64)
    shape = kernels.gather_windows(x, *geometry).shape
    windows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    windows = windows.to(dtype).contiguous(memory_format=torch.channels_last)
    found = kernels.scatter_windows(windows, x.shape[2:], *geometry)
    taps = windows.double().flatten(2).unflatten(1, (kernel[0] * kernel[1], x.shape[1]))
    columns = taps.transpose(1, 2).flatten(1, 2)
    expected = F.fold(columns, x.shape[2:], kernel, dilation, padding, stride)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=4 * eps, atol=16 * eps)


def test_images_may_be_a_prefix_of_a_wider_buffer(kernels):
    x = image(torch.float32, channels=9)
    part = x[:, :4]
    geometry = GEOMETRIES[0]
    windows = kernels.gather_windows(part, *geometry)
    assert torch.equal(windows.flatten(2).double(), unfolded(part, *geometry))


@pytest.mark.skipif("native" not in KERNELS, reason="no compiled module")
def test_the_same_bits_for_any_number_of_threads():
    x = image(torch.float32, channels=64, shape=(4, 16, 16))
    geometry, results = GEOMETRIES[1], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            windows = KERNELS["native"].gather_windows(x, *geometry)
            image_ = KERNELS["native"].scatter_windows(windows, x.shape[2:], *geometry)
            results.append((windows, image_))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_opcheck():
    x, geometry = image(torch.float32), GEOMETRIES[1]
    torch.library.opcheck(torch.ops.dmcp.gather_windows.default, (x, *geometry))
    windows = torch.ops.dmcp.gather_windows(x, *geometry)
    torch.library.opcheck(torch.ops.dmcp.scatter_windows.default, (windows, x.shape[2:], *geometry))
