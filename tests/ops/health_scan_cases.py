"""Tensors for health_scan that are hard to read, and the comparison with the reference.

Every builder makes the same values each time, on whatever device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foreshock.ops._tensors import FLOATING_DTYPES
from foreshock.ops.health_scan import device_table, reference

CPU = torch.device("cpu")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING_DTYPES}

# The same float64 terms in another order, over the sum of their magnitudes: measured 4e-15.
SUM_TOLERANCE = 1e-12

Bind = Callable[[list[Tensor | None], Tensor], Callable[[], object]]
Build = Callable[[torch.dtype, torch.device], list[Tensor | None]]


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.to(dtype).to(device)


def odd_sizes(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """Around a vector, a tile and a chunk, from every alignment."""
    vector = 16 // dtype.itemsize
    chunk = device_table.CHUNK_BYTES // dtype.itemsize
    sizes = [1, vector - 1, vector, vector + 1, 255, 256 * vector + 1, 1024 * vector, chunk + 3]
    return [
        random_tensor(size + start, dtype=dtype, device=device)[start:]
        for size in sizes
        for start in {0, 1, vector - 1}
    ]


def absent(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    x = random_tensor(40, 5, dtype=dtype, device=device)
    return [None, x[:0], x, None, x[:, 3:3], x[0, 0], x.new_empty(0, 7), x[1:2, 1:2]]


def views(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    x = random_tensor(12, 10, 41, dtype=dtype, device=device)
    six_dims = random_tensor(*[3] * 6, dtype=dtype, device=device)
    return [
        x.permute(2, 0, 1),
        x[:, ::2],
        x.transpose(0, 2)[1:, :, 3:],
        x[3:7, :, ::5].permute(1, 2, 0),
        x[:, :, 7],
        x.as_strided((50, 40, 9), (7, 3, 1)),
        x[:1].expand(9, 10, 41),
        x[0, 0, :1].expand(1000, 3),
        six_dims[:, :2, :, :2],
        six_dims[::2, ::2, ::2, ::2, ::2, ::2],
    ]


def nonfinite(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """NaN and both infinities, alone in a chunk and many in one, dense and strided."""
    x = random_tensor(3 * 5003, dtype=dtype, device=device)
    wide = random_tensor(device_table.CHUNK_BYTES // dtype.itemsize + 9, dtype=dtype, device=device)
    place = torch.Generator().manual_seed(0)
    for value in (float("nan"), float("inf"), -float("inf")):
        where = torch.randint(len(x), (7,), generator=place)
        x[where.to(device)] = torch.tensor(value).to(dtype).to(device)
        wide[int(torch.randint(len(wide), (), generator=place))] = value
    strided = x.view(5003, 3)[:, ::2]
    return [x, x[1:], strided, wide, wide[-1:], x.new_full((33,), float("nan"))]


def extremes(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """The largest and the smallest of each sign, denormals and the zeros."""
    info = torch.finfo(dtype)
    # Not the largest float64, whose sums overflow in one order and not in another.
    most = 1e300 if dtype is torch.float64 else info.max
    smallest = info.smallest_normal * info.eps
    kinds = [most, -most, info.smallest_normal, smallest, -3 * smallest, 0.0, -0.0]
    edges = torch.tensor(kinds, dtype=torch.float64).to(dtype).to(device)
    return [*edges.split(1), edges, edges.repeat(400)[1:], edges[3:].repeat(5000)]


def every_bit_pattern(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """All elements that there are of a narrow dtype; random bits of a wide one."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    low, high = torch.iinfo(ints).min, torch.iinfo(ints).max
    if dtype.itemsize <= 2:
        bits = torch.arange(low, high + 1).to(ints)
    else:
        bits = torch.randint(low, high, (3001,), generator=torch.Generator().manual_seed(0))
        # The sums of random float64 are the largest of them: nothing to compare.
        bits = bits.to(ints) if dtype.itemsize == 4 else bits & ~(0x3FF << 53)
    x = bits.view(dtype).to(device)
    return [x, x[::3]]


BUILDERS = (odd_sizes, absent, views, nonfinite, extremes, every_bit_pattern)
CASES: dict[str, tuple[Build, torch.dtype]] = {
    f"{build.__name__}-{name}": (build, dtype)
    for build in BUILDERS
    for name, dtype in DTYPES.items()
}


def mixed(device: torch.device) -> list[Tensor | None]:
    """Tensors of every builder and dtype in one list, dtypes taking turns."""
    lists = [build(dtype, device)[::3] for build in BUILDERS[1:4] for dtype in DTYPES.values()]
    return [tensor for turn in zip(*lists, strict=False) for tensor in turn]


def case(name: str, device: torch.device) -> list[Tensor | None]:
    if name == "mixed":
        return mixed(device)
    build, dtype = CASES[name]
    return build(dtype, device)


def scan(bind: Bind, tensors: list[Tensor | None], device: torch.device = CPU) -> Tensor:
    packed = torch.full((len(tensors), 6), torch.nan, dtype=torch.float64, device=device)
    bind(tensors, packed)()
    return packed


def assert_agrees(packed: Tensor, tensors: list[Tensor | None]) -> None:
    """Counts and absmax are the reference's; so are the sums, but for the order of their terms."""
    expected = scan(reference.bind, tensors)
    found = packed.cpu()
    counts, right = found.view(torch.int64)[:, :3], expected.view(torch.int64)[:, :3]
    assert torch.equal(counts, right), f"{counts} for {right}"
    assert torch.equal(found[:, 3], expected[:, 3]), f"{found[:, 3]} for {expected[:, 3]}"
    for i, tensor in enumerate(tensors):
        if tensor is None:
            continue
        x = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).double()
        terms = x[x.isfinite()].abs().sum()
        torch.testing.assert_close(
            found[i, 4], expected[i, 4], rtol=0, atol=float(SUM_TOLERANCE * terms)
        )
    torch.testing.assert_close(found[:, 5], expected[:, 5], rtol=SUM_TOLERANCE, atol=0)


# The device table.
