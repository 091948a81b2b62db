"""torch.distributed.checkpoint reads the parts of a snapshot, cut as it likes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.distributed_part import Chunk
from foreshock.guard import SnapshotReader
from foreshock.guard.parts import SnapshotFolder, find_parts
from foreshock.guard.snapshot_file import Content, DamagedFile
from foreshock.guard.snapshot_reader import fill

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def boxes_of(shape: tuple[int, ...], dim: int, ranks: int) -> list[Chunk]:
    """As torch splits a tensor: the last ranks have less, or nothing."""
    step = -(-shape[dim] // ranks)
    found = []
    for rank in range(ranks):
        begin = min(rank * step, shape[dim])
        size = min(step, shape[dim] - begin)
        offsets = tuple(begin if d == dim else 0 for d in range(len(shape)))
        sizes = tuple(size if d == dim else n for d, n in enumerate(shape))
        found.append(Chunk(shape, offsets, sizes))
    return found


def cut(tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    assert chunk.offsets is not None
    return tensor[tuple(slice(b, b + n) for b, n in zip(chunk.offsets, chunk.sizes, strict=True))]


def write(path: Path, step: int, of_ranks: list[tuple[dict[str, Any], dict[str, Chunk]]]) -> None:
    for rank, (saved, chunks) in enumerate(of_ranks):
        content = Content(step, {"saved": saved, "place": None}, chunks=chunks)
        folder = SnapshotFolder(path, rank, len(of_ranks))
        folder.write(step, folder.pages_of(content))


def write_split(path: Path, tensor: torch.Tensor, boxes: list[Chunk], step: int = 7) -> None:
    parts = [({"parameters": {"w": cut(tensor, box)}}, {"parameters.w": box}) for box in boxes]
    write(path, step, parts)


def loaded(path: Path, like: torch.Tensor, step: int | None = None) -> torch.Tensor:
    state = {"parameters": {"w": torch.zeros_like(like)}}
    dcp.load(state, storage_reader=SnapshotReader(path, step), no_dist=True)
    return state["parameters"]["w"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_boxes_are_made_of_any_others(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    dims = st.integers(0, len(shape) - 1)
    tensor = torch.randn(shape).mul(8).to(dtype)
    path = tmp_path_factory.mktemp("split")
    write_split(path, tensor, boxes_of(shape, data.draw(dims), data.draw(st.integers(1, 5))))
    parts = find_parts(path, 7)
    for box in boxes_of(shape, data.draw(dims), data.draw(st.integers(1, 5))):
        made = torch.zeros(box.sizes, dtype=dtype)
        fill(parts, {"parameters.w": (box, made)})
        assert torch.equal(made, cut(tensor, box))


def test_a_snapshot_of_many_ranks_is_loaded_into_a_model_of_one_process(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    named = dict(model.named_parameters())
    split = {name: boxes_of(tuple(p.shape), 0, 4) for name, p in named.items()}
    write(
        tmp_path,
        7,
        [
            (
                {
                    "parameters": {n: cut(p.detach(), split[n][r]) for n, p in named.items()},
                    "buffers": dict(model.named_buffers()),
                    "optimizer": {"state": [{"step": torch.tensor(3.0)}, None]},
                },
                {f"parameters.{n}": split[n][r] for n in named},
            )
            for r in range(4)
        ],
    )
    other = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    torch.nn.init.zeros_(other[0].weight)
    step = torch.zeros(())
    state = {
        "parameters": dict(other.named_parameters()),
        "buffers": dict(other.named_buffers()),
        "optimizer": {"state": [{"step": step}]},
    }
    dcp.load(state, storage_reader=SnapshotReader(tmp_path), no_dist=True)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert step == 3


def test_a_box_that_several_ranks_have_is_read_once(tmp_path: Path) -> None:
    """As where shards are copied over groups of ranks."""
    tensor = torch.randn(5, 2)
    write_split(tmp_path, tensor, boxes_of((5, 2), 0, 2) * 2)
    reader = SnapshotReader(tmp_path)
    stored = reader.read_metadata().state_dict_metadata["parameters.w"]
    assert len(stored.chunks) == 2
    assert torch.equal(loaded(tmp_path, tensor), tensor)


@pytest.mark.parametrize(
    "boxes",
    [
        [Chunk((4,), (0,), (2,))],
        [Chunk((4,), (0,), (3,)), Chunk((4,), (1,), (1,))],
        [Chunk((4,), None, ())] * 2,
    ],
    ids=["hole", "overlap", "sum"],
)
def test_a_tensor_that_its_boxes_do_not_make_up_is_not_there(
    tmp_path: Path, boxes: list[Chunk]
) -> None:
    whole = Chunk((4,), (0,), (4,))
    write(
        tmp_path,
        7,
        [
            (
                {"parameters": {"w": cut(torch.ones(4), b if b.offsets else whole)}},
                {"parameters.w": b},
            )
            for b in boxes
        ],
    )
    assert SnapshotReader(tmp_path).read_metadata().state_dict_metadata == {}
    with pytest.raises(ValueError, match=r"parameters\.w cannot be put together.*accepted"):
        fill(find_parts(tmp_path, 7), {"parameters.w": (whole, torch.zeros(4))})


def test_a_part_that_was_changed_is_named_before_anything_is_given(tmp_path: Path) -> None:
    tensor = torch.randn(4)
    write_split(tmp_path, tensor, boxes_of((4,), 0, 2))
    file = tmp_path / "rank_00001" / "step_000000007.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    target = torch.zeros(4)
    with pytest.raises(BaseException, match=r"rank_00001.*its checksum does not fit") as raised:
        dcp.load(
            {"parameters": {"w": target}}, storage_reader=SnapshotReader(tmp_path), no_dist=True
        )
    assert isinstance(raised.value, dcp.api.CheckpointException)  # torch's own way to tell
    assert not target.any()


def test_the_newest_of_which_all_parts_are_there_is_read_or_the_one_asked_for(
    tmp_path: Path,
) -> None:
    tensors = {step: torch.full((4,), float(step)) for step in (1, 2, 3)}
    for step, tensor in tensors.items():
        write_split(tmp_path, tensor, boxes_of((4,), 0, 2), step)
    (tmp_path / "rank_00000" / "step_000000003.safetensors").unlink()
    assert torch.equal(loaded(tmp_path, tensors[1]), tensors[2])
    assert torch.equal(loaded(tmp_path, tensors[1], step=1), tensors[1])
    with pytest.raises(DamagedFile, match="it is missing"):
        SnapshotReader(tmp_path, 3).read_metadata()
    with pytest.raises(FileNotFoundError, match="no snapshots in"):
        SnapshotReader(tmp_path / "elsewhere").read_metadata()


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle is loaded")

    tensor = torch.randn(3, 2)
    write_split(tmp_path, tensor, boxes_of((3, 2), 1, 2))
    (tmp_path / ".metadata").write_bytes(b"not even a pickle")
    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    assert torch.equal(loaded(tmp_path, tensor), tensor)
