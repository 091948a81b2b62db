"""Listening to a model: what it says, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from foreshock import surprise
from foreshock.ops import soft_assign
from tests.surprise.networks import data, fitted, mlp

# z of a layer from forwards of other batch sizes, whose products torch sums up in another order:
# measured 2e-5 at most.
BATCH_TOLERANCE = 2e-4


def saved_for_backward(run: nn.Module, x: Tensor) -> list[tuple[torch.Size, torch.dtype]]:
    kept: list[tuple[torch.Size, torch.dtype]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_outputs_and_gradients_are_bit_identical_while_watched(dtype: torch.dtype) -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(30, seed=1).to(dtype)
    model.to(dtype)
    plain = model(x)
    plain.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with probe.watch() as seen:
        watched = model(x)
    watched.square().sum().backward()
    assert watched.equal(plain)
    assert all(
        p.grad is not None and p.grad.equal(g)
        for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert len(seen.surprise().score) == 30
    assert not seen.surprise().score.requires_grad


def test_watching_keeps_nothing_for_a_backward_pass() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(30, seed=1)
    plain = saved_for_backward(model, x)
    with probe.watch():
        assert saved_for_backward(model, x) == plain
    assert saved_for_backward(lambda given: probe(given), x) == []  # type: ignore[arg-type]


def test_an_activation_in_place_does_not_change_what_is_heard() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(30, seed=1)
    expected = probe(x).score
    for place, part in enumerate(model):
        if isinstance(part, nn.ReLU):
            model[place] = nn.ReLU(inplace=True)
    assert probe(x).score.equal(expected)
    with probe.watch() as seen:
        model(x).sum().backward()
    assert seen.surprise().score.equal(expected)


class _Mixed(nn.Module):
    """Layers with positions, with others, without any, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.twice = nn.Linear(6, 8), nn.Linear(8, 8)
        self.pooled, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.twice(self.twice(self.tokens(x).relu()).relu())
        halves = self.pooled(tokens.unflatten(1, (2, -1)).mean(1))
        return self.head(halves.mean(1))  # type: ignore[no-any-return]


def test_layers_of_different_shapes_are_heard_as_each_alone() -> None:
    torch.manual_seed(0)
    model = _Mixed().eval()
    x = torch.randn(90, 4, 6)
    probe = surprise.fit(model, [torch.randn(300, 4, 6)], codes=4)
    given: dict[str, list[Tensor]] = {}
    for name in ("tokens", "twice", "pooled", "head"):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, __, output, name=name: given.setdefault(name, []).append(output)
        )
    seen = probe(x, components=True)
    plain = probe(x)
    assert [codes.name for codes in probe.codes] == [
        "tokens", "twice[0]", "twice[1]", "pooled", "head"
    ]  # fmt: skip
    for codes in probe.codes:
        call = 1 if codes.name.endswith("[1]") else 0
        (distance,) = codes.measure(given[codes.layer][call], has_codes=False)
        alone = distance.double().mean(1).float() if distance.dim() > 1 else distance
        for surprised in (seen, plain):
            torch.testing.assert_close(surprised.components[codes.name].distance, alone)
    assert seen.score.equal(plain.score)


def test_length_and_entropy_are_there_for_who_asks() -> None:
    probe, x = fitted(), data(30, seed=1)
    plain, asked = probe(x), probe(x, components=True)
    assert asked.score.equal(plain.score)
    with probe.watch(components=True) as seen, torch.no_grad():
        for part in x.split(10):
            probe.model.eval()(part)
    for name in ("0", "3", "5"):
        one, all_of_it = plain.components[name], asked.components[name]
        assert (one.length, one.entropy) == (None, None)
        assert one.distance.equal(all_of_it.distance)
        assert all_of_it.length is not None
        assert all_of_it.entropy is not None
        assert (all_of_it.length > -1e-9).all()
        joined = seen.surprise().components[name]
        assert joined.entropy is not None
        torch.testing.assert_close(joined.entropy, all_of_it.entropy, rtol=0.02, atol=0.02)
    with pytest.raises(KeyError):
        plain.components["4"]


def test_codes_that_are_written_to_are_heard_as_they_are() -> None:
    probe, x = fitted(), data(30, seed=1)
    before = probe(x).score
    saved = copy.deepcopy(probe.state_dict())
    probe.codes[1].centers.mul_(3)
    assert not probe(x).score.equal(before)
    probe.scale[1, 2].mul_(2)
    probe.load_state_dict(saved)
    assert probe(x).score.equal(before)


def test_no_hook_is_left_when_nobody_watches() -> None:
    model = mlp().eval()
    probe = fitted(model)
    hooks = [m._forward_hooks for m in model.modules()]

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    probe(data(3))
    assert count() == 0
    with probe.watch():
        assert count() == 4
        with probe.watch():
            assert count() == 8
    assert count() == 0
    with pytest.raises(RuntimeError), probe.watch():
        model(torch.randn(2, 17))
    assert count() == 0
    assert [m._forward_hooks for m in model.modules()] == hooks


def test_trap_28_a_probe_is_a_module_of_buffers_that_can_be_moved_and_copied() -> None:
    model = mlp().eval()
    before = [name for name, _ in model.named_parameters()]
    probe, x = fitted(model), data(20, seed=6)
    assert isinstance(probe, nn.Module)
    assert list(probe.parameters()) == []
    assert len(list(probe.buffers())) == 3 * 3 + 1
    assert [name for name, _ in model.named_parameters()] == before
    assert not list(model.buffers())
    expected = probe(x).score
    twin = copy.deepcopy(probe)
    assert twin.model is not probe.model
    assert twin(x).score.equal(expected)
    with torch.no_grad():
        for p in twin.model.parameters():
            p.zero_()
    assert probe(x).score.equal(expected)
    assert probe.half().double()(x).score.equal(expected)  # codes keep their digits
    assert all(b.device.type == "meta" for b in probe.to("meta").buffers())
    with pytest.raises(ValueError, match=r"layer '0' .* accepted: 24 on meta.*probe\.to"):
        probe(x)


def test_a_watched_forward_says_what_the_probe_says() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(40, seed=2)
    with probe.watch() as seen, torch.no_grad():
        model(x)
    whole = probe(x)
    assert seen.surprise().score.equal(whole.score)
    assert seen.surprise().is_ood.equal(whole.is_ood)


def test_every_forward_of_a_watch_brings_its_samples_in_order() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(40, seed=2)
    with probe.watch() as seen, torch.no_grad():
        for part in x.split(16):
            model(part)
    assert len(seen.surprise()) == 40
    torch.testing.assert_close(seen.surprise().score, probe(x).score, rtol=0, atol=BATCH_TOLERANCE)


def test_parts_of_the_model_may_run_without_the_model() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(40, seed=2)
    with probe.watch() as seen, torch.no_grad():
        model[5](model[3:5](model[0:3](x)))
    assert seen.surprise().score.equal(probe(x).score)
    with probe.watch() as seen, torch.no_grad():
        model[0](x)
        model[0](x)
    with pytest.raises(ValueError, match="'0' was called more than 1 times"):
        seen.surprise()
    with probe.watch() as seen, torch.no_grad():
        model[0](x)
    with pytest.raises(ValueError, match="'3' was called 0 times"):
        seen.surprise()
    with probe.watch() as seen:
        pass
    with pytest.raises(RuntimeError, match="no layer was called"):
        seen.surprise()


def test_what_cannot_be_judged_does_not_break_the_forward() -> None:
    model = mlp().eval()
    probe = fitted(model)
    model[5] = nn.Linear(24, 9)
    probe._watched[1]["5"] = model[5]
    with probe.watch() as seen:
        assert model(data(6)).shape == (6, 9)
    with pytest.raises(ValueError, match=r"layer '5' gives 9 features .* accepted: 4"):
        seen.surprise()


@pytest.mark.parametrize("size", [1, 7, 64])
def test_trap_26_a_sample_is_judged_alike_in_every_batch(size: int) -> None:
    """The forward may differ in its last bits between batch sizes; nothing else may."""
    probe, x = fitted(), data(200, seed=8)
    whole = probe(x)
    parts = [probe(part) for part in x.split(size)]
    score = torch.cat([part.score for part in parts])
    torch.testing.assert_close(score, whole.score, rtol=0, atol=BATCH_TOLERANCE)
    threshold = probe.calibrator.threshold()
    is_clear = (whole.score - threshold).abs() > BATCH_TOLERANCE
    assert is_clear.float().mean() > 0.95
    is_ood = torch.cat([part.is_ood for part in parts])
    assert is_ood[is_clear].equal(whole.is_ood[is_clear])
    z, centers = torch.randn(200, 24) * 3, probe.codes[1].centers
    codes = [soft_assign(part, centers, temperature=2.0) for part in z.split(size)]
    for field in ("distance", "length", "entropy"):
        alone = torch.cat([getattr(code, field) for code in codes])
        assert alone.equal(getattr(soft_assign(z, centers, temperature=2.0), field))


def test_false_alarms_stay_within_the_binomial_band_at_every_batch_size() -> None:
    probe = fitted(calibration=data(20_000, seed=21).split(5000))
    x, alpha = data(1500, seed=22), 0.05
    band = 1.96 * math.sqrt(alpha * (1 - alpha) / len(x))
    for size in (1, 7, 64, len(x)):
        with probe.watch() as seen, torch.no_grad():
            for part in x.split(size):
                probe.model(part)
        assert abs(seen.surprise().is_ood.double().mean() - alpha) < band


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_trap_27_what_is_not_finite_is_nan_and_out_of_distribution(bad: float) -> None:
    probe, x = fitted(), data(9, seed=3)
    good = probe(x)
    x[4, 2] = bad
    seen = probe(x)
    is_bad = torch.arange(9) == 4
    assert seen.score.isnan().equal(is_bad)
    assert seen.is_ood[4]
    assert seen.percentile[4] == 1
    assert seen.is_ood[~is_bad].equal(good.is_ood[~is_bad])
    assert seen.score[~is_bad].equal(good.score[~is_bad])


def test_a_batch_without_samples_has_no_scores() -> None:
    seen = fitted()(data(0))
    assert seen.score.shape == seen.is_ood.shape == seen.percentile.shape == (0,)


def test_autocast_does_not_reach_the_codes() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(50, seed=5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with probe.watch() as seen:
            model(x)
        rows = torch.randn(50, 24)
        (cast,) = probe.codes[0].measure(rows, has_codes=False)
    assert cast.equal(*probe.codes[0].measure(rows, has_codes=False))
    assert (seen.surprise().score - probe(x).score).abs().median() < 0.2


def test_training_goes_on_while_watched() -> None:
    model = mlp()
    probe = fitted(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with probe.watch() as seen:
        for part in data(60, seed=1).split(20):
            optimizer.zero_grad()
            model(part).square().mean().backward()
            optimizer.step()
    assert len(seen.surprise()) == 60


def test_a_compiled_model_is_listened_to_where_it_was_not_compiled() -> None:
    model = mlp().eval()
    compiled = torch.compile(model, backend="eager")
    probe, expected = fitted(compiled), fitted(model)
    x = data(20, seed=4)
    assert [one.name for one in probe.codes] == ["0", "3", "5"]
    assert probe(x).score.equal(expected(x).score)


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_the_encoder_of_torch_is_listened_to_with_its_padding_mask() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(16, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.encoder(inputs, src_key_padding_mask=inputs[:, :, 0] == 0)
            result: Tensor = self.head(hidden.mean(1))
            return result

    x = torch.randn(400, 6, 16)
    x[torch.arange(6) >= torch.randint(2, 7, (400, 1))] = 0
    model = Encoder().eval()
    probe = surprise.fit(model, x.split(50), codes=8, mask=lambda batch: batch[:, :, 0] != 0)
    assert len(probe.codes) == 5
    seen = probe(x[:9], x[:9, :, 0] != 0)
    alone = [probe(x[i : i + 1], x[i : i + 1, :, 0] != 0).score for i in range(9)]
    torch.testing.assert_close(torch.cat(alone), seen.score, rtol=1e-3, atol=1e-3)


def test_a_saved_probe_comes_back_bit_for_bit(tmp_path: Path) -> None:
    weights = {"0": 1.0, "3": 2.0, "5": 0.5}
    model, path = mlp().eval(), tmp_path / "runs" / "probe.safetensors"
    probe = fitted(model, aggregation="weighted", weights=weights, alpha=0.1)
    probe.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["probe.safetensors"]
    loaded, x = surprise.SurpriseProbe.load(path, model), data(50, seed=13)
    before, after = probe(x), loaded(x)
    assert after.score.equal(before.score)
    assert after.percentile.equal(before.percentile)
    assert after.is_ood.equal(before.is_ood)
    assert loaded.samples == probe.samples
    assert loaded.reading == probe.reading
    assert loaded.calibrator.quantiles == (0.9,)


def test_a_probe_is_refused_by_a_model_that_has_other_layers(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    fitted().save(path)
    with pytest.raises(ValueError, match=r"no layers \['3', '5'\]; accepted: .*'0', '3', '5'"):
        surprise.SurpriseProbe.load(path, nn.Sequential(nn.Linear(16, 24)))
    other = mlp()
    other[3] = nn.Linear(24, 25)
    with pytest.raises(ValueError, match="layer '3' of the model gives 25 features; accepted: 24"):
        surprise.SurpriseProbe.load(path, other)


def test_a_damaged_file_is_refused_and_a_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    path, probe = tmp_path / "probe.safetensors", fitted()
    probe.save(path)
    whole = path.read_bytes()
    named = safetensors.torch.load(whole)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    settings = json.loads(header["foreshock"])

    def saved(tensors: dict[str, Tensor], **changed: object) -> bytes:
        return safetensors.torch.save(tensors, {"foreshock": json.dumps({**settings, **changed})})

    without = {name: t for name, t in named.items() if name != "1.centers"}
    damaged = [
        b"",
        whole[:100],
        whole[:-1],
        safetensors.torch.save(named),
        saved(without),
        saved(named, version=99),
        saved(named, layers=settings["layers"][:2]),
        saved(named, calibrator={}),
        saved(named, reading={"aggregation": "median"}),
        saved(named, reading=None),
    ]
    for contents in damaged:
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"no probe|says it is"):
            surprise.SurpriseProbe.load(path, mlp())
    probe.save(path)
    assert path.read_bytes() == whole
    probe.samples["fit"] = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        probe.save(path)
    assert path.read_bytes() == whole
