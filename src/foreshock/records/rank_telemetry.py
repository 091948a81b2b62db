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
    folders = {0: directory, **_folders_of_ranks(directory)}
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


def _folders_of_ranks(directory: Path) -> dict[int, Path]:
    named = ((_OF_RANK.fullmatch(entry.name), entry) for entry in sorted(directory.iterdir()))
    return {int(name[1]): entry for name, entry in named if name and (entry / _FILE).exists()}
