"""The files of a run's directory, read one by one; one that is broken does not hide the others."""

from __future__ import annotations

import base64
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from foreshock.records import read_summary, verify
from foreshock.records.ledger_verification import head_in_summary
from foreshock.records.metrics_reader import scan_json
from foreshock.records.strict_json import decode_nonfinite_texts
from foreshock.records.telemetry_reader import parse_telemetry_line, scan_telemetry
from foreshock.records.verification_story import tell_limits, tell_lines
from foreshock.report.curves import Curves, is_step
from foreshock.report.layerwise import is_layerwise, read_layerwise
from foreshock.report.telemetry import RunSeen

_SIGNS_OF_A_RUN = (
    "telemetry.jsonl",
    "summary.json",
    "ledger.jsonl",
    "config.json",
    "metrics",
    "monitoring",
)
_PICTURE_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_PICTURE_FOLDERS = ("plots", "monitoring", "surprise", ".")
_AUTOPSY_FIELDS = ("step", "cause", "sentence")
_MAX_AUTOPSIES = 50
_MAX_PICTURE_BYTES = 1_500_000
_MAX_ALL_PICTURE_BYTES = 4_000_000


def checked_run(run_dir: str | os.PathLike[str]) -> Path:
    """Checks that a directory is that of a run.

    Args:
        run_dir: the path.

    Returns:
        It.

    Raises:
        ValueError: it is not; says what is accepted.
    """
    path = Path(run_dir)
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise ValueError(f"RUN is {str(path)!r}, which is {what}; accepted: a run's directory")
    if not any((path / sign).exists() for sign in _SIGNS_OF_A_RUN):
        signs = ", ".join(_SIGNS_OF_A_RUN)
        raise ValueError(
            f"RUN is {str(path)!r}, which holds no files of a run; accepted: a directory with one "
            f"of {signs}"
        )
    return path


class RunFiles:
    """Reads a run's directory.

    Args:
        path: the directory.

    Attributes:
        problems: what is wrong with the files, in words.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.problems: list[str] = []

    def telemetry(self, seen: RunSeen) -> None:
        """Shows all that telemetry.jsonl tells."""
        try:
            for record in scan_telemetry(self._path / "telemetry.jsonl"):
                seen.add(record)
        except FileNotFoundError:
            seen.trouble = "telemetry.jsonl is missing"
            self.problems.append("telemetry.jsonl is missing: no curves and no events are known")
        except (OSError, ValueError) as error:
            seen.trouble = f"telemetry.jsonl is read no further: {error}"
            self.problems.append(seen.trouble)
        self._tell_torn("telemetry.jsonl", seen.torn_lines)
        if seen.stepless:
            self.problems.append(
                f"telemetry.jsonl: {seen.stepless} telemetry records have no step, and no curve"
            )

    def summary(self) -> dict[str, Any]:
        """What summary.json says; empty if it cannot be read."""
        return self._object("summary.json", "the run goes on, or was killed before its end")

    def config(self) -> dict[str, Any]:
        """What config.json says; empty if it cannot be read."""
        return self._object("config.json", "settings and versions are not known")

    def other_curves(self, curves: Curves) -> None:
        """Takes in what the recorder of metrics and the watchers of modules wrote."""
        metrics = self._path / "metrics" / "training_metrics.json"
        if metrics.is_file():
            self._take_in(metrics, curves, _metrics(metrics))
        for path in sorted((self._path / "monitoring").glob("*.jsonl")):
            self._take_in(path, curves, _lines(path))

    def autopsies(self, folders: Mapping[int, Path]) -> tuple[list[dict[str, Any]], int]:
        """The first of them, in the order of the steps, and how many more there are.

        Args:
            folders: of the other ranks that have some, by rank.
        """
        places = {0: self._path, **folders}
        files = [(p, r) for r, place in places.items() for p in place.glob("autopsy/step_*.json")]
        files.sort(key=lambda file: (_step_in_name(file[0]), file[1]))
        found = [
            {"file": name, "rank": rank, "all": autopsy}
            | {key: autopsy.get(key) for key in _AUTOPSY_FIELDS}
            for name, rank in ((self._name(p), rank) for p, rank in files[:_MAX_AUTOPSIES])
            if (autopsy := self._object(name))
        ]
        return found, max(0, len(files) - _MAX_AUTOPSIES)

    def ledger(self) -> dict[str, Any]:
        """What the verification of ledger.jsonl says."""
        path = self._path / "ledger.jsonl"
        if not path.is_file():
            return _ledger("missing", "there is no ledger.jsonl")
        try:
            found = verify(path, head=head_in_summary(path))
        except (OSError, ValueError) as error:
            self.problems.append(f"ledger.jsonl could not be verified: {error}")
            return _ledger("not verified", str(error))
        if not found:
            sentence = f"line {found.first_bad_line}: {found.problem}"
            self.problems.append(f"ledger.jsonl is broken: {sentence}")
            return _ledger("broken", sentence, found.head)
        limits = tell_limits(found, "summary.json")
        return _ledger("intact", tell_lines(found.lines), found.head, limits)

    def pictures(self) -> list[dict[str, str]]:
        """PNG and SVG files of the run, as addresses that hold them; large ones are only named."""
        pictures, budget = [], _MAX_ALL_PICTURE_BYTES
        for path in self._picture_paths():
            picture = {"file": self._name(path), "address": ""}
            size = path.stat().st_size
            if size <= min(budget, _MAX_PICTURE_BYTES):
                budget -= size
                text = base64.b64encode(path.read_bytes()).decode()
                picture["address"] = f"data:{_PICTURE_TYPES[path.suffix]};base64,{text}"
            pictures.append(picture)
        return pictures

    def layerwise(self) -> list[dict[str, Any]]:
        """How surprised the layers were by samples, wherever that was saved in the directory."""
        found = []
        for path in sorted([*self._path.glob("*.npz"), *self._path.glob("*/*.npz")]):
            if is_layerwise(path):
                try:
                    found.append({"file": self._name(path)} | read_layerwise(path))
                except (OSError, ValueError, zipfile.BadZipFile) as error:
                    self.problems.append(f"{self._name(path)} cannot be read: {error}")
        return found

    def _picture_paths(self) -> Iterator[Path]:
        for folder in _PICTURE_FOLDERS:
            for path in sorted((self._path / folder).glob("*.*")):
                is_twin = path.suffix == ".svg" and path.with_suffix(".png").is_file()
                if path.suffix in _PICTURE_TYPES and path.is_file() and not is_twin:
                    yield path

    def _object(self, name: str, otherwise: str = "it was there a moment ago") -> dict[str, Any]:
        try:
            return read_summary(self._path / name)
        except FileNotFoundError:
            self.problems.append(f"{name} is missing: {otherwise}")
        except (OSError, ValueError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
        return {}

    def _take_in(
        self, path: Path, curves: Curves, records: Iterator[dict[str, Any] | None]
    ) -> None:
        name, torn = self._name(path), 0
        try:
            for record in records:
                if record is None or not is_step(record.get("step")):
                    torn += 1
                else:
                    curves.add(name, record["step"], record)
        except (OSError, ValueError) as error:
            self.problems.append(f"{name} cannot be read: {error}")
        self._tell_torn(name, torn)

    def _tell_torn(self, name: str, torn: int) -> None:
        if torn:
            lines = tell_lines(torn)
            self.problems.append(f"{name}: {lines} skipped, being no whole record")

    def _name(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()


def losses_in(summary: Mapping[str, Any]) -> Iterator[str]:
    """What of a run was not written, by its own account, in words."""
    for key, what in (
        ("dropped_records", "telemetry records were dropped, as the disk was too slow"),
        ("lost_ledger_records", "records of the ledger were lost"),
    ):
        number = summary.get(key)
        if isinstance(number, int) and number > 0:
            yield f"summary.json: {number} {what}"


def _ledger(
    state: str, sentence: str, head: str | None = None, limits: Iterable[str] = ()
) -> dict[str, Any]:
    return {"state": state, "sentence": sentence, "head": head, "limits": list(limits)}


def _metrics(path: Path) -> Iterator[dict[str, Any] | None]:
    with open(path, "rb") as file:
        for record, _ in scan_json(file):
            yield record and {
                key: value if key == "timestamp" else decode_nonfinite_texts(value)
                for key, value in record.items()
            }


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    with open(path, "rb") as file:
        for line in file:
            yield parse_telemetry_line(line)


def _step_in_name(path: Path) -> tuple[int, str]:
    digits = path.stem.removeprefix("step_")
    return (int(digits) if digits.isdecimal() and len(digits) < 20 else 0), path.name
