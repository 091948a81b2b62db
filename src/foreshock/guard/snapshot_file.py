"""A snapshot in one file: its tensors as safetensors, all else as JSON in the header."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from foreshock.distributed_part import Chunk
from foreshock.guard.arena import in_memory_order
from foreshock.guard.incoming_file import Incoming

_FORMAT = "foreshock snapshot 1"
_DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_ERRORS_OF_CONTENT = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
_SAVED = "saved."
"""What the names of the state's tensors begin with."""
_NUMBERS_WITHOUT_JSON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class NotStorable(TypeError):
    """Something in the state that no JSON and no tensor can stand for."""


class DamagedFile(ValueError):
    """A file that is no snapshot, or no longer the one that was written."""


class Content(NamedTuple):
    """What a file holds."""

    step: int
    tree: dict[str, Any]
    rank: int = 0
    """Whose part of the snapshot it is."""
    ranks: int | None = None
    """Parts of the snapshot; None in files that do not say."""
    chunks: Mapping[str, Chunk] = MappingProxyType({})
    """Of the tensors in `tree["saved"]` that are split over ranks, by path: which box of them the
    part has."""


class Header(NamedTuple):
    """What a file says of itself."""

    step: int
    rank: int
    ranks: int | None
    chunks: Mapping[str, Chunk]
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type and shape of the tensors in `tree["saved"]`, by path."""


class Box(NamedTuple):
    """Elements of a tensor in `tree["saved"]`."""

    path: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def write(path: Path, content: Content) -> int:
    """Writes a file that is there as a whole or not at all, even if the process is killed.

    Args:
        path: replaced if it exists.
        content: see `pages_of`.
    Returns:
        Its size in bytes.
    Raises:
        NotStorable: naming the place, what stands there and what may.
        OSError: the file cannot be written.
    Cost:
        One read of the tensors for the checksum and one for the file; the interpreter is free for
        other threads meanwhile.
    """
    return write_pages(path, pages_of(content))


def pages_of(content: Content) -> list[memoryview]:
    """The bytes of a file, those of the tensors in the memory where they are.

    Args:
        content: numbers, texts, tensors in host memory and NumPy arrays, in dictionaries, lists and
            tuples.
    Raises:
        NotStorable: naming the place, what stands there and what may.
    Cost: one read of the tensors for the checksum.
    """
    encoder = _Encoder()
    tree = encoder.encode(content.tree, "")
    tensors = encoder.tensors
    names = list(tensors)
    order = [names[i] for i in in_memory_order(list(tensors.values()))]
    state = {
        "step": content.step,
        "rank": content.rank,
        "ranks": content.ranks,
        "chunks": dict(content.chunks),
        "order": order,
        "tree": tree,
    }
    text = json.dumps(state, allow_nan=False, separators=(",", ":"))
    pages = [memoryview(_bytes_of(tensors[name])) for name in order]
    header: dict[str, Any] = {
        "__metadata__": {"format": _FORMAT, "checksum": _checksum(text, pages), "state": text}
    }
    begin = 0
    for name, page in zip(order, pages, strict=True):
        dtype, shape = _form(tensors[name])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(page)]}
        begin += len(page)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return [memoryview(len(head).to_bytes(8, "little")), memoryview(head), *pages]


def read(path: Path) -> Content:
    """Reads a file back; nothing in it is ever run.

    Raises:
        DamagedFile: it was cut short, changed, or is something else.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        tensors = {name: file.tensor(name).clone() for name in file.state["order"]}
        file.compare(tensors.values())
        state = file.state
        tree = _decode(state["tree"], tensors)
        return Content(state["step"], tree, *_origin(state))


def read_header(path: Path) -> Header:
    """Reads what a file says of itself; whether that is what was written, `check` says.

    Raises:
        DamagedFile, OSError: as for `read`.
    """
    with _opened(path) as file:
        state = file.state
        saved = dict(state["tree"]["dict"])["saved"]
        names = {name.removeprefix(_SAVED): name for name in _tensor_names(saved)}
        tensors = {path: file.form(name) for path, name in names.items()}
        return Header(state["step"], *_origin(state), tensors)


def check(path: Path) -> None:
    """Reads a file through, and keeps nothing of it.

    Raises:
        DamagedFile, OSError: as for `read`.
    """
    with _opened(path) as file:
        file.compare(file.tensor(name) for name in file.state["order"])


def read_boxes(path: Path, boxes: Iterable[Box]) -> Iterator[torch.Tensor]:
    """Reads parts of tensors, and no more of the file than that; does not check them.

    Raises:
        DamagedFile, OSError: as for `read`.
    """
    with _opened(path) as file:
        for box in boxes:
            yield file.box(_SAVED + box.path, box)


class _Opened(NamedTuple):
    """A file that is a snapshot by what it says."""

    file: Any
    metadata: dict[str, str]
    state: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        """In the memory of the file."""
        found: torch.Tensor = self.file.get_tensor(name)
        return found

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        found = self.file.get_slice(name)
        return _DTYPES_BY_NAME[found.get_dtype()], tuple(found.get_shape())

    def box(self, name: str, box: Box) -> torch.Tensor:
        if not box.sizes:
            return self.tensor(name)
        parts = zip(box.offsets, box.sizes, strict=True)
        found: torch.Tensor = self.file.get_slice(name)[tuple(slice(b, b + n) for b, n in parts)]
        return found

    def compare(self, tensors: Iterable[torch.Tensor]) -> None:
        pages = (memoryview(_bytes_of(tensor)) for tensor in tensors)
        if _checksum(self.metadata["state"], pages) != self.metadata["checksum"]:
            raise DamagedFile("its checksum does not fit")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    import safetensors

    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise DamagedFile(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
            yield _Opened(file, metadata, json.loads(metadata["state"]))
    except DamagedFile:
        raise
    except (safetensors.SafetensorError, *_ERRORS_OF_CONTENT) as error:
        raise DamagedFile(f"it cannot be read as a snapshot ({error})") from error


def _origin(state: Mapping[str, Any]) -> tuple[int, int | None, dict[str, Chunk]]:
    chunks = {
        path: Chunk(tuple(shape), None if offsets is None else tuple(offsets), tuple(sizes))
        for path, (shape, offsets, sizes) in state.get("chunks", {}).items()
    }
    return state.get("rank", 0), state.get("ranks"), chunks


def _tensor_names(tree: Any) -> Iterator[str]:
    """Of the tensors that stand in a tree as such, and not for something else."""
    if isinstance(tree, list):
        for item in tree:
            yield from _tensor_names(item)
    elif isinstance(tree, dict):
        ((kind, given),) = tree.items()
        if kind == "tensor":
            yield given
        elif kind in _CONTAINERS:
            yield from _tensor_names(given)


def _checksum(text: str, pages: Iterable[memoryview]) -> str:
    digest = xxhash.xxh3_128(text.encode())
    for page in pages:
        digest.update(page)
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _form(tensor: torch.Tensor) -> tuple[str, list[int]]:
    return _DTYPES[tensor.dtype], list(tensor.shape)


def write_pages(path: Path, pages: Iterable[memoryview]) -> int:
    """Writes bytes to a file that is there as a whole or not at all.

    Returns:
        Its size in bytes.
    Raises:
        OSError: the file cannot be written.
    """
    file = Incoming(path)
    for page in pages:
        file.take(page)
    return file.finish()


# ---- everything that is no tensor


class _Encoder:
    """Turns nested containers into JSON, and keeps the tensors in them by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def encode(self, value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, torch.Tensor):
            return self._encode_tensor(value, path)
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            name = self._keep(torch.from_numpy(np.array(value).reshape(-1).view(np.uint8)), path)
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return {kind: [name, value.dtype.str, list(value.shape)]}
        if type(value) is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        return self._encode_container(value, path)

    def _encode_container(self, value: Any, path: str) -> Any:
        if type(value) is list:
            return self._encode_all(value, path)
        kinds = (name for name, (kind, _) in _CONTAINERS.items() if type(value) is kind)
        kind = next(kinds, "")
        if isinstance(value, Mapping) and kind:
            return {kind: [self._encode_pair(key, value[key], path) for key in value]}
        if kind:
            return {kind: self._encode_all(value, path)}
        raise NotStorable(
            f"{path.lstrip('.')} is a {type(value).__name__}; accepted: numbers, texts, None, "
            "tensors, NumPy arrays, and dictionaries, lists, tuples and sets of them"
        )

    def _encode_all(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self.encode(item, f"{path}.{i}") for i, item in enumerate(values)]

    def _encode_pair(self, key: Any, item: Any, path: str) -> list[Any]:
        return [self.encode(key, f"{path} key"), self.encode(item, f"{path}.{key}")]

    def _encode_tensor(self, tensor: torch.Tensor, path: str) -> Any:
        if tensor.is_sparse:
            parts = [tensor._indices(), tensor._values()]
            names = [self._encode_tensor(t, f"{path}.{i}") for i, t in enumerate(parts)]
            return {"sparse": [*names, list(tensor.shape), tensor.is_coalesced()]}
        if tensor.dtype in _DTYPES:
            return {"tensor": self._keep(tensor, path)}
        name = self._keep(tensor.contiguous().view(-1).view(torch.uint8), path)
        return {"raw": [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]}

    def _keep(self, tensor: torch.Tensor, path: str) -> str:
        name = path.lstrip(".") or "tensor"
        while name in self.tensors or name == "__metadata__":
            name += "_"
        self.tensors[name] = tensor
        return name


_CONTAINERS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "dict": (dict, dict),
    "Counter": (Counter, lambda pairs: Counter(dict(pairs))),
    "OrderedDict": (OrderedDict, OrderedDict),
    "tuple": (tuple, tuple),
    "Size": (torch.Size, torch.Size),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
}


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, given),) = value.items()
    if kind in _CONTAINERS:
        return _CONTAINERS[kind][1](_decode(given, tensors))
    return _DECODERS[kind](given, tensors)


_Tensors = Mapping[str, torch.Tensor]


def _decode_array(given: Any, tensors: _Tensors) -> np.ndarray[Any, Any]:
    name, dtype, shape = given
    found: np.ndarray[Any, Any] = tensors[name].numpy().view(np.dtype(dtype)).reshape(shape)
    return found


def _decode_raw(given: Any, tensors: _Tensors) -> torch.Tensor:
    name, dtype, shape = given
    found = getattr(torch, dtype)
    if not isinstance(found, torch.dtype):
        raise DamagedFile(f"{dtype!r} is no type of tensor")
    return tensors[name].view(found).view(shape)


def _decode_sparse(given: Any, tensors: _Tensors) -> torch.Tensor:
    indices, values, shape, is_coalesced = given
    made = torch.sparse_coo_tensor(
        _decode(indices, tensors), _decode(values, tensors), shape, check_invariants=True
    )
    return made.coalesce() if is_coalesced else made


_DECODERS: dict[str, Callable[[Any, _Tensors], Any]] = {
    "float": lambda given, _: _NUMBERS_WITHOUT_JSON[given],
    "bytes": lambda given, _: base64.b64decode(given),
    "tensor": lambda given, tensors: tensors[given],
    "array": _decode_array,
    "scalar": lambda given, tensors: _decode_array(given, tensors)[()],
    "raw": _decode_raw,
    "sparse": _decode_sparse,
}
