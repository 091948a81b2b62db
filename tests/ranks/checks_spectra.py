"""The spectra of matrices of which every rank holds a part."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

import foreshock as fs
from foreshock.distributed_part import whole
from tests.ranks.training import assert_same_on_all_ranks, counted, train


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


def check_copies_are_looked_at_without_a_word(out: Path) -> None:
    with counted() as never:
        train("ddp", out / "never", monitor={"spectral_enabled": False})
    with counted() as always:
        run = train("ddp", out / "always", monitor={"spectral_interval": 1})
    assert always == never
    assert_same_on_all_ranks(run.summary["spectral"])
