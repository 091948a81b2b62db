"""A loop in Lightning Fabric, watched and guarded: a weight turns NaN, and the run recovers.

python examples/fabric_loop.py --out-dir runs/fabric

A small GPT learns the text of Python's own documentation. Fabric wraps model, optimizer and loader;
the monitor is given what is inside the wrappers, and clips in the place of `fabric.clip_gradients`.
Takes some seconds. Needs Lightning: pip install 'foreshock[lightning]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import foreshock as fs
from foreshock.drill.gpt import GPT, GPTConfig, next_token_loss
from foreshock.drill.text import TextBatches, Vocabulary, load_corpus

STEPS, CONTEXT = 120, 32


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of text, and the same rows one character later."""

    def __init__(self) -> None:
        self.batches = TextBatches(Vocabulary().encode(load_corpus()), 1, CONTEXT)

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.batches.batch_at(i)
        return x[0], y[0]


def main(out_dir: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.seed_everything(0, verbose=False)
    bare = GPT(GPTConfig(context=CONTEXT, width=64, num_blocks=2))
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=3e-3)
    model, optimizer = fabric.setup(bare, bare_optimizer)
    loader = fabric.setup_dataloaders(DataLoader(Rows(), batch_size=8, shuffle=True))

    guard = fs.Guard(mode="recover", snapshot_interval=20)
    has_struck = False
    with fs.Monitor(bare, bare_optimizer, out_dir, guard) as monitor:
        for step, (x, y) in monitor.loop(loader):
            if step == 70 and not has_struck:
                bare.blocks[1].mlp.up.weight.data[3, 3] = float("nan")
                has_struck = True
            optimizer.zero_grad()
            loss = next_token_loss(model(x), y)
            fabric.backward(loss)
            monitor.clip_grad_norm_(1.0)
            verdict = monitor.step(loss)
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.2f}")
            if verdict.action is not fs.Action.CONTINUE:
                print(f"step {verdict.step}: {verdict.action.value}, {verdict.offender}")
            if not verdict:
                break
    summary = monitor.finalize()
    print(f"{summary['guard']['integrity_status']} after {summary['total_steps']} steps")
    print(f"final loss {summary['final_loss']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/fabric"))
    main(parser.parse_args().out_dir)
