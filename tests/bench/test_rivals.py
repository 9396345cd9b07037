from __future__ import annotations

import pytest
import rivals
import torch
from layers import Layer
from rivals import Tensors

CPU = torch.device("cpu")
LAYERS = (
    Layer(23, 5, 7, "relu6"),
    Layer(23, 5, 7, "relu"),
    Layer(23, 5, 7, "relu", "before"),
    Layer(23, 5, 7, "identity"),
    Layer(23, 5, 7, "identity", "after"),
)


@pytest.mark.parametrize("dtype", rivals.TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("rival", ["ours", "eager", "published"])
def test_rivals_compute_the_same(rival, layer, dtype):
    rivals.check(rivals.forward_of(rival, layer), layer, Tensors.of(layer, 3, dtype, CPU))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_rival_that_computes_something_else_is_refused(factor):
    layer = LAYERS[0]
    tensors = Tensors.of(layer, 3, torch.float32, CPU)
    with pytest.raises(AssertionError, match=r"23x5x7-relu6: y is off"):
        rivals.check(lambda *inputs: factor * rivals.eager(*inputs), layer, tensors)


def test_a_rival_with_another_gradient_is_refused():
    layer = LAYERS[0]
    tensors = Tensors.of(layer, 3, torch.float32, CPU)

    def half_gradient(*inputs):
        y = rivals.eager(*inputs)
        return y.detach() + 0.5 * (y - y.detach())

    with pytest.raises(AssertionError, match=r"23x5x7-relu6: x is off"):
        rivals.check(half_gradient, layer, tensors)


def test_copies_of_the_tensors_lie_elsewhere_and_hold_the_same():
    tensors = Tensors.of(LAYERS[2], 3, torch.float32, CPU)
    copy = tensors.mapped(torch.Tensor.clone)
    for name in ("x", "residual", "grad"):
        mine, other = getattr(tensors, name), getattr(copy, name)
        assert torch.equal(mine, other)
        assert mine.data_ptr() != other.data_ptr()
        assert mine.stride() == other.stride()
        assert mine.requires_grad == other.requires_grad
    assert copy.weight is tensors.weight
