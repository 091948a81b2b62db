"""What is claimed of the drill's model and its run: causal, reproducible, resumable, learning."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import math
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from foreshock.drill import gpt, text
from foreshock.drill.gpt import GPT, GPTConfig, Recipe, Run, build, generate, next_token_loss
from foreshock.drill.text import Vocabulary

TINY = GPTConfig(context=16, width=16, num_blocks=2, num_heads=2, dropout=0.1)
TINY_RECIPE = Recipe(model=TINY, batch_size=8, warmup_steps=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and wait for them when the machine is busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(TINY.vocabulary_size, shape, generator=torch.Generator().manual_seed(1))


def train(run: Run, num_steps: int) -> list[float]:
    losses = []
    for x_BT, y_BT in itertools.islice(run.batches, num_steps):
        run.optimizer.zero_grad()
        loss = next_token_loss(run.model(x_BT), y_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), TINY_RECIPE.max_norm)
        run.optimizer.step()
        run.scheduler.step()
        losses.append(loss.item())
    return losses


def test_logits_have_one_row_per_token() -> None:
    assert tiny_model()(random_tokens(3, 11)).shape == (3, 11, TINY.vocabulary_size)


@pytest.mark.parametrize("changed", [1, 7, 15])
def test_a_later_token_changes_no_earlier_logits(changed: int) -> None:
    model = tiny_model().eval()
    x_BT = random_tokens(2, 16)
    other_BT = x_BT.clone()
    other_BT[:, changed] = (x_BT[:, changed] + 1) % TINY.vocabulary_size
    logits_BTV, other_BTV = model(x_BT), model(other_BT)
    torch.testing.assert_close(logits_BTV[:, :changed], other_BTV[:, :changed], rtol=0, atol=1e-6)
    assert (logits_BTV[:, changed:] - other_BTV[:, changed:]).abs().amax(-1).min() > 1e-3


def test_rows_of_a_batch_do_not_mix() -> None:
    model = tiny_model().eval()
    x_BT = random_tokens(3, 16)
    torch.testing.assert_close(model(x_BT)[1:2], model(x_BT[1:2]), rtol=0, atol=1e-5)


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = tiny_model().eval().blocks[0].attention
    x_BTC = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    q_BTC, k_BTC, v_BTC = (x_BTC @ attention.qkv.weight.T).split(16, dim=-1)
    heads = []
    for channels in (slice(0, 8), slice(8, 16)):
        scores_BTT = q_BTC[..., channels] @ k_BTC[..., channels].mT / math.sqrt(8)
        scores_BTT = scores_BTT.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores_BTT.softmax(-1) @ v_BTC[..., channels])
    expected_BTC = torch.cat(heads, dim=-1) @ attention.out.weight.T
    torch.testing.assert_close(attention(x_BTC), expected_BTC)


def test_default_model_has_between_one_and_two_million_parameters() -> None:
    num_parameters = sum(parameter.numel() for parameter in GPT(GPTConfig()).parameters())
    assert 1_000_000 < num_parameters < 2_000_000


def test_parameter_names_say_what_they_are() -> None:
    names = [name for name, _ in GPT(GPTConfig()).named_parameters()]
    assert "blocks.3.attention.qkv.weight" in names
    assert [name for name in names if not name.startswith("blocks.")] == [
        "token_embedding.weight",
        "position_embedding.weight",
        "final_norm.weight",
        "final_norm.bias",
        "head.weight",
    ]


def test_an_untrained_model_knows_almost_nothing() -> None:
    run = build(seed=0)
    loss = next_token_loss(run.model(run.batches.batch_at(0)[0]), run.batches.batch_at(0)[1])
    assert abs(loss.item() - math.log(len(Vocabulary()))) < 0.5


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny_model()
    next_token_loss(model(random_tokens(2, 16)), random_tokens(2, 16)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_loss_falls_in_a_few_steps() -> None:
    recipe = dataclasses.replace(TINY_RECIPE, learning_rate=1e-2)
    losses = train(build(0, recipe), 40)
    assert losses[0] > 4.5
    assert sum(losses[-5:]) / 5 < 3.6


def test_the_same_seed_gives_the_same_losses_to_the_bit() -> None:
    losses = train(build(3, TINY_RECIPE), 6)
    assert losses == train(build(3, TINY_RECIPE), 6)
    assert losses != train(build(4, TINY_RECIPE), 6)


def test_the_seed_decides_weights_and_batches() -> None:
    run, other = build(3, TINY_RECIPE), build(4, TINY_RECIPE)
    assert not torch.equal(run.model.head.weight, other.model.head.weight)
    assert not torch.equal(run.batches.batch_at(0)[0], other.batches.batch_at(0)[0])


def test_dropout_is_drawn_from_the_seed() -> None:
    run = build(0, TINY_RECIPE)
    x_BT, _ = run.batches.batch_at(0)
    assert not torch.equal(run.model(x_BT), run.model(x_BT))
    run.model.eval()
    assert torch.equal(run.model(x_BT), run.model(x_BT))


def test_a_run_resumed_from_its_states_goes_on_to_the_bit() -> None:
    run = build(0, TINY_RECIPE)
    train(run, 3)
    states = [copy.deepcopy(part.state_dict()) for part in run]
    rng_state = torch.get_rng_state()
    undisturbed = train(run, 4)
    resumed = build(0, TINY_RECIPE)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(rng_state)
    assert train(resumed, 4) == undisturbed


def test_learning_rate_warms_up_and_then_stays() -> None:
    run = build(0, TINY_RECIPE)
    rates = []
    for _ in range(7):
        rates.append(run.scheduler.get_last_lr()[0])
        train(run, 1)
    peak = TINY_RECIPE.learning_rate
    assert rates == pytest.approx([peak * share for share in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0)])


def test_only_matrices_decay_and_every_parameter_is_optimised() -> None:
    run = build(0, TINY_RECIPE)
    decay_of = {
        parameter: group["weight_decay"]
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    for parameter in run.model.parameters():
        assert decay_of.pop(parameter) == (TINY_RECIPE.weight_decay if parameter.ndim == 2 else 0)
    assert not decay_of


def test_generate_depends_on_its_generator_only() -> None:
    model = tiny_model()

    def sample(seed: int) -> torch.Tensor:
        return generate(model, random_tokens(5), 30, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_generate_keeps_the_prompt_and_adds_the_length_asked_for() -> None:
    prompt_T = random_tokens(20)
    text_T = generate(tiny_model(), prompt_T, 9)
    assert text_T.shape == (29,)
    assert torch.equal(text_T[:20], prompt_T)
    assert torch.equal(generate(tiny_model(), prompt_T, 0), prompt_T)


def test_generate_at_a_low_temperature_takes_the_likeliest_token() -> None:
    model = tiny_model().eval()
    prompt_T = random_tokens(6)
    assert (
        generate(model, prompt_T, 1, temperature=1e-6)[-1] == model(prompt_T[None])[0, -1].argmax()
    )


@pytest.mark.parametrize("is_training", [True, False])
def test_generate_restores_the_mode_even_when_it_fails(is_training: bool) -> None:
    model = tiny_model().train(is_training)
    generate(model, random_tokens(4), 2)
    assert model.training == model.blocks[0].dropout.training == is_training
    model.head.weight.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="nan"):
        generate(model, random_tokens(4), 2)
    assert model.training == is_training


def test_importing_the_model_needs_nothing_but_torch() -> None:
    imported = set()
    for module in (gpt, text):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    third_party = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in third_party if name.split(".")[0] != "torch"} == {
        "foreshock.drill.text"
    }


@pytest.mark.parametrize(
    ("name", "given_value"),
    [
        ("vocabulary_size", 0),
        ("context", 0),
        ("width", 162),
        ("width", 160.0),
        ("num_blocks", 0),
        ("num_heads", -1),
        ("dropout", 1.0),
        ("dropout", math.nan),
    ],
)
def test_bad_config_fields_are_named(name: str, given_value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got {given_value}$"):
        GPTConfig(**{name: given_value})


@pytest.mark.parametrize(
    ("name", "given_value"),
    [
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("warmup_steps", -1),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("max_norm", 0.0),
        ("max_norm", math.nan),
    ],
)
def test_bad_recipe_fields_are_named(name: str, given_value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
        Recipe(**{name: given_value})


@pytest.mark.parametrize("shape", [(16,), (1, 17)])
def test_tokens_of_a_bad_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x_BT must be of shape \(B, T\) with T <= 16; got "):
        tiny_model()(random_tokens(*shape))


@pytest.mark.parametrize(
    ("name", "given_value"),
    [
        ("prompt_T", torch.zeros(0, dtype=torch.int64)),
        ("prompt_T", torch.zeros(1, 4, dtype=torch.int64)),
        ("length", -1),
        ("temperature", 0.0),
        ("temperature", math.inf),
    ],
)
def test_bad_generate_arguments_are_named(name: str, given_value: object) -> None:
    arguments = {"prompt_T": random_tokens(4), "length": 2} | {name: given_value}
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
        generate(tiny_model(), **arguments)


def test_a_model_too_small_for_the_text_is_refused() -> None:
    recipe = dataclasses.replace(TINY_RECIPE, model=dataclasses.replace(TINY, vocabulary_size=96))
    with pytest.raises(ValueError, match=r"^vocabulary_size must be at least 97; got 96$"):
        build(0, recipe)
