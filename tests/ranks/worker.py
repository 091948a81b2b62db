"""Runs every check on one rank; started by `tests.ranks.launch`, once a rank."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.ranks import (
    checks_clipping,
    checks_copies_on_disk,
    checks_costs,
    checks_elastic,
    checks_engines,
    checks_pace,
    checks_records,
    checks_recovery,
    checks_scaler,
    checks_spectra,
    checks_verdicts,
)

MODULES = (
    checks_clipping,
    checks_verdicts,
    checks_records,
    checks_recovery,
    checks_spectra,
    checks_costs,
    checks_elastic,
    checks_copies_on_disk,
    checks_pace,
    checks_scaler,
    checks_engines,
)


def all_checks(size: int) -> dict[str, object]:
    """By name; some are for two or four ranks only."""
    found = {}
    for module in MODULES:
        for name, check in vars(module).items():
            if name.startswith("check_") and size in getattr(check, "sizes", (2, 4)):
                found[name.removeprefix("check_")] = check
    return found


def main() -> None:
    out, size, rank = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"])
    only = sys.argv[3:]
    torch.set_num_threads(1)
    logging.getLogger("foreshock").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out / 'store'}",
        world_size=size,
        rank=rank,
        timeout=datetime.timedelta(seconds=30),
    )
    results: dict[str, str | None] = {}
    for name, check in all_checks(size).items():
        if only and name not in only:
            continue
        try:
            check(out / name)  # type: ignore[operator]
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
            break  # the ranks may be at different places now
    (out / f"result_{rank}.json").write_text(json.dumps(results))
    if not any(results.values()):
        time.sleep(0.1)  # gloo's threads let go of what a check has sent last
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
