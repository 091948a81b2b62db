"""A Trainer with a small GPT-2 on real text, that can be struck by faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.drill.text import Vocabulary, load_corpus
from foreshock.records import read_telemetry

transformers = pytest.importorskip("transformers")
huggingface = pytest.importorskip("foreshock.integrations.huggingface")

TOKENS, ROWS = 32, 512

Strike = Callable[[nn.Module], None]


class Text(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of real text, one character per token."""

    def __init__(self) -> None:
        tokens = Vocabulary().encode(load_corpus()[: TOKENS * ROWS])
        self.rows = tokens.view(ROWS, TOKENS)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class Striking(transformers.Trainer):  # type: ignore[misc]
    """Has something happen to its model, once, before a training step or after its backward."""

    strikes: dict[int, Strike]
    strikes_after: dict[int, Strike]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self._strike(self.strikes, model)
        loss = super().training_step(model, *args, **kwargs)
        self._strike(self.strikes_after, model)
        return loss  # type: ignore[no-any-return]

    def _strike(self, strikes: dict[int, Strike], model: nn.Module) -> None:
        strike = strikes.pop(self.state.global_step, None)
        if strike is not None:
            with torch.no_grad():
                strike(model)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(Vocabulary()), n_positions=TOKENS, n_embd=32, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def trainer(
    out_dir: Path,
    *callbacks: Any,
    model: nn.Module | None = None,
    strikes: dict[int, Strike] | None = None,
    strikes_after: dict[int, Strike] | None = None,
    eval_dataset: Any = None,
    **given: Any,
) -> Any:
    arguments = {
        "max_steps": 80,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **given,
    }
    args = transformers.TrainingArguments(output_dir=str(out_dir / "trainer"), **arguments)
    made = Striking(
        model or gpt2(),
        args,
        train_dataset=Text(),
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )
    made.strikes, made.strikes_after = dict(strikes or {}), dict(strikes_after or {})
    return made


def monitor_callback(out_dir: Path, **given: Any) -> Any:
    options = {"guard_snapshot_interval": 10, "telemetry_interval": 5, **given}
    return huggingface.MonitorCallback(out_dir / "run", **options)


def records(out_dir: Path, event: str) -> list[dict[str, Any]]:
    found = read_telemetry(out_dir / "run" / "telemetry.jsonl").records
    return [r for r in found if r["event"] == event]


WEIGHT = "transformer.h.1.mlp.c_fc.weight"


def strike_weight(model: nn.Module) -> None:
    model.get_parameter(WEIGHT)[3, 3] = math.nan


def strike_gradient(model: nn.Module) -> None:
    gradient = model.get_parameter(WEIGHT).grad
    assert gradient is not None
    gradient[3, 3] = math.nan


def have_equal_bits(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
