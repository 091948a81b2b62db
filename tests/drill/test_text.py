"""What is claimed of the drill's text: fixed order, fixed vocabulary, exactly resumable batches."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foreshock.drill.text import REPLACEMENT, TextBatches, Vocabulary, load_corpus, split

TOKENS = torch.arange(500)


def make_batches(seed: int = 0, length: int | None = None) -> TextBatches:
    return TextBatches(TOKENS, batch_size=4, context=7, seed=seed, length=length)


def first_tokens(pairs: list[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Name each batch by the first token of its rows, which is the row's start in TOKENS."""
    return [x_BT[:, 0].tolist() for x_BT, _ in pairs]


def expected(indices: range, seed: int = 0) -> list[list[int]]:
    return first_tokens([make_batches(seed).batch_at(index) for index in indices])


def test_corpus_is_the_documentation_and_the_same_each_time() -> None:
    corpus = load_corpus()
    assert len(corpus) > 200_000
    assert 'The "assert" statement' in corpus
    assert corpus == load_corpus()


def test_vocabulary_names_almost_every_character_of_the_corpus() -> None:
    tokens = Vocabulary().encode(load_corpus())
    is_replaced = tokens == len(Vocabulary()) - 1
    assert is_replaced.double().mean() < 0.01


def test_vocabulary_is_small_and_does_not_depend_on_the_corpus() -> None:
    assert len(Vocabulary()) == 97


@given(st.text(alphabet=st.sampled_from(Vocabulary().characters)))
def test_decode_inverts_encode(text: str) -> None:
    assert Vocabulary().decode(Vocabulary().encode(text)) == text


@given(st.text())
def test_encode_replaces_what_it_does_not_know_and_keeps_the_length(text: str) -> None:
    vocabulary = Vocabulary("abc")
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(text),)
    assert vocabulary.decode(tokens) == re.sub("[^abc]", REPLACEMENT, text)


def test_split_keeps_every_token_once_and_in_order() -> None:
    training, held_out = split(TOKENS, held_out=0.1)
    assert len(held_out) == 50
    assert torch.equal(torch.cat([training, held_out]), TOKENS)


def test_rows_are_consecutive_and_targets_are_one_token_later() -> None:
    for x_BT, y_BT in itertools.islice(make_batches(), 20):
        assert x_BT.shape == y_BT.shape == (4, 7)
        assert x_BT.dtype == y_BT.dtype == torch.int64
        assert torch.equal(x_BT, x_BT[:, :1] + torch.arange(7))
        assert torch.equal(y_BT, x_BT + 1)


def test_every_start_is_drawn_about_equally_often() -> None:
    batches = TextBatches(torch.arange(18), batch_size=1000, context=8, seed=3)
    counts = torch.bincount(batches.batch_at(0)[0][:, 0])
    # Ten starts, 100 draws expected for each, standard deviation 9.5.
    assert len(counts) == 10
    assert counts.min() > 60
    assert counts.max() < 140


def test_the_whole_text_can_be_drawn_when_only_one_row_fits() -> None:
    x_BT, y_BT = TextBatches(torch.arange(8), batch_size=1, context=7).batch_at(0)
    assert x_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert y_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63])
def test_batches_depend_on_seed_and_index_only(seed: int) -> None:
    assert first_tokens(list(itertools.islice(make_batches(seed), 5))) == expected(range(5), seed)
    assert expected(range(5), seed) != expected(range(5), seed=77)
    assert len({tuple(row) for row in expected(range(5), seed)}) == 5


def test_batches_are_the_same_on_every_machine_and_version() -> None:
    assert expected(range(2), seed=5) == [[192, 374, 6, 177], [113, 162, 284, 34]]


def test_drawing_a_batch_leaves_torchs_global_generator_alone() -> None:
    before = torch.get_rng_state()
    next(iter(make_batches()))
    assert torch.equal(torch.get_rng_state(), before)


@given(taken=st.integers(0, 12), length=st.none() | st.integers(1, 9))
def test_a_second_loader_resumes_where_the_first_one_was(taken: int, length: int | None) -> None:
    first = make_batches(length=length)
    for _ in range(taken):
        next(iter(first))
    second = make_batches(length=length)
    second.load_state_dict(first.state_dict())
    rest = list(itertools.islice(second, 3))
    assert first_tokens(rest) == expected(range(taken, taken + len(rest)))


def test_rewinding_in_the_middle_of_a_loop_takes_effect_at_once() -> None:
    batches = make_batches(length=4)
    seen = []
    state = {}
    has_rewound = False
    for pair in batches:
        seen.append(pair)
        if batches.position == 2 and not has_rewound:
            state = batches.state_dict()
        if batches.position == 4 and not has_rewound:
            batches.load_state_dict(state)
            has_rewound = True
    assert first_tokens(seen) == expected(range(4)) + expected(range(2, 4))


def test_an_iterator_begun_within_an_epoch_ends_with_that_epoch() -> None:
    batches = make_batches(length=4)
    next(iter(batches))
    assert first_tokens(list(batches)) == expected(range(1, 4))


def test_rewinding_to_the_start_does_not_end_the_epoch() -> None:
    batches = make_batches(length=3)
    start = batches.state_dict()
    iterator = iter(batches)
    next(iterator)
    batches.load_state_dict(start)
    assert first_tokens(list(iterator)) == expected(range(3))


def test_epochs_have_the_given_length_and_bring_new_batches() -> None:
    batches = make_batches(length=3)
    assert first_tokens(list(batches)) == expected(range(3))
    assert first_tokens(list(batches)) == expected(range(3, 6))


@pytest.mark.parametrize("changed", ["seed", "batch_size", "context", "num_tokens"])
def test_the_state_of_a_loader_with_other_batches_is_refused(changed: str) -> None:
    batches = make_batches()
    state = batches.state_dict()
    present = state[changed]
    state |= {changed: 99, "position": 5}
    with pytest.raises(ValueError, match=rf"^{changed} must be {present}, .*; got 99$"):
        batches.load_state_dict(state)
    assert batches.position == 0


def test_a_state_that_is_not_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^state must be .*'position'.*; got \['step'\]$"):
        make_batches().load_state_dict({"step": 3})
    with pytest.raises(ValueError, match=r"^position must be at least 0; got -1$"):
        make_batches().load_state_dict(make_batches().state_dict() | {"position": -1})


@pytest.mark.parametrize(
    ("name", "given_value"),
    [
        ("batch_size", 0),
        ("context", 0),
        ("length", 0),
        ("tokens_N", TOKENS[:7]),
        ("tokens_N", TOKENS.double()),
        ("tokens_N", TOKENS[None]),
    ],
)
def test_bad_loader_arguments_are_named(name: str, given_value: object) -> None:
    arguments = {"tokens_N": TOKENS, "batch_size": 4, "context": 7} | {name: given_value}
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
        TextBatches(**arguments)


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, float("nan")])
def test_a_bad_share_is_named(held_out: float) -> None:
    with pytest.raises(ValueError, match=rf"^held_out must be between 0 and 1.*; got {held_out}$"):
        split(TOKENS, held_out)


def test_bad_characters_and_tokens_are_named() -> None:
    with pytest.raises(ValueError, match=r"^characters must be distinct .*; got 'aba'$"):
        Vocabulary("aba")
    with pytest.raises(ValueError, match=r"^tokens_N must be .* between 0 and 3; got 4$"):
        Vocabulary("abc").decode(torch.tensor([0, 4]))
