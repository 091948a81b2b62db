"""A snapshot in one file: all of it comes back, and nothing but what was written."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.guard import incoming_file
from foreshock.guard.snapshot_file import Content, DamagedFile, NotStorable, read, write
from tests.guard.test_arena import MIXED


def returned(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "step_000000007.safetensors"
    size = write(path, Content(7, tree))
    assert path.stat().st_size == size
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    content = read(path)
    assert content.step == 7
    return content.tree


def is_same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b and repr(a) == repr(b))


TREES: dict[str, Any] = {
    "numbers": [1, -(2**70), 0.1, -0.0, 1e-320, math.inf, -math.inf, math.nan, True, None],
    "texts": ["", "a.b", "\ud7ff \u2028 \U0001f40d", "__metadata__"],
    "keys": {1: "a", "1": "b", None: "c", (1, (2, "x")): "d", 1.5: "e", False: "f"},
    "kinds": [(1, [2, (3,)]), {4, 5}, frozenset({6}), b"\x00\xff", torch.Size([2, 3])],
    "mappings": [Counter({5: 1, 9: 2}), OrderedDict(b=1, a=2), {}],
    "arrays": [np.arange(6).reshape(2, 3), np.zeros((0, 2)), np.float32(2.5), np.array(1 + 2j)],
    "empty": [[], (), {}, torch.zeros(0)],
    "tensors": {str(i): t.detach() for i, t in enumerate(MIXED)},
    "paths": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "__metadata__": torch.ones(2)},
    "bits": torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
}


@pytest.mark.parametrize("name", TREES)
def test_all_that_a_state_may_hold_comes_back(tmp_path: Path, name: str) -> None:
    assert is_same(returned({"x": TREES[name]}, tmp_path), {"x": TREES[name]})


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_tensors_come_back(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    (found,) = returned({"x": sparse}, tmp_path).values()
    assert found.is_sparse
    assert torch.equal(found.to_dense(), torch.eye(3))


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=9)
)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        LEAVES,
        lambda x: st.one_of(
            st.lists(x, max_size=3), st.tuples(x, x), st.dictionaries(st.text(), x, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_nested_value_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    try:
        json.dumps(value, default=str).encode()
        str(value).encode()
    except UnicodeEncodeError:
        return
    assert is_same(returned({"x": value}, tmp_path_factory.mktemp("x")), {"x": value})


def test_other_programs_can_read_the_tensors(tmp_path: Path) -> None:
    weight = torch.rand(3, 4)
    write(tmp_path / "f", Content(3, {"saved": {"parameters": {"head.weight": weight}}}))
    with safetensors.safe_open(tmp_path / "f", "np") as file:
        found = file.get_tensor("saved.parameters.head.weight")
    assert np.array_equal(found, weight.numpy())


class Odd:
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [(Odd(), "x.0.lock"), (np.array([Odd()]), "x.0.lock"), (1j, "x.0.lock")],
)
def test_what_cannot_be_stored_is_named_and_leaves_no_file(
    tmp_path: Path, value: Any, where: str
) -> None:
    with pytest.raises(NotStorable, match=rf"{where} is a .*accepted: numbers, texts"):
        write(tmp_path / "f", Content(0, {"x": [{"lock": value}]}))
    assert list(tmp_path.iterdir()) == []


# ---- damage


def small(path: Path) -> bytes:
    tree = {"w": torch.arange(6.0), "n": [1, 2.5, "three"], "m": torch.ones(3, dtype=torch.int8)}
    write(path, Content(5, tree))
    return path.read_bytes()


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "f"
    contents = small(path)
    kept, missed = read(path), []
    for at in range(len(contents)):
        damaged = bytearray(contents)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except DamagedFile:
            continue
        if not is_same(found.tree, kept.tree) or found.step != kept.step:
            missed.append(at)
    assert missed == []


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    contents = small(path)
    for size in range(0, len(contents), 7):
        path.write_bytes(contents[:size])
        with pytest.raises(DamagedFile):
            read(path)
    path.write_bytes(contents + b"x")
    with pytest.raises(DamagedFile):
        read(path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, tmp_path / "f")
    (tmp_path / "g").write_bytes(pickle.dumps(Bomb()))
    for name in "fg":
        with pytest.raises(DamagedFile):
            read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    assert b"pickle" not in small(tmp_path / "h")


def test_another_safetensors_file_is_no_snapshot(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "f")
    with pytest.raises(DamagedFile, match="its format is None"):
        read(tmp_path / "f")


def test_a_file_that_is_gone_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "f")


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    path = tmp_path / "f"
    contents = small(path)
    calls = 0

    def full(descriptor: int, page: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise OSError(28, "No space left on device")
        return real(descriptor, page)

    real = os.write
    monkeypatch.setattr(incoming_file.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write(path, Content(9, {"w": torch.ones(5)}))
    assert path.read_bytes() == contents
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(incoming_file.os, "write", lambda fd, page: real(fd, page[:5]))
    assert is_same(returned({"x": torch.arange(99)}, tmp_path), {"x": torch.arange(99)})


def test_the_file_is_synced_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, _real=real, _name=name: (order.append(_name), _real(*a))[1]
        )
    write(tmp_path / "f", Content(0, {"x": torch.ones(1)}))
    assert order == ["fsync", "replace", "fsync"]
