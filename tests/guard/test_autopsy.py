"""What an examination sees of a step, and what it does not touch."""

from __future__ import annotations

import copy
import functools
import io
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foreshock.guard import (
    BatchSeen,
    Cause,
    Examination,
    Offender,
    Place,
    Reason,
    StepExamined,
    Symptoms,
    batch_seen,
    hash_batch,
)
from foreshock.guard.examination import look_at

BAD_LOSS = Symptoms((Reason.NONFINITE_LOSS,), None, math.nan)
BAD_GRADIENT = Symptoms((Reason.NONFINITE_GRADIENT,), None, 1.0)


class Does(nn.Module):
    """A module that does one thing, and holds others."""

    def __init__(self, what: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.what = what
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.what(*args, **kwargs)


def unwelcome() -> None:
    raise AssertionError("a hook has failed") from None


def examine(model: nn.Module, *args: Any, backward: bool = False, **kwargs: Any) -> Examination:
    """One pass under hooks."""
    examination = Examination(model, dict(model.named_parameters()), None, unwelcome)
    try:
        made = model(*args, **kwargs)
        if backward:
            made.sum().backward()
    finally:
        examination.remove()
    return examination


def located(model: nn.Module, *args: Any, symptoms: Symptoms = BAD_LOSS, **kwargs: Any) -> Place:
    place = examine(model, *args, **kwargs).locate(symptoms, None)
    assert place is not None
    return place


def to_nan(x: Tensor) -> Tensor:
    return x * math.nan


def to_negative_inf(x: Tensor) -> Tensor:
    return x.masked_fill(x == x.max(), -math.inf)


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


# ---- which module


def test_of_nested_modules_the_innermost_is_named() -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Does(to_nan)), nn.Identity())
    place = located(model, X)
    assert (place.kind, place.name, place.type, place.call) == ("module", "1.1", "Does", 1)


def test_what_a_module_does_itself_is_not_blamed_on_its_children() -> None:
    """The child is called after the NaN was made, and first to return one."""
    child = nn.Linear(2, 2)
    model = Does(lambda x: child(x * math.nan), child=child)
    assert located(nn.Sequential(model), X).name == "0"


def test_a_shared_module_is_named_with_the_call_that_did_it() -> None:
    calls: list[int] = []

    def second(x: Tensor) -> Tensor:
        calls.append(1)
        return to_nan(x) if len(calls) == 2 else x

    shared = Does(second)
    place = located(nn.Sequential(shared, nn.Identity(), shared), X)
    assert (place.name, place.call) == ("0", 2)


def test_a_module_that_calls_itself_is_told_apart() -> None:
    def deep(x: Tensor, depth: int = 2) -> Tensor:
        return model(x, depth=depth - 1) if depth else to_nan(x)

    model = Does(deep)
    place = located(model, X)
    assert (place.kind, place.had_finite_inputs) == ("module", True)


def test_a_mask_counts_as_finite_and_the_module_that_is_given_it_is_named() -> None:
    """A row that is masked altogether makes the NaN, within the attention, not what is round it."""
    attention = Does(lambda x, mask: (x @ x.T + mask).softmax(-1) @ x)
    norm = nn.LayerNorm(2)
    layer = Does(lambda x, mask: norm(x + attention(x, mask=mask)), attention=attention, norm=norm)

    def forward(x: Tensor) -> Tensor:
        mask = torch.zeros(2, 2)
        mask[1] = -math.inf
        return layer(x, mask=mask)

    place = located(Does(forward, layer=layer), X.clone().requires_grad_())
    assert place.name == "layer.attention"
    assert place.had_finite_inputs
    assert [(seen.path, seen.inf) for seen in place.inputs] == [("mask", 2), ("0", 0)]


def test_a_logarithm_of_zero_and_one_is_no_mask() -> None:
    one_hot = torch.tensor([[0.0, 1.0]], requires_grad=True)
    model = nn.Sequential(Does(torch.log), Does(lambda x: x * 0))
    assert located(model, one_hot).name == "0"


@pytest.mark.parametrize("absorbs", ["the module round it", "the next one"])
def test_scores_that_are_masked_and_absorbed_are_no_fault(absorbs: str) -> None:
    scores, later = Does(to_negative_inf), Does(to_nan)
    if absorbs == "the next one":
        model: nn.Module = nn.Sequential(scores, nn.Softmax(-1), later)
    else:
        model = nn.Sequential(Does(lambda x: scores(x).softmax(-1), scores=scores), later)
    assert located(model, X).name in ("1", "2")
    assert located(model, X).outputs[0].nan == 4


def test_a_batch_that_is_bad_leads_to_the_first_module_given_it_though_absorbed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    x = X.clone()
    x[0, 0] = math.inf
    place = examine(model, x).locate(BAD_GRADIENT, batch_seen(0, {"x": x}))
    assert place is not None
    assert (place.name, place.had_finite_inputs) == ("0", False)


def test_inputs_by_name_and_nested_outputs_are_seen() -> None:
    model = Does(lambda x, more: {"a": [x, (to_nan(more["y"]),)], "b": None})
    place = located(nn.Sequential(model)[0], x=X, more={"y": X.double(), "ids": X.long()})
    assert [t.path for t in place.inputs] == ["x", "more.y"]
    assert place.outputs[0].path == "output.a.1.0"  # bad ones first
    assert place.outputs[0].dtype == "float64"
    assert [t.nan for t in place.outputs] == [4, 0]


def test_a_module_s_own_parameters_are_described() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].bias[1] = math.inf
    place = located(model, X)
    assert [(t.path, t.inf) for t in place.parameters] == [("bias", 1), ("weight", 0)]


def test_what_a_module_has_changed_in_place_has_no_min_and_max_of_before() -> None:
    model = Does(lambda x: x.mul_(math.nan))
    (given,) = located(model, X.clone()).inputs
    assert (given.nan, given.mean, given.min, given.max) == (0, 2.5, None, None)
    assert given.rms == pytest.approx(math.sqrt(7.5))


def test_a_call_that_an_exception_ends_does_not_confuse_the_next() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError

    inner = Does(fails)

    def tries(x: Tensor) -> Tensor:
        try:
            inner(x)
        except ValueError:
            return to_nan(x)
        raise AssertionError

    assert located(nn.Sequential(Does(tries, inner=inner), nn.Identity()), X).name == "0"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_is_computed_again_for_a_checkpoint_changes_nothing(use_reentrant: bool) -> None:
    block = nn.Sequential(nn.Linear(2, 2), Does(to_nan), nn.Linear(2, 2))
    run = functools.partial(checkpoint, block, use_reentrant=use_reentrant)
    model = Does(run, block=block)
    place = located(model, X.clone().requires_grad_(), backward=True)
    assert place.name == "block.1"


# ---- no module


def test_if_every_module_is_finite_it_is_the_loss() -> None:
    assert located(nn.Linear(2, 2), X) == Place("loss")


def test_the_first_gradient_of_the_backward_pass_is_named_not_the_first_parameter() -> None:
    layers = [nn.Linear(2, 2) for _ in range(3)]

    def forward(x: Tensor) -> Tensor:
        x = layers[1](layers[0](x)) * 0
        return layers[2](torch.where(x > 0, x.sqrt(), 0.0))

    model = Does(forward, a=layers[0], b=layers[1], c=layers[2])
    place = located(model, X, backward=True, symptoms=BAD_GRADIENT)
    assert place.kind == "gradient"
    assert place.name in ("b.weight", "b.bias")
    assert place.gradient is not None
    assert place.gradient.nan == math.prod(place.gradient.shape)


def test_a_bad_gradient_is_not_named_if_the_guard_does_not_call_it_bad() -> None:
    """A scaler is looking for its scale."""
    model = nn.Linear(2, 2)
    examination = Examination(model, dict(model.named_parameters()), None, unwelcome)
    (model(X).sum() * math.inf).backward()
    examination.remove()
    over = Symptoms((Reason.LOSS_OVER_THRESHOLD,), None, 1e9)
    assert examination.locate(over, None) is None


def test_what_was_bad_before_comes_first_and_what_is_bad_after_last() -> None:
    model, found = nn.Linear(2, 2), Offender("parameter", "weight", 1, 0, 4)
    for before, kind in ((found, "before"), (None, "after")):
        examination = Examination(model, {}, before, unwelcome)
        model(X)
        examination.remove()
        symptoms = Symptoms((Reason.NONFINITE_WEIGHTS,), found, 1.0)
        assert examination.locate(symptoms, None) == Place(kind, "weight", offender=found)


# ---- torch.compile (trap 19)

compiled = functools.partial(torch.compile, backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, tracing
def test_trap_19_in_a_compiled_model_nothing_is_named() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), Does(to_nan))
    in_place = nn.Sequential(nn.Linear(2, 2), Does(to_nan))
    in_place.compile(backend="eager")
    for model in (compiled(inner), in_place):
        place = located(model, X)
        assert place.kind == "not_located"
        assert "torch.compile" in str(place.why)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, tracing
def test_trap_19_of_a_model_that_is_compiled_elsewhere_nothing_is_named() -> None:
    """The monitor has the model, the loop what was made of it, before or under the hooks."""
    for has_run in (True, False):
        model = nn.Sequential(nn.Linear(2, 2), Does(to_nan))
        step = compiled(lambda x, model=model: model(x), fullgraph=True)
        if has_run:
            step(X)
        examination = Examination(model, dict(model.named_parameters()), None, unwelcome)
        step(X)
        examination.remove()
        place = examination.locate(BAD_LOSS, None)
        assert place is not None
        assert place.kind == "not_located"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, tracing
def test_trap_19_a_compiled_block_is_named_as_a_whole_or_hides_behind_its_owner() -> None:
    block = nn.Sequential(nn.Linear(2, 2), Does(to_nan))
    assert located(nn.Sequential(nn.Identity(), compiled(block)), X).name == "1"
    block.compile(backend="eager")
    place = located(nn.Sequential(nn.Identity(), block), X)
    assert place.kind == "not_located"
    assert place.why == "the model does it, of which parts are compiled"
    outside = nn.Sequential(nn.Sequential(nn.Identity(), Does(to_nan)), block)
    assert located(outside, X).name == "0.1"


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, tracing
def test_trap_19_compiled_gradients_come_in_no_order() -> None:
    model = nn.Sequential(nn.Linear(2, 2), compiled(nn.Linear(2, 2)))
    examination = Examination(model, dict(model.named_parameters()), None, unwelcome)
    (model(X).sum() * math.nan).backward()
    examination.remove()
    place = examination.locate(BAD_GRADIENT, None)
    assert place is not None
    assert place.kind == "not_located"


# ---- without a trace


def number_of_hooks(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_bits_and_random_numbers_are_as_without_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model = nn.Sequential(model, nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    seen: list[list[Tensor]] = []
    start = copy.deepcopy(model.state_dict())
    for is_examined in (False, True):
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(3)
        if is_examined:
            examination = Examination(model, dict(model.named_parameters()), None, unwelcome)
            assert number_of_hooks(model) == 2 * 7 + 6
        made = model(x)
        made.square().sum().backward()
        if is_examined:
            examination.remove()
        gradients = [p.grad.clone() for p in model.parameters()]
        buffers = [b.clone() for b in model.buffers()]
        seen.append([made.detach(), *gradients, *buffers, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert number_of_hooks(model) == 0


def test_hooks_of_others_stay_and_still_work() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, args, output: output * 2)
    plain = model(X)
    examination = Examination(model, dict(model.named_parameters()), None, unwelcome)
    assert torch.equal(model(X), plain)
    examination.remove()
    examination.remove()
    assert number_of_hooks(model) == 1


def test_a_model_that_is_copied_or_saved_meanwhile_takes_no_live_hook_along() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    unsaveable = threading.Lock().release  # as what a monitor holds
    examination = Examination(model, dict(model.named_parameters()), None, unsaveable)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [twin, torch.load(file, weights_only=False)]
    examination.remove()
    for twin in twins:
        assert torch.equal(twin(X * math.nan).isnan(), torch.ones(2, 2, dtype=torch.bool))
    assert examination.locate(BAD_LOSS, None) == Place(
        "not_located", why="no module was seen at work, as under torch.compile"
    )


def test_hooks_that_cannot_all_be_put_on_are_all_taken_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2))

    class Refuses:
        requires_grad = True

        def register_hook(self, hook: Any) -> None:
            raise RuntimeError("no hooks here")

    parameters: Any = {**dict(model.named_parameters()), "last": Refuses()}
    with pytest.raises(RuntimeError, match="no hooks here"):
        Examination(model, parameters, None, unwelcome)
    assert number_of_hooks(model) == 0


def test_a_hook_that_fails_looks_no_further_and_does_not_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[int] = []

    def refuse(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr("foreshock.guard.examination.look_at", refuse)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    examination = Examination(model, {}, None, lambda: failures.append(1))
    model(X)
    examination.remove()
    assert failures == [1]
    place = examination.locate(BAD_LOSS, None)
    assert place == Place("not_located", why="a hook has failed")


# ---- tensors and batches in numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_of_the_finite_values(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -2.0, math.nan], [math.inf, 4.0, -math.inf]], dtype=dtype)
    for given in (x, x.t(), x[:, ::2]):
        (look,) = look_at([given])
        seen, finite = look.described(), given[given.isfinite()].double()
        assert (seen.path, seen.shape, seen.dtype) == ("0", tuple(given.shape), str(dtype)[6:])
        assert (seen.nan, seen.inf) == (int(given.isnan().sum()), int(given.isinf().sum()))
        assert (seen.min, seen.max) == (finite.min(), finite.max())
        assert seen.mean == pytest.approx(float(finite.mean()))
        assert seen.rms == pytest.approx(float(finite.square().mean().sqrt()))


def test_odd_tensors_are_described_too() -> None:
    value = {
        "none": torch.full((2,), math.nan),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "complex": torch.tensor([1 + 2j]),
        "eight": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "text": "x",
        "integers": torch.ones(2).long(),
    }
    seen = {look.path: look.described() for look in look_at(value)}
    assert list(seen) == ["none", "empty", "scalar", "complex", "eight", "sparse"]
    for path in ("none", "empty"):
        assert (seen[path].min, seen[path].mean, seen[path].rms) == (None, None, None)
    assert (seen["scalar"].shape, seen["scalar"].mean) == ((), 2.0)
    assert (seen["complex"].min, seen["complex"].max) == (1.0, 2.0)
    assert (seen["eight"].min, seen["eight"].max) == (0.5, 448.0)
    assert seen["sparse"].max == 1.0


class Pair(NamedTuple):
    x: Tensor
    y: Any


def test_the_hash_is_of_contents_wherever_they_lie() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    known = hash_batch({"x": x, "y": [torch.ones(2, dtype=torch.bfloat16), "text", 3]})
    again = {"x": x.t().contiguous().t(), "y": [torch.ones(2).bfloat16(), "text", 3]}
    assert known == hash_batch(again)
    assert len(str(known)) == 32
    others = [
        {"x": x, "y": [torch.ones(2, dtype=torch.bfloat16), "texts", 3]},
        {"x": x, "y": [torch.ones(2, dtype=torch.bfloat16), "text", 4]},
        {"x": x, "z": [torch.ones(2, dtype=torch.bfloat16), "text", 3]},
        {"x": x.double(), "y": [torch.ones(2, dtype=torch.bfloat16), "text", 3]},
        {"x": x.reshape(3, 2), "y": [torch.ones(2, dtype=torch.bfloat16), "text", 3]},
        {"x": -x, "y": [torch.ones(2, dtype=torch.bfloat16), "text", 3]},
    ]
    assert len({known, *map(hash_batch, others)}) == 7
    assert hash_batch(Pair(x, None)) == hash_batch((x, object()))
    assert hash_batch(x) == hash_batch(x.numpy())
    assert hash_batch(np.float32([1, 2])) != hash_batch(np.float32([2, 1]))
    assert hash_batch([object(), None]) is None
    for odd in (torch.eye(3).to_sparse(), torch.zeros(0), torch.tensor([True]), torch.tensor(1j)):
        assert hash_batch(odd) is not None


def test_a_batch_of_whole_numbers_is_described() -> None:
    seen = batch_seen(7, (torch.tensor([[3, 9]]), {"mask": torch.tensor([True, False])}))
    assert (seen.index, seen.has_nonfinite) == (7, False)
    first, second = seen.tensors
    assert (first.path, first.dtype, first.min, first.max, first.mean) == ("0", "int64", 3, 9, 6)
    assert (second.path, second.dtype, second.min, second.max) == ("1.mask", "bool", 0, 1)


def test_of_very_many_tensors_the_first_and_the_bad_are_described() -> None:
    many = [torch.ones(1) * i for i in range(40)]
    many[33] = torch.tensor([math.nan])
    seen = batch_seen(0, many)
    assert [t.path for t in seen.tensors] == ["33", *map(str, range(15))]
    assert seen.has_nonfinite


def test_a_mask_in_the_batch_is_not_held_against_it() -> None:
    mask = torch.full((3, 3), -math.inf).triu(1)
    assert not batch_seen(0, {"mask": mask}).has_nonfinite
    assert batch_seen(0, {"mask": mask.fill_(-math.inf)}).has_nonfinite


# ---- one sentence


def sentence(cause: Cause, place: Place | None = None, **given: Any) -> str:
    batch = BatchSeen(156, "00", ())
    options = {"again": BAD_LOSS, "batch": batch, "to_step": 140, "lr_factor": 1.0, **given}
    return str(StepExamined(156, cause, BAD_LOSS, place=place, **options))


def test_sentences_name_batch_place_and_verdict() -> None:
    bad = look_at(torch.tensor(math.nan), "output")[0].described()
    module = Place("module", "decoder.3.mlp", "MLP", 1, True, outputs=(bad,))
    assert sentence(Cause.DETERMINISTIC, module) == (
        "batch 156 makes NaN in decoder.3.mlp (deterministic)"
    )
    assert sentence(Cause.DETERMINISTIC, Place("not_located", why="so")) == (
        "batch 156 fails again, not located: so (deterministic)"
    )
    assert sentence(Cause.TRANSIENT, lr_factor=0.5) == (
        "nothing is wrong when it is run again, with the learning rate times 0.5 (transient)"
    )
    # No step in between, so that the other rate has changed nothing.
    assert "hardware" in sentence(Cause.TRANSIENT, lr_factor=0.5, to_step=156)
    assert sentence(Cause.NOT_REPLAYED, why="so") == "not examined: so"
    given = Place("module", "", "Net", 1, False, outputs=(bad,))
    assert sentence(Cause.DETERMINISTIC, given, batch=None) == (
        "it gives the model what is not finite (deterministic)"
    )
