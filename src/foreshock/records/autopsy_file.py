"""autopsy/step_N.json: what was wrong with a step that made a rollback necessary."""

import os
from pathlib import Path
from typing import Any

from foreshock.records.summary import read_summary, write_summary


def write_autopsy(
    run_dir: str | os.PathLike[str], step: int, sentence: str, found: object, *, redact: bool = True
) -> Path:
    """Writes the autopsy of a step, atomically; an older one of the same step gives way.

    Args:
        run_dir: the run's directory.
        step: its number; the file is `autopsy/step_<step>.json`.
        sentence: what it comes to.
        found: an instance of a dataclass, whose fields the file has after the sentence.
        redact: as for `write_summary`.

    Returns:
        Where the file is in the run's directory.

    Raises:
        OSError: the file cannot be written; an older one is then untouched.

    Cost: as `write_atomically`.
    """
    file = _file_of(step)
    write_summary(Path(run_dir) / file, {"sentence": sentence, **vars(found)}, redact=redact)
    return file


def read_autopsy(
    run_dir: str | os.PathLike[str], step: int, *, decode_nonfinite: bool = True
) -> dict[str, Any]:
    """Reads what `write_autopsy` wrote.

    Args:
        run_dir: the run's directory.
        step: that had failed.
        decode_nonfinite: give the texts "NaN", "Infinity" and "-Infinity" back as floats.

    Returns:
        The fields of `foreshock.guard.StepExamined`, and the `sentence`.

    Raises:
        FileNotFoundError: there is no autopsy of this step.
        ValueError: the file is not strict JSON, or not one object.
    """
    return read_summary(Path(run_dir) / _file_of(step), decode_nonfinite=decode_nonfinite)


def _file_of(step: int) -> Path:
    return Path("autopsy") / f"step_{step}.json"
