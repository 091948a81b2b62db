"""A snapshot in parts, one of each rank that took it: where they are, and whether all are there."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from foreshock.guard import snapshot_file
from foreshock.guard.incoming_file import Incoming
from foreshock.guard.snapshot_file import Content, DamagedFile, Header

_FILE = re.compile(r"step_(\d{9,})\.safetensors")
_FOLDER = re.compile(r"rank_(\d{5,})")
_COPIES = "of_rank_*"
_LEFTOVER = ".step_*.safetensors.*.tmp"


def folder_of(path: Path, rank: int) -> Path:
    """Where a rank keeps its parts of the snapshots."""
    return path / f"rank_{rank:05d}"


def copies_of(path: Path, rank: int, ranks: int) -> Path:
    """Where the next rank keeps its copies of what a rank writes."""
    return folder_of(path, (rank + 1) % ranks) / f"of_rank_{rank:05d}"


def file_in(folder: Path, step: int) -> Path:
    """Where the part of a step is."""
    return folder / f"step_{step:09d}.safetensors"


def steps_in(folder: Path) -> list[int]:
    """Steps of the parts in one folder, oldest first."""
    found = (_FILE.fullmatch(name) for name in _names_in(folder))
    return sorted(int(name[1]) for name in found if name is not None)


def folders_in(path: Path) -> dict[int, Path]:
    """The folders of ranks in a directory of snapshots, by rank."""
    found = (_FOLDER.fullmatch(name) for name in _names_in(path))
    return {int(name[1]): path / name[0] for name in sorted(filter(None, found), key=str)}


def all_steps_in(path: Path) -> list[int]:
    """Steps of which a directory of snapshots has a part, whoever wrote it, oldest first."""
    folders = [path, *folders_in(path).values()]
    return sorted({step for folder in folders for step in steps_in(folder)})


def _names_in(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.iterdir()]
    except FileNotFoundError:
        return []


class Parts:
    """All parts of one snapshot.

    Args:
        files: of its ranks, in their order.
        headers: of the files.
    """

    def __init__(self, files: Sequence[Path], headers: Sequence[Header]) -> None:
        self.files = tuple(files)
        self.headers = tuple(headers)

    @property
    def step(self) -> int:
        """The step that was about to be run."""
        return self.headers[0].step

    @property
    def ranks(self) -> int:
        """How many ranks took it."""
        return len(self.files)

    def check(self, ranks: Sequence[int]) -> None:
        """Reads the parts of some ranks through.

        Raises:
            DamagedFile: naming the file.
        """
        for rank in ranks:
            with _naming(self.files[rank]):
                snapshot_file.check(self.files[rank])


def find_parts(path: Path, step: int) -> Parts:
    """All parts of a snapshot, by what they say of how many there are.

    A directory may have parts of the same step that were written by different numbers of ranks. Of
    a part that is not there a copy is taken that another rank has.

    Args:
        path: a directory of snapshots: of one process, or with a folder for each rank.
        step: of the snapshot.
    Raises:
        DamagedFile: naming the file that is missing or cannot be read.
    Cost: a look at the header of each part.
    """
    single = file_in(path, step)
    if single.exists():
        return Parts([single], [_header(single, of_one=True)])
    by_number: dict[int, dict[int, tuple[Path, Header]]] = defaultdict(dict)
    damaged: list[DamagedFile] = []
    for file in _files_of(path, step):
        header = _header_if_readable(file, damaged)
        if header is not None:
            by_number[header.ranks or 0].setdefault(header.rank, (file, header))
    by_number.pop(0, None)  # they do not say, and only as many ranks can take them up
    for number, found in by_number.items():
        if set(range(number)) <= found.keys():
            return Parts(*zip(*(found[rank] for rank in range(number)), strict=True))
    for error in damaged:
        raise error
    for number, found in by_number.items():
        missing = next(rank for rank in range(number) if rank not in found)
        file = file_in(folder_of(path, missing), step)
        raise DamagedFile(f"{file}: it is missing, one of the parts of {number} ranks")
    raise DamagedFile(f"{single.name} in {path}: it does not say of how many ranks it is")


def _header_if_readable(file: Path, damaged: list[DamagedFile]) -> Header | None:
    try:
        return _header(file)
    except DamagedFile as error:
        damaged.append(error)
        return None


def _header(file: Path, *, of_one: bool = False) -> Header:
    with _naming(file):
        header = snapshot_file.read_header(file)
    if of_one and header.ranks not in (None, 1):
        raise DamagedFile(f"{file}: it is but one of the parts of {header.ranks} ranks")
    return header


def _files_of(path: Path, step: int) -> Iterator[Path]:
    """The parts of a snapshot, and after them the copies of parts."""
    folders = list(folders_in(path).values())
    copies = [copy for folder in folders for copy in sorted(folder.glob(_COPIES))]
    yield from (file for f in folders + copies if (file := file_in(f, step)).exists())


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Has an error say which file it is about."""
    try:
        yield
    except (DamagedFile, OSError) as error:
        raise DamagedFile(f"{file}: {error}") from error


class SnapshotFolder:
    """The snapshots of one run, a file each; of a run on many ranks, the parts of one of them.

    Args:
        path: a directory of snapshots; made when the first is written.
        rank, ranks: whose parts. There may be parts of ranks that there were before, when their
            number was another one; the first ranks look after those too.
    """

    def __init__(self, path: Path, rank: int = 0, ranks: int = 1) -> None:
        self.root = path
        self.path = path if ranks == 1 else folder_of(path, rank)
        self._rank, self._ranks = rank, ranks

    def steps(self) -> list[int]:
        """Steps of the snapshots in it, oldest first."""
        return steps_in(self.path)

    def file(self, step: int) -> Path:
        """Where the snapshot of a step is."""
        return file_in(self.path, step)

    def has(self, file: Path) -> bool:
        """Whether a part is one of this directory, whoever wrote it."""
        return self.root.resolve() in file.resolve().parents

    def pages_of(self, content: Content) -> list[memoryview]:
        """The bytes of a part of this rank; see `snapshot_file.pages_of`."""
        return snapshot_file.pages_of(content._replace(rank=self._rank, ranks=self._ranks))

    def write(self, step: int, pages: Iterable[memoryview]) -> int:
        """Writes a part; see `snapshot_file.write_pages`."""
        self.path.mkdir(parents=True, exist_ok=True)
        return snapshot_file.write_pages(self.file(step), pages)

    def incoming_copy(self, step: int) -> Incoming:
        """The file for a copy of what the rank before this one writes."""
        folder = copies_of(self.root, (self._rank - 1) % self._ranks, self._ranks)
        return _incoming(file_in(folder, step))

    def incoming(self, step: int) -> Incoming:
        """The file for a part of this rank that another has kept."""
        return _incoming(self.file(step))

    def keep(self, depth: int, before: int | None = None) -> None:
        """Removes all but the newest, none of this step or a later one."""
        for step in self._all_steps()[:-depth]:
            if before is None or step < before:
                self._remove(step)

    def forget_after(self, step: int) -> None:
        """Removes those of later steps, which a rollback has made untrue."""
        for later in self._all_steps():
            if later > step:
                self._remove(later)

    def set_aside_after(self, step: int) -> None:
        """Renames those of later steps, which could not be used."""
        for folder in self._folders():
            for later in steps_in(folder):
                if later > step:
                    file = file_in(folder, later)
                    file.rename(file.with_suffix(".damaged"))

    def clear_leftovers(self) -> None:
        """Removes what writers that were killed have left behind."""
        for folder in self._folders():
            for leftover in folder.glob(_LEFTOVER):
                leftover.unlink(missing_ok=True)

    def _all_steps(self) -> list[int]:
        return sorted({step for folder in self._folders() for step in steps_in(folder)})

    def _remove(self, step: int) -> None:
        for folder in self._folders():
            file_in(folder, step).unlink(missing_ok=True)
            if folder not in (self.path, self.root):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only if that was the last of what is in it

    def _folders(self) -> Iterator[Path]:
        """Its own, and of those that nobody else has the ones that it looks after."""
        own = [self.path, *self._left_behind()]
        for folder in own:
            yield from sorted(folder.glob(_COPIES))
        yield from own

    def _left_behind(self) -> Iterator[Path]:
        if self._rank == 0 and self._ranks > 1:
            yield self.root
        first = 0 if self._ranks == 1 else self._ranks
        for rank, folder in folders_in(self.root).items():
            if rank >= first and rank % self._ranks == self._rank:
                yield folder


def _incoming(file: Path) -> Incoming:
    with contextlib.suppress(OSError):  # which the file will say
        file.parent.mkdir(parents=True, exist_ok=True)
    return Incoming(file)
