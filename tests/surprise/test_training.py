"""Codes that are trained: by the coding loss, by running means, at a temperature."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from foreshock.surprise import (
    Codebook,
    CosineTemperature,
    EmaCodebookUpdater,
    FixedTemperature,
    WrappedModel,
    wrap,
)
from foreshock.surprise.assignment import rows_to_win
from foreshock.surprise.losses import coding_loss
from tests.surprise.wrapped_models import cnn, images, mlp, rows


def clusters(count: int = 512, seed: int = 0) -> Tensor:
    """Points of eight clusters in six dimensions."""
    random = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    label = torch.randint(8, (count,), generator=random)
    return centers[label] + 0.3 * torch.randn(count, 6, generator=random)


def usage(wrapped: WrappedModel, x: Tensor) -> dict[str, float]:
    """The share of each layer's codes that are some row's nearest."""
    wrapped(x)
    found = {}
    for trace in wrapped.traces:
        codes = wrapped.coders[trace.meta.layer].codebook.codes
        found[trace.meta.layer] = len(trace.soft_code.best_index.unique()) / codes
    return found


def train_codes(wrapped: WrappedModel, steps: int = 150, **weights: float) -> WrappedModel:
    optimizer = torch.optim.Adam(wrapped.coding_parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        wrapped(clusters(128, seed=step))
        wrapped.coding_loss(**weights).backward()
        optimizer.step()
    return wrapped


@pytest.mark.parametrize("coding_dim", [None, 4])
def test_by_default_the_coding_loss_does_not_collapse_to_one_code(coding_dim: int | None) -> None:
    """Trap 25: alone the assignment term does, and its codes run away."""
    fresh = wrap(mlp(), "0", codes=8, coding_dim=coding_dim)
    kept = train_codes(copy.deepcopy(fresh))
    alone = train_codes(copy.deepcopy(fresh), commit_weight=0.0, balance_weight=0.0)
    assert usage(kept, clusters(seed=99))["0"] >= 0.6
    assert usage(alone, clusters(seed=99))["0"] <= 0.5
    kept(clusters(seed=99))
    assert kept.traces[0].soft_code.entropy.mean() < 1.0


def test_training_codes_brings_the_surprise_of_what_they_were_trained_on_down() -> None:
    wrapped = wrap(mlp(), codes=8, coding_dim=4)
    wrapped(clusters(seed=99))
    before = wrapped.layer_surprise()
    train_codes(wrapped)(clusters(seed=99))
    after = wrapped.layer_surprise()
    assert all(after[name].mean() < 0.7 * before[name].mean() for name in before)


def dense_loss(wrapped: WrappedModel, x: Tensor) -> Tensor:
    """The coding loss in plain PyTorch, of one linear layer with a projection."""
    (layer,), (coder,) = wrapped.layers.values(), wrapped.coders.values()
    y = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    r = y @ coder.projection.T  # type: ignore[union-attr]
    d2 = (r[:, None] - coder.codebook.centers).square().sum(2)
    d2_for_codes = (r.detach()[:, None] - coder.codebook.centers).square().sum(2)
    p = (-d2 / coder.temperature).softmax(1)
    best = d2.amin(1)
    length = -p.amax(1).log()
    entropy = -(p * p.log()).sum(1)
    is_unused = torch.bincount(d2.argmin(1), minlength=len(coder.codebook.centers)) == 0
    assert 0 < is_unused.sum() < len(is_unused)
    balance = (d2_for_codes - best.detach()[:, None]).amin(0)[is_unused].sum()
    s = length + entropy + best.log1p()
    loss: Tensor = s.mean() + 0.25 * best.mean() + 0.1 * balance
    return loss


@pytest.mark.parametrize("shape", [(6, 16), (16, 6)], ids=["widens", "narrows"])
def test_the_loss_and_its_gradients_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    wrapped = wrap(nn.Sequential(nn.Linear(*shape)), codes=4, coding_dim=3, temperature=0.7)
    wrapped.double()
    with torch.no_grad():
        wrapped.coders["0"].codebook.centers[3] += 3  # nobody's nearest
    x = torch.randn(30, shape[0], dtype=torch.float64)
    expected = dense_loss(wrapped, x)
    grads = torch.autograd.grad(expected, list(wrapped.coding_parameters()))
    wrapped(x)
    loss = wrapped.coding_loss()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, grad in zip(wrapped.coding_parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_the_row_that_each_code_is_closest_to_winning_is_found_in_any_slabs_and_under_an_offset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x, centers = torch.randn(50, 3), torch.randn(4, 3)
    d2 = torch.cdist(x.double(), centers.double()).square()
    expected = (d2 - d2.amin(1, keepdim=True) - torch.arange(50)[:, None]).argmin(0)
    least = d2.amin(1).float() + torch.arange(50)
    assert torch.equal(rows_to_win(x + 1024, centers + 1024, least), expected)
    monkeypatch.setattr("foreshock.surprise.assignment._ELEMENTS", 28)
    assert torch.equal(rows_to_win(x, centers, least), expected)


@pytest.mark.parametrize("name", ["assign_weight", "commit_weight", "balance_weight"])
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_weights_of_the_loss_are_checked(name: str, weight: float) -> None:
    wrapped = wrap(mlp())
    wrapped(rows())
    with pytest.raises(ValueError, match=f"{name} is {weight}"):
        wrapped.coding_loss(**{name: weight})
    with pytest.raises(ValueError, match="calls is empty"):
        coding_loss([])


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_a_codebook_starts_at_a_scale_of_one_over_the_root_of_its_width(init: str) -> None:
    before = torch.get_rng_state()
    codebook = Codebook(400, 64, init=init)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is not drawn from
    spread = {"normal": 1.0, "uniform": 3**-0.5}[init] / 8
    assert codebook.centers.std().item() == pytest.approx(spread, rel=0.02)
    assert not torch.equal(Codebook(4, 2, seed=1).centers, Codebook(4, 2, seed=2).centers)


def test_codes_start_on_the_means_of_a_loader() -> None:
    wrapped = wrap(mlp(), codes=8, coding_dim=4)
    before = wrapped.traces
    wrapped.initialise_codes([clusters(256), (clusters(256, seed=1), None)])
    assert wrapped.training
    assert before == wrapped.traces == ()
    assert usage(wrapped, clusters(seed=99)) == {"0": 1.0, "2": 1.0}
    again = wrap(mlp(), codes=8, coding_dim=4).initialise_codes([clusters(256), clusters(256, 1)])
    for mine, theirs in zip(wrapped.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("coding_dim", [None, 4])
def test_codes_on_means_are_as_far_from_features_as_the_temperature_says(
    coding_dim: int | None,
) -> None:
    wrapped = wrap(mlp(), codes=8, coding_dim=coding_dim, temperature=0.5)
    wrapped.initialise_codes([1e-3 * clusters(512)])
    copied = wrap(mlp(), codes=8, coding_dim=coding_dim)
    copied.load_state_dict(wrapped.state_dict())
    for model in (wrapped, copied):
        model(1e-3 * clusters(512))
        for trace in model.traces:
            expected = trace.reduced.shape[-1] * 0.5 / 2
            assert trace.soft_code.distance.mean().item() == pytest.approx(expected, rel=0.01)
    kept = usage(train_codes(wrapped, steps=50), 1e-3 * clusters(512))
    assert set(kept) == {"0", "2"}


def test_codes_on_the_means_of_convolutions_positions() -> None:
    wrapped = wrap(cnn(), "all_conv", codes=5, pooling="positions")
    wrapped.initialise_codes([images()], rows=50)
    assert usage(wrapped, images()) == {"0": 1.0, "2": 1.0}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, 2), r"features has shape \(3, 2\); accepted: \(N, 2\) with N from 4 up"),
        (torch.zeros(9, 3), r"features has shape \(9, 3\)"),
        (torch.full((9, 2), float("nan")), "features holds numbers that are not finite"),
    ],
)
def test_means_of_what_they_cannot_be_taken_of_are_refused(features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(4, 2).move_to_means(features)


def test_a_fixed_temperature_is_applied_to_every_layer() -> None:
    wrapped = wrap(mlp())
    assert FixedTemperature(0.25).apply(wrapped, 7) == 0.25
    assert {c.temperature for c in wrapped.coders.values()} == {0.25}
    wrapped(rows())
    cold = wrapped.traces[0].soft_code.entropy
    FixedTemperature(4.0).apply(wrapped, 8)
    wrapped(rows())
    assert (wrapped.traces[0].soft_code.entropy > cold).all()


def test_a_cosine_temperature_warms_up_falls_and_stays_and_is_applied() -> None:
    schedule = CosineTemperature(2.0, 0.5, total_steps=110, warmup_steps=10)
    assert [schedule.at(s) for s in (0, 5, 10)] == [2.0] * 3
    assert schedule.at(60) == pytest.approx(1.25)
    assert [schedule.at(s) for s in (110, 10**9)] == [0.5, 0.5]
    fall = [schedule.at(s) for s in range(10, 111)]
    assert fall == sorted(fall, reverse=True)
    wrapped = wrap(mlp())
    for step in (0, 60, 200):
        schedule.apply(wrapped, step)
        wrapped(rows())
        assert {t.meta.temperature for t in wrapped.traces} == {schedule.at(step)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedTemperature(0.0), "temperature is 0.0"),
        (lambda: CosineTemperature(1.0, -1.0, 10), "end is -1.0"),
        (lambda: CosineTemperature(float("inf"), 1.0, 10), "start is inf"),
        (lambda: CosineTemperature(1.0, 1.0, 10, 10), "total_steps is 10; accepted: more than"),
        (lambda: CosineTemperature(1.0, 1.0, 10, -1), "warmup_steps is -1"),
        (lambda: FixedTemperature().at(-1), "step is -1"),
        (lambda: wrap(mlp()).set_temperature(float("nan")), "temperature is nan"),
    ],
)
def test_bad_temperatures_are_refused_by_name(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_hard_running_means_do_not_send_unused_codes_to_the_origin() -> None:
    """Trap 31."""
    wrapped = wrap(mlp(), "0", codes=16)
    centers = wrapped.coders["0"].codebook.centers
    with torch.no_grad():
        centers[3:] += 1000  # nothing is ever near them
    start = centers.detach().clone()
    updater = EmaCodebookUpdater(wrapped, assignment="hard", dead_share=0.0)
    for step in range(30):
        wrapped(clusters(64, seed=step))
        assert updater.update() == ()
    assert torch.equal(centers[3:], start[3:])
    assert not torch.equal(centers[:3], start[:3])
    assert centers.isfinite().all()


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_running_means_are_the_means_of_what_is_assigned(assignment: str) -> None:
    wrapped = wrap(mlp(), "0", codes=4, coding_dim=3)
    updater = EmaCodebookUpdater(wrapped, decay=0.0, assignment=assignment)  # type: ignore[arg-type]
    wrapped(rows())
    (trace,) = wrapped.traces
    before = wrapped.coders["0"].codebook.centers.clone()
    d2 = torch.cdist(trace.reduced, before).square()
    weight = (-d2).softmax(1)
    if assignment == "hard":
        weight = torch.nn.functional.one_hot(d2.argmin(1), 4).float()
    updater.update()
    is_used = weight.sum(0) > 0
    expected = (weight.T @ trace.reduced) / weight.sum(0)[:, None]
    found = wrapped.coders["0"].codebook.centers
    torch.testing.assert_close(found[is_used], expected[is_used], atol=1e-5, rtol=1e-5)
    assert not found.requires_grad


def test_codes_that_died_are_reseeded_on_features_and_then_used() -> None:
    wrapped = wrap(mlp(), "0", codes=8)
    centers = wrapped.coders["0"].codebook.centers
    with torch.no_grad():
        centers[5:] += 1000
    updater = EmaCodebookUpdater(wrapped, assignment="hard", patience=4, decay=0.9)
    reseeded: set[int] = set()
    for step in range(24):
        wrapped(clusters(256, seed=step))
        for event in updater.update():
            assert event.layer == "0"
            reseeded |= set(event.codes)
    assert {5, 6, 7} <= reseeded
    assert usage(wrapped, clusters(seed=99))["0"] >= 0.75  # 5 / 8 without
    assert centers.abs().max() < 100


def test_rows_that_are_not_finite_do_not_reach_the_codes() -> None:
    wrapped = wrap(mlp(), "0", codes=4)
    updater = EmaCodebookUpdater(wrapped)
    x = rows()
    x[3] = float("nan")
    x[4] = float("inf")
    wrapped(x)
    updater.update()
    assert wrapped.coders["0"].codebook.centers.isfinite().all()


def test_an_updater_goes_on_where_another_was() -> None:
    def run(steps: range, wrapped: WrappedModel, updater: EmaCodebookUpdater) -> None:
        for step in steps:
            wrapped(clusters(64, seed=step))
            updater.update()

    whole = wrap(mlp(), "0", codes=8)
    updater = EmaCodebookUpdater(whole, patience=3)
    run(range(8), whole, updater)
    parted = copy.deepcopy(whole)
    other = EmaCodebookUpdater(parted, patience=3)
    other.load_state_dict(updater.state_dict())
    run(range(8, 16), whole, updater)
    run(range(8, 16), parted, other)
    pair = [m.coders["0"].codebook.centers for m in (whole, parted)]
    assert torch.equal(*pair)
    with pytest.raises(ValueError, match="state_dict is of layers"):
        EmaCodebookUpdater(wrap(mlp(), "2")).load_state_dict(updater.state_dict())


def test_bad_updaters_are_refused_by_name() -> None:
    wrapped = wrap(mlp())
    for options, message in (
        ({"decay": 1.0}, "decay is 1.0"),
        ({"dead_share": -0.1}, "dead_share is -0.1"),
        ({"assignment": "firm"}, "assignment is 'firm'"),
        ({"patience": 0}, "patience is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EmaCodebookUpdater(wrapped, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a Sequential"):
        EmaCodebookUpdater(mlp())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no layer has coded"):
        EmaCodebookUpdater(wrapped).update()
