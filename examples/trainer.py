"""The Trainer of Hugging Face on several processes, struck by a fault on one of them.

torchrun --standalone --nproc-per-node 2 examples/trainer.py
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from foreshock.integrations.huggingface import MonitorCallback

STEPS, STRUCK_AT, TOKENS = 20, 12, 16


class Struck(Trainer):
    """One rank's memory changes, once, before a step."""

    has_struck = False

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_here = self.state.global_step == STRUCK_AT and os.environ.get("RANK") == "1"
        if is_here and not self.has_struck:
            self.has_struck = True
            next(model.parameters()).data[0, 0] = math.nan
        return super().training_step(model, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", default="runs/trainer")
    out_dir = parser.parse_args().out_dir
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=TOKENS, n_embd=16, n_layer=1, n_head=2)
    tokens = torch.arange(8 * STEPS * TOKENS).view(-1, TOKENS) % 32
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=f"{out_dir}/trainer",
        per_device_train_batch_size=2,
        max_steps=STEPS,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    watch = MonitorCallback(out_dir=out_dir, guard_enabled=True, guard_snapshot_interval=5)
    Struck(GPT2LMHeadModel(config), arguments, train_dataset=rows, callbacks=[watch]).train()
    if watch.summary is not None and os.environ.get("RANK", "0") == "0":
        print(watch.summary["guard"]["integrity_status"], f"{watch.summary['final_loss']:.2f}")


if __name__ == "__main__":
    main()
