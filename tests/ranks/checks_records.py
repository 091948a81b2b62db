"""What the ranks have written down is one story."""

from __future__ import annotations

import math
from pathlib import Path

import torch.distributed as dist

from foreshock.report import report_data, write_report
from tests.ranks.training import Run, gathered, ranks, train

SPOILT = 6


@ranks(2)
def check_the_report_shows_all_ranks_and_what_happened_once(out: Path) -> None:
    now = {"step": -1}

    def spoil(run: Run, step: int) -> None:
        """One rank's module puts out NaN whenever this step is run."""
        now["step"] = step
        norm = next(m for n, m in run.model.named_modules() if n.endswith("norm"))
        if dist.get_rank() == 1 and "forward" not in vars(norm):
            inner = norm.forward
            norm.forward = lambda x: inner(x) * (math.nan if now["step"] == SPOILT else 1.0)

    train(
        "fsdp2",
        out,
        at_step=spoil,
        monitor={"rank_records": True, "telemetry_interval": 1, "spectral_enabled": False},
        max_consecutive_skips=1,
        max_rollbacks=1,
    )
    gathered(None)
    if dist.get_rank():
        return
    data = report_data(out)
    first, second = data["ranks"]["rows"]
    assert (first["rank"], second["rank"]) == ("0", "1")
    assert first["records"] == second["records"] > 0
    assert (first["offender"], first["stands_out"], first["state"]) == (0, "", "")
    assert second["offender"] > 0
    assert second["stands_out"].startswith("offender")
    assert second["ledger"] == "intact"
    told = data["actions"]["first"]
    assert [row["ranks"] for row in told] == ["all"] * len(told)
    assert data["counts"]["rollback_success"] == 1
    assert (told[0]["event"], told[0]["step"]) == ("rollback success", SPOILT)
    assert "on rank 1" in told[0]["offender"]
    drawn = {curve["name"]: curve for curve in data["drawing"]["ranks"]}
    shards = drawn["largest_gradients.head.weight by rank"]  # each rank has its own
    assert [line["rank"] for line in shards["lines"]] == [0, 1]
    assert not {"train_loss by rank", "grad_norm by rank"} & set(drawn)  # all have the same
    whose = {autopsy["rank"]: autopsy["all"] for autopsy in data["autopsies"]}
    assert whose[0]["place"]["why"] == "rank 1 has it"
    assert whose[1]["place"]["kind"] == "module"
    assert data["problems"] == []
    assert "rank 1: deterministic" in write_report(out).read_text()
