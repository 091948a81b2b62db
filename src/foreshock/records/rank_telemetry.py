"""The telemetry of many ranks, read as one."""

import dataclasses
import os
import re
from pathlib import Path

from foreshock.records.telemetry_reader import Telemetry, read_telemetry

_FILE = "telemetry.jsonl"
_OF_RANK = re.compile(r"rank_(\d{5,})")


def read_rank_telemetry(
    run_dir: str | os.PathLike[str], *, decode_nonfinite: bool = True
) -> Telemetry:
    """Reads what all ranks of a run have written, in the order of time, each with its `rank`.

    Args:
        run_dir: the run's directory; of the first rank the file in it, of others, as far as they
            keep records (`Monitor(rank_records=True)`), those in `rank_00001` and so on.
        decode_nonfinite: as for `read_telemetry`.

    Returns:
        As `read_telemetry`; torn lines of all files are counted.

    Raises:
        FileNotFoundError: there is no telemetry in the directory.
        ValueError: as `read_telemetry`.

    Cost: one pass over all files; all records are held in memory.
    """
    directory = Path(run_dir)
    kept = {r: path for r, path in rank_folders(directory).items() if (path / _FILE).exists()}
    folders = {0: directory, **kept}
    read = {
        rank: read_telemetry(folder / _FILE, decode_nonfinite=decode_nonfinite)
        for rank, folder in folders.items()
    }
    records = [{**record, "rank": rank} for rank, found in read.items() for record in found.records]
    records.sort(key=lambda record: str(record.get("time")))  # stable, and all of one time zone
    return dataclasses.replace(
        read[0],
        records=records,
        schema_version=max(found.schema_version for found in read.values()),
        torn_lines=sum(found.torn_lines for found in read.values()),
    )


def rank_folders(run_dir: Path) -> dict[int, Path]:
    """Where the ranks but for the first keep what is theirs alone.

    Args:
        run_dir: the run's directory.

    Returns:
        The directories `rank_00001` and so on that are there, by rank, in their order.
    """
    named = ((_OF_RANK.fullmatch(entry.name), entry) for entry in run_dir.iterdir())
    found = {int(name[1]): entry for name, entry in named if name and entry.is_dir()}
    is_own = {rank: rank > 0 and entry.name == f"rank_{rank:05d}" for rank, entry in found.items()}
    return {rank: found[rank] for rank in sorted(found) if is_own[rank]}
