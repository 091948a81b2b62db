"""The spectra of matrices of which every rank holds a part."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

import foreshock as fs
from foreshock.distributed_part import whole
from foreshock.records import read_telemetry
from foreshock.signals import SpectralWatch
from tests.ranks.training import (
    STEPS,
    How,
    Run,
    assert_same_on_all_ranks,
    counted,
    ranks,
    train,
)


def check_the_spectra_of_split_matrices_are_those_of_the_whole_ones(out: Path) -> None:
    for kind in ("fsdp2", "tp"):
        run = train(kind, out / kind, monitor={"spectral_interval": 1})
        seen = run.summary["spectral"]
        assert_same_on_all_ranks(seen)
        matrices = {n: whole(p) for n, p in run.model.named_parameters() if p.dim() == 2}
        kappas = fs.ops.power_iteration(list(matrices.values()))[0].kappa_tilde
        assert abs(seen["final_kappa"] / float(kappas.max()) - 1) < 0.01
        assert seen["worst_layer"] in matrices
        if dist.get_rank() == 0:
            config = json.loads((run.out / "config.json").read_text())
            assert config["spectral_passed_over"] == {}


@ranks(2)
def check_a_rank_that_loses_its_spectra_takes_them_from_all_and_nothing_hangs(out: Path) -> None:
    inner = SpectralWatch.collect

    def collect(watch: SpectralWatch) -> Any:
        seen = inner(watch)
        if dist.get_rank() == 1 and seen is not None and seen.reading.step == 5:
            raise ArithmeticError("nobody knows why")
        return seen

    SpectralWatch.collect = collect  # type: ignore[method-assign]
    try:
        for clips in ("with loss", "torch"):
            settings = {"spectral_interval": 1, "telemetry_interval": 1}
            run = train("fsdp2", out / clips, how=How(clips=clips), monitor=settings)
            assert len(run.verdicts) == STEPS
            assert run.bits() == clean_bits_of(out / f"alone {clips}", clips)
            if dist.get_rank() == 0:
                told = read_telemetry(run.out / "telemetry.jsonl").records
                looked = {r.get("spectral_step") for r in told if r["event"] == "telemetry"}
                assert max(looked - {None}) == 5, looked
    finally:
        SpectralWatch.collect = inner  # type: ignore[method-assign]


def clean_bits_of(out: Path, clips: str) -> dict[str, bytes]:
    never = {"spectral_enabled": False}
    return train("fsdp2", out, how=How(clips=clips), monitor=never).bits()


def check_a_rank_that_leaves_by_an_error_waits_for_nobody(out: Path) -> None:
    begun: list[int] = []

    def fail(run: Run, step: int) -> None:
        begun.append(len(calls))
        if step == 3:
            raise ArithmeticError

    with counted() as calls, contextlib.suppress(ArithmeticError):
        train("fsdp2", out, monitor={"spectral_interval": 1}, at_step=fail)
    assert len(begun) == 4
    assert len(calls) == begun[-1] > begun[0]


def check_copies_are_looked_at_without_a_word(out: Path) -> None:
    with counted() as never:
        train("ddp", out / "never", monitor={"spectral_enabled": False})
    with counted() as always:
        run = train("ddp", out / "always", monitor={"spectral_interval": 1})
    assert always == never
    assert_same_on_all_ranks(run.summary["spectral"])
