"""The compiled module (csrc/bindings.cpp). Arrays are addresses, sizes are in elements."""

with_cuda: bool

def retain_cpu(
    alpha: int, offsets: int, q: int, chains: int, total: int, itemsize: int
) -> None: ...
def retain_backward_cpu(
    grad_q: int,
    alpha: int,
    q: int,
    offsets: int,
    grad_alpha: int,
    chains: int,
    total: int,
    itemsize: int,
) -> None: ...
def retain_cuda(
    alpha: int, offsets: int, q: int, chains: int, total: int, itemsize: int, stream: int
) -> None: ...
def retain_backward_cuda(
    grad_q: int,
    alpha: int,
    q: int,
    offsets: int,
    grad_alpha: int,
    chains: int,
    total: int,
    itemsize: int,
    stream: int,
) -> None: ...
