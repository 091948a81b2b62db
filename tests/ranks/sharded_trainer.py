"""The Trainer under FSDP2 on two ranks, struck by faults in the shard of one of them.

Argument: a directory, in which each rank leaves what it has found. Started by torchrun.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from foreshock.distributed_part import local_part
from foreshock.integrations.huggingface import MonitorCallback

STEPS, STRUCK_AT, TOKENS = 10, 6, 8
NAME = "transformer.h.1.mlp.c_fc.weight"


class Sharded(Trainer):  # type: ignore[misc]
    """One rank's memory changes once.

    accelerate shards on devices only: on the CPU it passes its plugin over without a word. It is
    told here what it would find on a device; all that comes after is its own.
    """

    strikes: str | None = None
    """weight (before the step), or gradient or overflow (after its backward)."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = accelerate.DistributedType.FSDP
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.accelerator.state.fsdp_plugin = plugin
        self.is_fsdp_enabled = True
        if self.strikes == "overflow":
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        parameter = model.get_parameter(NAME)
        is_here = self.state.global_step == STRUCK_AT and dist.get_rank() == 1
        if is_here and self.strikes == "weight":
            local_part(parameter).data[0, 0] = math.nan
        loss = super().training_step(model, *args, **kwargs)
        if is_here and self.strikes in ("gradient", "overflow"):
            assert parameter.grad is not None
            bad = math.nan if self.strikes == "gradient" else math.inf
            local_part(parameter.grad)[0, 0] = bad
        return loss  # type: ignore[no-any-return]


class Course(TrainerCallback):  # type: ignore[misc]
    """Weights before each step, and what the monitor has said of it."""

    def __init__(self, watch: MonitorCallback | None) -> None:
        self.watch = watch
        self.bits: list[str] = []
        self.said: list[str] = []

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        parts = [local_part(p).detach().reshape(-1) for p in model.parameters()]
        self.bits.append(hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.watch is not None and self.watch._attached is not None:
            self.said.append(str(self.watch._attached.verdict))


def train(out: Path, mode: str | None, strikes: str | None) -> dict[str, Any]:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=TOKENS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    rows = (torch.arange(4 * STEPS * TOKENS) % 31).view(-1, TOKENS)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]},
    )
    watch = None
    if mode is not None:
        guard = {"guard_enabled": mode == "recover", "guard_snapshot_interval": 2}
        watch = MonitorCallback(out / "run", telemetry_interval=1, **guard)
    course = Course(watch)
    given = [{"input_ids": row, "labels": row} for row in rows]
    callbacks = [course] if watch is None else [watch, course]
    Sharded.strikes = strikes
    trainer = Sharded(GPT2LMHeadModel(config), arguments, train_dataset=given, callbacks=callbacks)
    trainer.train()
    course.on_step_begin(model=trainer.model)
    logged = trainer.state.log_history
    return {
        "is_split": all(hasattr(p, "placements") for p in trainer.model.parameters()),
        "bits": course.bits,
        "said": course.said,
        "guard": None if watch is None else watch.summary["guard"],  # type: ignore[index]
        "norms": [str(entry["grad_norm"]) for entry in logged if "grad_norm" in entry],
        "scale": trainer.accelerator.scaler and trainer.accelerator.scaler.get_scale(),
    }


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    logging.getLogger("foreshock").setLevel(logging.ERROR)
    runs = {
        "bare": (None, None),
        "watched": ("observe", None),
        "guarded": ("recover", None),
        "observed": ("observe", "gradient"),
        "withheld": ("recover", "gradient"),
        "rolled back": ("recover", "weight"),
        "overflowed": ("recover", "overflow"),
    }
    found = {name: train(out / name, *how) for name, how in runs.items()}
    (out / f"found_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
