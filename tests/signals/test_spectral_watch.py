"""A model's weights, looked at while it is trained."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreshock.signals import RiskLevel, SpectralWatch
from tests.signals.trackers import same


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 2).requires_grad_(False)
        self.norm = nn.LayerNorm(5)


def watch_of(model: nn.Module, decay: float = 0.1, **options: Any) -> SpectralWatch:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=decay)
    return SpectralWatch(dict(model.named_parameters()), optimizer, **options)


def move(model: nn.Module, size: float = 0.01, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator)


MATRICES = ("embedding.weight", "convolution.weight", "body.weight")


def test_every_trained_matrix_is_watched_and_the_others_are_named() -> None:
    watch = watch_of(Net())
    assert watch.names == MATRICES
    assert watch.passed_over == {"head.weight": "not trained"}


def test_what_cannot_be_read_is_passed_over_with_the_reason() -> None:
    parameters: dict[str, Tensor] = {
        "complex": nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)),
        "lazy": nn.parameter.UninitializedParameter(),
        "good": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)),
    }
    watch = SpectralWatch(parameters, torch.optim.SGD([parameters["good"]], lr=0.1))
    assert watch.names == ("good",)
    assert watch.passed_over["lazy"] == "not initialised yet"
    assert "complex64" in watch.passed_over["complex"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"include": ["*.weight"], "exclude": ["emb*"]}, MATRICES[1:]),
        ({"include": ["body.*", "conv*"]}, MATRICES[1:]),
        ({"exclude": ["*"]}, ()),
    ],
)
def test_patterns_choose_the_matrices(options: Any, names: tuple[str, ...]) -> None:
    watch = watch_of(Net(), **options)
    assert watch.names == names
    assert watch.is_due(0) == bool(names)


def test_a_pattern_that_fits_nothing_is_an_error_with_the_nearest_name() -> None:
    """Trap 29."""
    with pytest.raises(ValueError, match=r"include has 'bdy\.\*', .* nearest name is 'body\."):
        watch_of(Net(), include=["bdy.*"])
    with pytest.raises(ValueError, match=r"exclude has 'heads'"):
        watch_of(Net(), exclude=["heads"])


def test_a_model_without_matrices_is_never_due() -> None:
    assert not watch_of(nn.LayerNorm(4)).is_due(0)


def test_what_is_seen_is_what_the_singular_values_say() -> None:
    torch.manual_seed(0)
    model = Net()
    seen = watch_of(model).observe(0, is_stepped=False)
    kappas = {}
    for name in MATRICES:
        W = model.get_parameter(name).detach().flatten(1).double()
        sigma, frobenius = torch.linalg.matrix_norm(W, 2), W.norm()
        kappas[name] = (sigma / (frobenius / (10 * math.sqrt(min(W.shape))) + 1e-8)).item()
    assert seen.reading.kappa == pytest.approx(max(kappas.values()), rel=1e-3)
    assert {m.name: m.kappa for m in seen.reading.worst} == pytest.approx(kappas, rel=1e-3)


def test_the_muon_ratio_is_that_of_the_matrix_that_fills_its_room_most() -> None:
    model = Net()
    with torch.no_grad():
        model.body.weight *= 100
    seen = watch_of(model, decay=0.25).observe(0, is_stepped=False)
    sigma = torch.linalg.matrix_norm(model.body.weight, 2).item()
    assert seen.muon_ratio == pytest.approx(0.25 * sigma, rel=1e-3)
    assert seen.muon_ratio_matrix == "body.weight"
    without = watch_of(model, decay=0.0).observe(0, is_stepped=False)
    assert without.muon_ratio is without.muon_ratio_matrix is None


def test_second_moments_are_looked_at_every_fifty_steps_where_there_are_some() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.5))
    watch = SpectralWatch(dict(model.named_parameters()), optimizer, interval=10)
    assert watch.observe(0, is_stepped=False).second_moment_rms is None  # no moments yet
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert watch.observe(10, is_stepped=True).second_moment_rms is None
    assert watch.observe(50, is_stepped=True).second_moment_rms == pytest.approx(1, rel=1e-5)
    assert watch.observe(51, is_stepped=True).second_moment_rms is None
    sgd = SpectralWatch(dict(model.named_parameters()), torch.optim.SGD(model.parameters(), 0.1))
    assert sgd.observe(0, is_stepped=False).second_moment_rms is None


def test_it_is_due_at_the_interval_and_while_it_is_restless_at_every_step() -> None:
    model = Net()
    watch = watch_of(model, interval=10)
    seen = []
    for step in range(100):
        if step in (42, 43, 44):
            move(model, 0.3, seed=step)
        if watch.is_due(step):
            watch.observe(step, is_stepped=False)
            seen.append(step)
            assert not watch.is_due(step)
    calm, restless, late = range(0, 51, 10), range(51, 100), seen[-3:]
    assert [s for s in seen if s <= 50] == list(calm)
    assert set(seen) > set(restless[:10])
    assert late[0] < 97 or watch.is_restless


def test_far_moved_weights_are_read_more_often_but_never_more_than_once_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Net()
    watch = watch_of(model, interval=1)
    passes: list[int] = []
    (_, iterator), *none = watch._iterators
    call = iterator._pass
    monkeypatch.setattr(iterator, "_pass", lambda: (passes.append(1), call())[1])
    for step, expected in ((0, 14), (1, 1), (3, 2), (9, 6), (19, 10), (69, 14), (70, 1)):
        passes.clear()
        watch.observe(step, is_stepped=False)
        assert len(passes) == expected, step
    assert not none


def test_a_nan_in_a_weight_is_told_and_forgotten() -> None:
    model = Net()
    watch = watch_of(model, interval=1)
    for step in range(8):
        with torch.no_grad():
            kept = model.body.weight[0, 0].item()
            model.body.weight[0, 0] = math.nan if step == 4 else kept
            reading = watch.observe(step, is_stepped=False).reading
            model.body.weight[0, 0] = kept
        assert reading.nonfinite == (("body.weight",) if step == 4 else ())
    assert reading.level is RiskLevel.STABLE
    assert reading.slope == pytest.approx(0, abs=1e-4)


def test_a_restored_watch_goes_on_bit_for_bit() -> None:
    model = Net()
    watch, other = watch_of(model, interval=3), watch_of(model, interval=3)
    for step in range(0, 12, 3):
        move(model, seed=step)
        watch.observe(step, is_stepped=False)
    saved = watch.state_dict()
    other.load_state_dict(saved)
    for step in range(12, 24, 3):
        move(model, seed=step)
        ours, theirs = (w.observe(step, is_stepped=False) for w in (watch, other))
        assert same(ours.reading, theirs.reading)
        assert ours.muon_ratio == theirs.muon_ratio
    watch.load_state_dict(saved)
    assert watch.is_due(12)


def test_directions_of_another_memory_layout_are_started_anew() -> None:
    model = Net()
    watch = watch_of(model)
    watch.observe(0, is_stepped=False)
    saved = watch.state_dict()
    model.to(memory_format=torch.channels_last)
    watch.observe(50, is_stepped=False)
    watch.load_state_dict(saved)
    seen = watch.observe(50, is_stepped=False)
    W = model.convolution.weight.detach().flatten(1)
    sigma = next(m.sigma_max for m in seen.reading.worst if m.name == "convolution.weight")
    assert sigma == pytest.approx(torch.linalg.matrix_norm(W, 2).item(), rel=1e-3)


def test_the_state_of_other_matrices_is_refused() -> None:
    watch = watch_of(Net())
    with pytest.raises(ValueError, match="names"):
        watch.load_state_dict(watch_of(nn.Linear(3, 3)).state_dict())
