"""What is handed on is cut into pieces of one size, whatever it is made of."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from foreshock.guard.neighbor import _cut


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30))
def test_all_bytes_are_there_in_pieces_of_one_size(pages: list[bytes], size: int) -> None:
    room = torch.empty(size, dtype=torch.uint8)
    found = [bytes(piece.numpy()) for piece in _cut(list(map(memoryview, pages)), room)]
    assert b"".join(found) == b"".join(pages)
    assert all(len(piece) == size for piece in found[:-1])
    assert all(found)
