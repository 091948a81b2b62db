"""A wrapped model is the model, with codes beside it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foreshock as fs
from foreshock.surprise import WrappedModel, wrap
from foreshock.surprise.coding import CodingConv2d, CodingLinear
from tests.surprise.wrapped_models import Twice, cnn, encoder, images, mlp, rows, sequences

CASES: list[Any] = [
    pytest.param(mlp, rows, "all_linear", id="mlp"),
    pytest.param(cnn, images, ["all_conv", "all_linear"], id="cnn"),
    pytest.param(encoder, sequences, "all_linear", id="encoder"),
]

Build = Callable[[], nn.Module]
Draw = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def _no_fast_path() -> Any:
    """The one kernel of PyTorch's encoder rounds otherwise than its layers one by one."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("coding_dim", [None, 3])
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("build", "draw", "layers"), CASES)
def test_the_visible_output_is_the_plain_model_s_bit_for_bit(
    build: Build, draw: Draw, layers: Any, is_training: bool, coding_dim: int | None
) -> None:
    plain, x = build().train(is_training), draw()
    wrapped = wrap(copy.deepcopy(plain), layers, codes=5, coding_dim=coding_dim)
    assert torch.equal(wrapped(x), plain(x))
    assert len(wrapped.traces) == len(wrapped.layers)
    with torch.no_grad():
        assert torch.equal(wrapped(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("coding_dim", [None, 3])
@pytest.mark.parametrize(("build", "draw", "layers"), CASES)
def test_codes_are_the_same_whether_a_gradient_is_needed_or_not(
    build: Build, draw: Draw, layers: Any, coding_dim: int | None, dtype: torch.dtype
) -> None:
    wrapped = wrap(build().to(dtype), layers, codes=5, coding_dim=coding_dim).eval()
    x = draw().to(dtype)

    def traces() -> list[tuple[Tensor, ...]]:
        found = [(t.reduced, *vars(t.soft_code).values()) for t in wrapped.traces]
        return [tuple(part for part in parts if part is not None) for parts in found]

    wrapped(x)
    trained = traces()
    with torch.no_grad():
        wrapped(x)
    for one, other in zip(trained, traces(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_codes_are_those_of_the_parameters_as_they_are() -> None:
    wrapped, x = wrap(mlp(), codes=5, coding_dim=3), rows(20)

    def surprise() -> Tensor:
        with torch.no_grad():
            wrapped(x)
        return torch.stack(list(wrapped.layer_surprise().values()))

    before = surprise()
    coder = wrapped.coders["0"]
    with torch.no_grad():
        coder.codebook.centers.mul_(2)
    changed = surprise()
    assert not changed[0].equal(before[0])
    assert changed[1].equal(before[1])
    coder.codebook.centers.data.div_(2)
    assert surprise().equal(before)
    assert coder.projection is not None
    coder.projection.data = 2 * coder.projection.data
    assert not surprise()[0].equal(before[0])
    coder.projection.data.div_(2)
    wrapped.set_temperature(0.3)
    assert not surprise().equal(before)
    wrapped.set_temperature(1.0)
    assert surprise().equal(before)
    assert wrapped.double() is wrapped
    x = x.double()
    torch.testing.assert_close(surprise(), before.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("build", "draw", "layers"), CASES)
def test_the_coding_loss_leaves_the_model_s_own_gradients_alone(
    build: Build, draw: Draw, layers: Any
) -> None:
    plain, x = build(), draw()
    wrapped = wrap(copy.deepcopy(plain), layers, codes=5, coding_dim=3)
    plain(x).square().mean().backward()
    (wrapped(x).square().mean() + wrapped.coding_loss()).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(wrapped.module.get_parameter(name).grad, parameter.grad), name  # type: ignore[arg-type]
    assert all(p.grad is not None and p.grad.any() for p in wrapped.coding_parameters())


@pytest.mark.parametrize("coding_dim", [None, 3])
@pytest.mark.parametrize("pooling", ["mean", "max", "positions"])
def test_undetached_the_coding_loss_shapes_the_network(
    pooling: Any, coding_dim: int | None
) -> None:
    wrapped = wrap(
        cnn(), ["all_conv", "all_linear"], coding_dim=coding_dim, pooling=pooling, detach=False
    )
    wrapped(images())
    wrapped.coding_loss().backward()
    assert all(p.grad is not None for p in wrapped.module.parameters())


@pytest.mark.parametrize(
    ("pooling", "shape"), [("mean", (10,)), ("max", (10,)), ("positions", (10, 8, 8))]
)
@pytest.mark.parametrize("coding_dim", [None, 3])
def test_a_convolution_is_coded_as_pooling_says(
    pooling: Any, shape: tuple[int, ...], coding_dim: int | None
) -> None:
    model, x = cnn(), images()
    y = model[0](x).detach()
    wrapped = wrap(model, "first_conv", coding_dim=coding_dim, pooling=pooling)
    wrapped(x)
    (trace,) = wrapped.traces
    pooled = {"mean": y.mean((2, 3)), "max": y.amax((2, 3)), "positions": y.permute(0, 2, 3, 1)}
    projection = wrapped.coders["0"].projection
    expected = pooled[pooling] if projection is None else pooled[pooling] @ projection.T
    torch.testing.assert_close(trace.reduced, expected)
    assert trace.soft_code.surprise.shape == trace.soft_code.best_index.shape == shape
    assert trace.reduced.shape[:-1] == shape


def test_a_trace_is_soft_assign_of_the_layer_s_output() -> None:
    model, x = mlp(), rows()
    y = model[0](x).detach()
    wrapped = wrap(model, "0", codes=4, temperature=0.7, beta_length=2.0, beta_distance=0.5)
    wrapped(x)
    (trace,) = wrapped.traces
    expected = fs.ops.soft_assign(
        y,
        wrapped.coders["0"].codebook.centers.detach(),
        temperature=0.7,
        beta_length=2.0,
        beta_distance=0.5,
    )
    assert torch.equal(trace.reduced, y)  # although an in-place activation came after
    for field in ("best_index", "distance", "length", "entropy", "surprise"):
        assert torch.equal(getattr(trace.soft_code, field), getattr(expected, field)), field
    assert trace.meta.temperature == 0.7


def test_far_inputs_are_more_surprising_than_those_at_a_center() -> None:
    wrapped = wrap(mlp(), "0", codes=4)
    x = rows()
    wrapped(x)
    near = wrapped.layer_surprise()["0"]
    wrapped(1000 * x)
    assert (wrapped.layer_surprise()["0"] > near.max()).all()


def test_attributes_of_a_wrapped_layer_keep_working() -> None:
    model = cnn()
    conv, linear = model[0], model[4]
    weight = conv.weight
    wrapped = wrap(model, ["all_conv", "all_linear"])
    assert model[0] is conv
    assert isinstance(conv, CodingConv2d)
    assert isinstance(linear, CodingLinear)
    assert conv.weight is weight
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (2, 6, (3, 3))
    assert (linear.in_features, linear.out_features) == (36, 3)
    assert linear.bias is not None
    assert set(cnn().state_dict()) < set(wrapped.module.state_dict())


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("has_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # the plain one
def test_a_transformer_encoder_survives_in_train_and_eval(
    is_training: bool, batch_first: bool, has_mask: bool
) -> None:
    """Trap 32: its fast path reads the weights of layers that never run."""
    torch.backends.mha.set_fastpath_enabled(True)
    plain = encoder(batch_first).train(is_training)
    wrapped = wrap(copy.deepcopy(plain), batch_dim=0 if batch_first else 1).train(is_training)
    x = sequences() if batch_first else sequences().transpose(0, 1)
    mask = torch.arange(7)[None] >= torch.tensor([7, 5, 3, 7, 2])[:, None] if has_mask else None
    with torch.no_grad():
        found = wrapped(x, src_key_padding_mask=mask)
        expected = plain(x, src_key_padding_mask=mask)
    is_kept = ~mask if mask is not None else torch.ones(5, 7, dtype=torch.bool)
    is_kept = is_kept if batch_first else is_kept.T
    torch.testing.assert_close(found[is_kept], expected[is_kept], atol=1e-5, rtol=1e-5)
    names = [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert list(wrapped.layer_surprise()) == names
    assert all(s.shape == (5,) for s in wrapped.layer_surprise().values())


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_multihead_attention_survives_in_train_and_eval(is_training: bool) -> None:
    """Trap 32."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    torch.backends.mha.set_fastpath_enabled(True)
    plain = Attention().train(is_training)
    wrapped = wrap(copy.deepcopy(plain)).train(is_training)
    with torch.no_grad():
        assert torch.equal(wrapped(sequences()), plain(sequences()))
    assert list(wrapped.layer_surprise()) == ["out"]


def test_a_layer_called_twice_under_two_names_keeps_every_call_s_trace() -> None:
    wrapped = wrap(Twice(), coding_dim=3)
    wrapped(rows())
    assert [(t.meta.layer, t.meta.call) for t in wrapped.traces] == [("layer", 0), ("layer", 1)]
    assert list(wrapped.layer_surprise()) == ["layer", "layer#2"]
    wrapped.coding_loss().backward()
    wrapped(rows())
    assert len(wrapped.traces) == 2  # of the last forward pass only


def test_wrapping_twice_is_an_error() -> None:
    model = mlp()
    wrapped = wrap(model, "0")
    for again in (wrapped, model, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="wrapped already"):
            wrap(again, "all_linear")


def test_a_layer_whose_forward_is_replaced_is_refused() -> None:
    model = mlp()
    model[2].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="'2' has its forward replaced"):
        wrap(model)
    assert type(model[0]) is nn.Linear  # nothing was changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": 0}, "codes is 0; accepted: from 1 up"),
        ({"coding_dim": 0}, "coding_dim is 0"),
        ({"pooling": "sum"}, "pooling is 'sum'; accepted: 'mean', 'max', 'positions'"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"beta_length": float("inf")}, "beta_length is inf"),
        ({"init": "zeros"}, "init is 'zeros'; accepted: 'normal', 'uniform'"),
        ({"layers": "al_linear"}, "'al_linear' is no shortcut"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name_and_change_nothing(
    options: dict[str, Any], message: str
) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        wrap(model, **options)
    assert type(model[0]) is nn.Linear


def test_copies_do_not_share_the_projection() -> None:
    """Trap 28."""
    wrapped = wrap(mlp(), coding_dim=3)
    x = rows()
    wrapped(x)  # notes in a graph do not stand in the way of a copy
    copied = copy.deepcopy(wrapped)
    assert isinstance(copied, WrappedModel)
    mine = {p.data_ptr() for p in wrapped.parameters()}
    assert not mine & {p.data_ptr() for p in copied.parameters()}
    with torch.no_grad():
        for parameter in copied.coding_parameters():
            parameter.add_(1)
    copied.set_temperature(3.0)
    with copied.bypass():
        wrapped(x)
    assert len(wrapped.traces) == 2
    assert len(copied.traces) == 0
    before = wrapped.layer_surprise()["0"]
    copied(x)
    assert not torch.equal(copied.layer_surprise()["0"], before)
    assert wrapped.coders["0"].temperature == 1.0


def test_a_wrapped_model_is_a_module_that_moves_and_counts_its_parameters() -> None:
    """Trap 28."""
    model = mlp()
    own = sum(p.numel() for p in model.parameters())
    wrapped = wrap(model, codes=4, coding_dim=3)
    added = sum(p.numel() for p in wrapped.coding_parameters())
    assert added == 2 * 4 * 3 + 3 * (16 + 3)
    assert sum(p.numel() for p in wrapped.parameters()) == own + added
    wrapped.double()
    wrapped(rows().double())
    assert wrapped.traces[0].soft_code.distance.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_new_parameters_take_the_layer_s_dtype_and_codes_are_wide(dtype: torch.dtype) -> None:
    wrapped = wrap(mlp().to(dtype), codes=4, coding_dim=3)
    assert {p.dtype for p in wrapped.parameters()} == {dtype}
    x = rows().to(dtype)
    y = wrapped(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.soft_code.distance.dtype for t in wrapped.traces} == {wide}
    (y.float().mean() + wrapped.coding_loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wrapped.parameters())


def test_under_autocast_codes_are_still_wide() -> None:
    wrapped = wrap(mlp(), codes=4, coding_dim=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = wrapped(rows())
        assert y.dtype == torch.bfloat16
        assert wrapped.traces[0].soft_code.distance.dtype == torch.float32
        loss = wrapped.coding_loss()
    (loss + y.float().mean()).backward()
    assert all(p.grad is not None for p in wrapped.parameters())


def test_the_state_dict_has_temperatures_and_betas_and_the_calibration() -> None:
    wrapped = wrap(mlp(), codes=4, coding_dim=3, beta_entropy=0.3)
    wrapped.set_temperature(0.37)
    wrapped.coders["2"].beta_length = -2.0
    wrapped.calibrate([rows(120)])
    saved = pickle.loads(pickle.dumps(wrapped.state_dict()))
    assert all(isinstance(value, Tensor) for value in saved.values())
    fresh = wrap(mlp(), codes=4, coding_dim=3, seed=5)
    assert not torch.equal(fresh.coders["0"].codebook.centers, wrapped.coders["0"].codebook.centers)
    fresh.load_state_dict(saved)
    coder = fresh.coders["2"]
    assert (coder.temperature, coder.beta_entropy, coder.beta_length) == (0.37, 0.3, -2.0)
    for model in (wrapped.eval(), fresh.eval()):
        model(rows(9, seed=3))
    mine, theirs = wrapped.surprise(), fresh.surprise()
    assert torch.equal(mine.score, theirs.score)
    assert torch.equal(mine.is_ood, theirs.is_ood)


def test_the_plain_model_s_checkpoint_loads_into_the_wrapped_one() -> None:
    wrapped = wrap(mlp())
    left_out = wrapped.module.load_state_dict(mlp().state_dict(), strict=False)
    assert not left_out.unexpected_keys
    assert all(".coding." in key for key in left_out.missing_keys)


def test_unwrapping_gives_the_model_back() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    plain = encoder().eval()
    keys = list(plain.state_dict())
    with torch.no_grad():
        before = plain(sequences())
        unwrapped = wrap(plain).unwrap()
        assert unwrapped is plain
        assert list(plain.state_dict()) == keys
        assert type(plain.layers[0].linear1) is nn.Linear
        assert plain.use_nested_tensor
        assert torch.equal(plain(sequences()), before)  # by the one kernel again
    assert wrap(plain).layers


def test_coding_is_disabled_enabled_and_bypassed_in_nests() -> None:
    wrapped, x = wrap(mlp()), rows()

    def count() -> int:
        wrapped(x)
        return len(wrapped.traces)

    assert count() == 2
    wrapped.disable_coding()
    assert len(wrapped.traces) == 0
    assert count() == 0
    with pytest.raises(RuntimeError, match="disabled or bypassed"):
        wrapped.forward_with_trace(x)
    wrapped.enable_coding()
    with wrapped.bypass():
        with wrapped.bypass():
            assert count() == 0
        assert count() == 0
    assert count() == 2


def test_traces_are_detached_and_released_unless_asked_for() -> None:
    wrapped, x = wrap(mlp(), coding_dim=3), rows()
    wrapped(x)
    assert not any(t.soft_code.surprise.requires_grad or t.reduced.requires_grad
                   for t in wrapped.traces)  # fmt: skip
    output, traces = wrapped.forward_with_trace(x)
    assert output.requires_grad
    assert len(traces) == 2
    assert not any(t.soft_code.surprise.requires_grad for t in traces)
    assert not wrapped.traces
    _, traces = wrapped.forward_with_trace(x, attached=True)
    torch.stack([t.soft_code.surprise.mean() for t in traces]).sum().backward()
    assert wrapped.coders["0"].projection.grad is not None  # type: ignore[union-attr]
    wrapped(x)
    wrapped.release()
    with pytest.raises(RuntimeError, match="no layer has coded anything"):
        wrapped.surprise()
    with pytest.raises(RuntimeError, match="no layer has coded anything"):
        wrapped.coding_loss()


def test_after_the_coding_loss_its_graph_is_the_loss_s_alone() -> None:
    wrapped = wrap(mlp(), coding_dim=3)
    wrapped(rows())
    loss = wrapped.coding_loss()
    assert loss.requires_grad
    assert not any(c.length.requires_grad for c in wrapped._recording.calls)
    assert wrapped.layer_surprise()["0"].shape == (40,)


def test_the_inner_model_on_its_own_notes_nothing() -> None:
    wrapped = wrap(mlp())
    for _ in range(3):
        wrapped.module(rows())
    assert not wrapped.traces


def test_a_failing_forward_leaves_coding_in_order() -> None:
    wrapped = wrap(mlp())
    with pytest.raises(RuntimeError):
        wrapped(torch.zeros(2, 5))
    wrapped.module(rows())
    assert not wrapped.traces
    wrapped(rows())
    assert len(wrapped.traces) == 2


def test_checkpointed_blocks_are_coded_once() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    wrapped = wrap(Checkpointed(), coding_dim=3)
    plain = wrap(mlp(), coding_dim=3)
    for model in (wrapped, plain):
        (model(rows()).square().mean() + model.coding_loss()).backward()
        assert len(model.traces) == 2
    pairs = zip(wrapped.parameters(), plain.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"  # the compiler does
)
@pytest.mark.parametrize(("build", "draw", "layers"), CASES)
def test_it_compiles_without_a_break_and_codes_the_same(
    build: Build, draw: Draw, layers: Any
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    wrapped, x = wrap(build(), layers, codes=5, coding_dim=3), draw()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(wrapped, fullgraph=True, backend=counter)
    for step in range(4):
        wrapped.set_temperature(0.5 + 0.1 * step)  # a schedule is not compiled step by step
        assert torch.equal(compiled(x), wrapped.module(x))
        wrapped.zero_grad()
        loss = wrapped.coding_loss()
        loss.backward()
        grads = [p.grad.clone() for p in wrapped.coding_parameters() if p.grad is not None]
        found = wrapped.layer_surprise()
        wrapped.zero_grad()
        wrapped(x)
        for name, expected in wrapped.layer_surprise().items():
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
        wrapped.coding_loss().backward()
        for grad, p in zip(grads, wrapped.coding_parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 2


def test_calibration_ranks_samples_and_flags_what_is_strange() -> None:
    wrapped = wrap(mlp(), coding_dim=3)
    wrapped(rows())
    with pytest.raises(RuntimeError, match="not calibrated"):
        wrapped.surprise()
    wrapped.train()
    wrapped.calibrate([(rows(200, seed=1), 0), {"inputs": rows(200, seed=2)}])
    assert wrapped.training
    wrapped(rows(300, seed=3))
    normal = wrapped.surprise()
    assert 0.0 <= normal.is_ood.double().mean() < 0.12
    assert set(normal.per_layer) == set(normal.components) == {"0", "2"}
    wrapped(300 * rows(50, seed=4))
    far = wrapped.surprise()
    assert far.is_ood.all()
    assert (far.percentile == 1).all()


def test_a_sample_s_verdict_does_not_depend_on_its_batch_and_nan_is_strange() -> None:
    wrapped = wrap(mlp(), coding_dim=3).calibrate([rows(200, seed=1)], aggregation="max").eval()
    x = rows(30, seed=3)
    x[7] = float("nan")
    wrapped(x)
    together = wrapped.surprise()
    wrapped(x[3:4])
    torch.testing.assert_close(wrapped.surprise().score, together.score[3:4])
    assert together.is_ood[7]


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader is empty"),
        ([{"x": 1}], TypeError, "mapping with"),
        ([3], TypeError, "loader yields a int"),
        ([rows(20)], ValueError, "at least 20"),
        ([rows(100) * float("nan")], ValueError, "layer '0'.*not finite"),
    ],
    ids=["empty", "keys", "int", "few", "nan"],
)
def test_calibration_refuses_what_it_cannot_use(
    loader: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        wrap(mlp()).calibrate(loader)


def test_weights_of_layers_are_checked_and_used() -> None:
    wrapped = wrap(mlp())
    with pytest.raises(ValueError, match="weights lacks"):
        wrapped.calibrate([rows(200)], aggregation="weighted", weights={"0": 1.0})
    wrapped.calibrate([rows(200)], aggregation="weighted", weights={"0": 1.0, "2": 0.0})
    wrapped(rows())
    verdict = wrapped.surprise()
    torch.testing.assert_close(verdict.score, verdict.per_layer["0"])


def saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that a graph holds, beside the model's parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    assert kept.requires_grad
    return sum(storages.values())


def test_coding_saves_its_own_rows_and_numbers_for_backward_and_nothing_else() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    x = torch.randn(512, 64)
    bare = saved_bytes(plain, lambda: plain(x))
    wrapped = wrap(copy.deepcopy(plain), codes=16, coding_dim=8)
    coded = saved_bytes(wrapped, lambda: wrapped(x).sum() + wrapped.coding_loss())
    # What was coded, the best index, and distance, length, entropy and normaliser.
    each_row = 8 * 4 + 8 + 4 * 4
    each_layer = 16 * (8 * 4 + 4)  # of each code the gap to a row, and whether it is used
    assert bare < coded <= bare + 2 * (512 * each_row + each_layer)
    for p in wrapped.coding_parameters():
        p.requires_grad_(False)
    assert saved_bytes(wrapped, lambda: wrapped(x)) == bare
