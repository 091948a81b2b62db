"""What the defaults tell apart: handwritten digits. Ten seeds are measured in benchmarks/ood."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foreshock import surprise
from tests.surprise.digits import auroc, train

SEEDS = (0, 1)
# The claims, which are means of ten seeds; the mean of two scatters by some 0.3 and 0.8.
LEAST_MEAN = {False: 98.0, True: 97.0}


@pytest.mark.parametrize("is_random", [False, True], ids=["classes-5-to-9", "five-random-classes"])
def test_classes_never_seen_are_told_from_those_that_were(is_random: bool) -> None:
    near, far, alarms = [], [], []
    for seed in SEEDS:
        trained = train(seed, is_random=is_random)
        probe = surprise.fit(trained.model, trained.loader, seed=seed)
        normal = probe(trained.test)
        near.append(auroc(normal.score, probe(trained.near).score))
        far += [auroc(normal.score, probe(x).score) for x in trained.far(seed).values()]
        alarms.append(normal.is_ood.float().mean().item())
    assert np.mean(near) >= LEAST_MEAN[is_random]
    assert min(near) >= 90
    assert min(far) >= 99
    assert 0.01 < np.mean(alarms) < 0.09


def test_trap_24_the_score_rises_with_the_distance_while_l_and_h_fall() -> None:
    trained = train(0)
    probe = surprise.fit(trained.model, trained.loader)
    at = [probe(scale * trained.test, components=True) for scale in (1.0, 10.0, 100.0, 1000.0)]
    scores = torch.stack([one.score.median() for one in at])
    assert (scores.diff() > 0).all()
    assert all(one.is_ood.all() for one in at[1:])
    assert at[0].is_ood.float().mean() < 0.1
    for layer in ("0", "2", "4"):
        parts = [one.components[layer] for one in at]
        certainty = torch.stack([(p.length + p.entropy).mean() for p in parts])
        assert certainty[-1] < 0.1 * certainty[0]
