"""A training loop of one's own, with accelerate, kept alive by a monitor.

python examples/accelerate_loop.py --out-dir runs/accelerate

A small GPT-2, made from its configuration, learns the text of Python's own documentation, two
batches to an update. Half way through a weight becomes NaN: the monitor names it, goes back to the
last state that is known to be good, and hands out the same batches again. Training ends with the
very bits that it would have ended with (try --fault-at -1). Takes some seconds.
Needs transformers and accelerate: pip install 'foreshock[huggingface]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import foreshock as fs
from foreshock.drill.text import Vocabulary, load_corpus
from foreshock.integrations.accelerate import watch

TOKENS, ROWS_PER_BATCH, ACCUMULATION = 64, 8, 2


def make_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(Vocabulary()), n_positions=TOKENS, n_embd=48, n_layer=2, n_head=2)
    )


def load_rows(rows: int) -> TensorDataset:
    """Rows of text, one character per token."""
    return TensorDataset(Vocabulary().encode(load_corpus()[: rows * TOKENS]).view(rows, TOKENS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--fault-at", type=int, default=30, help="update before which it strikes")
    given = parser.parse_args()

    torch.manual_seed(0)
    accumulation = GradientAccumulationPlugin(ACCUMULATION, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=accumulation)
    data = load_rows(given.updates * ACCUMULATION * ROWS_PER_BATCH)
    model, optimizer, loader = accelerator.prepare(
        model := make_model(),
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        DataLoader(data, batch_size=ROWS_PER_BATCH, shuffle=True),
    )
    guard = fs.Guard(mode="recover", snapshot_interval=20, lr_backoff=1.0)
    monitor = watch(accelerator, model, optimizer, given.out_dir, guard)
    fault_at = given.fault_at * ACCUMULATION
    for step, (tokens,) in monitor.loop(loader):
        if step == fault_at:
            fault_at = -1  # it strikes once
            with torch.no_grad():
                model.transformer.h[1].mlp.c_fc.weight[3, 3] = torch.nan
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                monitor.clip_grad_norm_(1.0)
            verdict = monitor.step(loss)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or verdict.action is not fs.Action.CONTINUE:
            print(f"step {step:3}  loss {loss.item():.3f}  {verdict.offender or ''}")
        if not verdict:
            break

    summary = monitor.finalize()
    print("final loss:", round(summary["final_loss"], 3))
    print("weights:", fs.guard.hash_batch(list(model.parameters())))
    print("integrity:", summary["guard"]["integrity_status"])
    print("written:", *sorted(path.name for path in given.out_dir.iterdir()))


if __name__ == "__main__":
    main()
