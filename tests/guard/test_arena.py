"""Host memory in which a snapshot's tensors lie: copied, scanned and summed up in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.guard import arena as arena_module
from foreshock.guard.arena import Arena
from foreshock.guard.containers import copy_out
from foreshock.guard.snapshots import _with_forms, checksum

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64,
    torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def tensor_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.arange(1, 1 + math.prod(shape)).remainder(7).reshape(shape)
    return values.to(torch.float32).to(dtype)


MIXED = [tensor_of(dtype, 3, 5) for dtype in DTYPES] + [
    torch.tensor(2.5),
    torch.zeros(0, 4),
    torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.rand(4, 6).t(),
    torch.rand(1, 4).expand(3, 4),
    torch.nn.Parameter(torch.rand(7)),
]


@pytest.fixture(params=[64, 256, 1 << 20])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(arena_module, "_PIECE_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("piece_bytes")
def test_copies_are_equal_share_no_memory_and_have_the_checksum_of_their_bytes() -> None:
    arena = Arena(MIXED)
    for _ in range(2):
        arena.memory.fill_(255)
        filling = arena.fill(MIXED)
        assert filling.nonfinite == []
        for copied, tensor in zip(arena.views, MIXED, strict=True):
            assert copied.shape == tensor.shape
            assert not copied.requires_grad
            assert torch.equal(copied.to(torch.complex128), tensor.to(torch.complex128))
        saved = {"x": arena.views}
        assert _with_forms(filling.digest, saved) == checksum(saved) == checksum(copy_out(saved))
    assert sum(t.nbytes for t in MIXED) == arena.memory.nbytes


@pytest.mark.usefixtures("piece_bytes")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 99])
def test_what_is_not_finite_is_found_in_the_copy_whatever_piece_it_is_in(
    bad: float, at: int
) -> None:
    tensors = [torch.ones(100), torch.ones(100, dtype=torch.float16), torch.ones(10, 10).t()]
    arena = Arena(tensors)
    for i, tensor in enumerate(tensors):
        tensor[(at,) if tensor.dim() == 1 else (at // 10, at % 10)] = bad
        assert arena.fill(tensors).nonfinite == [i]
        tensor.fill_(1.0)
        assert arena.look_over().nonfinite == [i]
    assert arena.fill(tensors).nonfinite == []


def test_a_copy_that_went_wrong_has_another_checksum() -> None:
    """The checksum is of what was copied, not of what was there to be."""
    x = torch.rand(1000)
    arena = Arena([x])
    good = arena.fill([x]).digest.hexdigest()
    arena.memory[77] ^= 4
    assert arena.look_over().digest.hexdigest() != good


def test_memory_fits_only_what_lies_in_it_just_so() -> None:
    x, y = torch.rand(4, 6), torch.rand(3)
    arena = Arena([x, y])
    assert arena.fits([torch.zeros(4, 6), torch.zeros(3)])
    for other in ([x], [y, x], [x, y, y], [x.t(), y], [x.double(), y], [torch.rand(6, 4).t(), y]):
        assert not arena.fits(other)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6
    ),
    st.sampled_from([16, 100, 1 << 20]),
)
def test_any_tensors_come_out_as_they_went_in(
    forms: list[tuple[torch.dtype, list[int]]], piece_bytes: int
) -> None:
    tensors = [tensor_of(dtype, *shape) for dtype, shape in forms]
    before, arena_module._PIECE_BYTES = arena_module._PIECE_BYTES, piece_bytes
    try:
        arena = Arena(tensors)
        filling = arena.fill(tensors)
    finally:
        arena_module._PIECE_BYTES = before
    assert checksum({"x": arena.views}) == checksum({"x": tensors})
    assert _with_forms(filling.digest, {"x": arena.views}) == checksum({"x": tensors})
