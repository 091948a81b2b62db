"""Surprise on scikit-learn's digits: `python -m benchmarks.ood.digits [--seeds 10] [--out DIR]`.

For every seed an MLP learns the digits 0-4, another one five digits drawn at random; all methods
are fitted on what they were trained on. See docs/ood.md.
"""

from __future__ import annotations

import functools
import itertools
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.ood import digit_sets, report
from benchmarks.ood.trial import HEAD_INPUT, OURS, Outputs, ProbeOptions, Row, Trial, judge

NEAR, RANDOM_NEAR = "near", "random-near"
FAR = ("patches", "noise", "rotated", "noised", "blurred")
SETS = (NEAR, RANDOM_NEAR, *FAR, "slightly blurred")
PRE_ACTIVATION = "pre-activation"
RIVALS = ("Mahalanobis++", "KNN", "ViM")


def mlp(num_classes: int) -> nn.Sequential:
    """64-128-128-C with ReLU."""
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, num_classes))


@torch.no_grad()
def look(model: nn.Sequential, images: Tensor) -> Outputs:
    """The last hidden layer before and after its ReLU, and the logits."""
    hidden = model[:3](images)
    features = {HEAD_INPUT: model[3](hidden), PRE_ACTIVATION: hidden}
    return Outputs(features, model[4](features[HEAD_INPUT]))


def trial(classes: list[int], seed: int, epochs: int) -> Trial:
    """A model trained on 70 % of these digits; the rest of them are normal, the others near-OOD."""
    images, digit = digit_sets.digits()
    is_known = torch.isin(digit, torch.tensor(classes))
    known, labels = images[is_known], torch.searchsorted(torch.tensor(classes), digit[is_known])
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    inside, outside = order.split([7 * len(order) // 10, len(order) - 7 * len(order) // 10])
    model = trained(known[inside], labels[inside], seed, epochs)
    with torch.no_grad():
        hits = model(known[outside]).argmax(1) == labels[outside]
    return Trial(
        seed=seed,
        model=model,
        weight=model[4].weight,
        bias=model[4].bias,
        look=functools.partial(look, model),
        train=known[inside],
        labels=labels[inside],
        normal=known[outside],
        accuracy=float(hits.double().mean()),
        ood={NEAR: images[~is_known]},
    )


def trained(images: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Sequential:
    """Adam, 1e-3, batches of 64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp(int(labels.max()) + 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
    return model.eval()


def trials(seed: int, epochs: int = 60) -> list[Trial]:
    """0-4 against everything; five digits drawn by the seed against the other five."""
    first = trial([0, 1, 2, 3, 4], seed, epochs)
    first.ood.update(far_sets(first.normal, seed))
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:5].sort().values
    second = trial(drawn.tolist(), seed, epochs)
    second.ood[RANDOM_NEAR] = second.ood.pop(NEAR)
    return [first, second]


def far_sets(normal: Tensor, seed: int, count: int = 500) -> dict[str, Tensor]:
    """No digits at all, and normal digits that were spoilt."""
    return {
        "patches": digit_sets.patches(count, seed),
        "noise": digit_sets.noise(count, seed),
        "rotated": digit_sets.rotated(normal, seed),
        "noised": digit_sets.noised(normal, seed),
        "blurred": digit_sets.blurred(normal, sigma=1.5),
        "slightly blurred": digit_sets.blurred(normal, sigma=1.0),
    }


def goals(rows: list[Row]) -> list[report.Goal]:
    """What ours is to reach, and what it reached."""
    auroc = report.percentages(rows, "auroc")
    mean = {name: sum(auroc[OURS][name]) / len(auroc[OURS][name]) for name in SETS}
    found = [
        report.Goal(f"mean AUROC on {NEAR}, at least 98", mean[NEAR], mean[NEAR] >= 98),
        report.Goal(
            f"mean AUROC on {RANDOM_NEAR}, at least 97", mean[RANDOM_NEAR], mean[RANDOM_NEAR] >= 97
        ),
    ]
    found += [
        report.Goal(f"mean AUROC on {name}, at least 99", mean[name], mean[name] >= 99)
        for name in FAR
    ]
    lowest = min(itertools.chain.from_iterable(auroc[OURS].values()))
    found.append(report.Goal("lowest AUROC of any seed and set, at least 90", lowest, lowest >= 90))
    for rival, name in itertools.product(RIVALS, (NEAR, RANDOM_NEAR)):
        variants = [method for method in auroc if method.split(",")[0] == rival]
        best = [max(each) for each in zip(*(auroc[m][name] for m in variants), strict=True)]
        won = [ours > theirs for ours, theirs in zip(auroc[OURS][name], best, strict=True)]
        share = 100 * sum(won) / len(won)
        said = f"% of seeds above {rival} on {name}, on its better layer, at least 90"
        found.append(report.Goal(said, share, share >= 90))
    return found


def main(
    seeds: Annotated[int, typer.Option(help="How many, from 0 on.", min=1)] = 10,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("runs/ood-digits"),
    store: Annotated[bool, typer.Option(help="Store the rows that docs/ood.md shows.")] = False,
) -> None:
    """Train, score, and say how well every method tells digits from what is none.

    Exit code 0 if ours reached every goal, 1 if not.
    """
    began = time.monotonic()
    rows = [
        row for seed in range(seeds) for each in trials(seed) for row in judge(each, ProbeOptions())
    ]
    report.write(rows, out, "digits", SETS)
    if store:
        report.store(rows, "ood_digits", SETS)
    reached = goals(rows)
    report.show(rows, SETS, reached)
    print(f"{time.monotonic() - began:.0f} s; rows, table and plot are in {out}")
    raise typer.Exit(0 if all(goal.is_met for goal in reached) else 1)


if __name__ == "__main__":
    typer.run(main)
