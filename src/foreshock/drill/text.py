"""Real text to train on, always at hand: CPython's own documentation, one character per token.

Shapes: N tokens of a text, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch
from torch import Tensor

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PRINTABLE_ASCII = "".join(map(chr, range(ord(" "), ord("~") + 1)))


def load_corpus() -> str:
    """Return the topics of Python's `help()`, about half a million characters of English and code.

    The text is that of the running interpreter, so it differs a little between Python versions;
    its order does not depend on the order of the dictionary it comes from.

    Returns:
        The topics in alphabetical order of their names, parted by blank lines.
    """
    # Here and not at the top, because importing it reads all of the text.
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


class Vocabulary:
    """One token per character; every character not listed shares the last token.

    The default is fixed (newline, printable ASCII, the replacement: 97 tokens) rather than counted
    from a text, so that the shape of a model does not depend on the Python version it runs on.

    Args:
        characters: the characters that get a token of their own, in the order of their tokens.

    Raises:
        ValueError: if a character is listed twice, or if the replacement character is listed.
    """

    def __init__(self, characters: str = "\n" + _PRINTABLE_ASCII) -> None:
        if len(set(characters)) != len(characters) or REPLACEMENT in characters:
            accepted = f"distinct characters without {REPLACEMENT!r}"
            _reject("characters", characters, accepted)
        self.characters = characters + REPLACEMENT
        self._token_of = {character: token for token, character in enumerate(self.characters)}

    def __len__(self) -> int:
        """Return the number of tokens, the replacement included."""
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text as int64, one per character: shape (len(text),)."""
        replacement = len(self) - 1
        tokens = [self._token_of.get(character, replacement) for character in text]
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens_N: Tensor) -> str:
        """Return the text of integer tokens of shape (N,): the inverse of `encode` on listed ones.

        Raises:
            ValueError: if a token lies outside 0..len(self) - 1.
        """
        tokens: list[int] = tokens_N.tolist()
        for token in tokens:
            if not 0 <= token < len(self):
                _reject("tokens_N", token, f"tokens between 0 and {len(self) - 1}")
        return "".join(self.characters[token] for token in tokens)


def split(tokens_N: Tensor, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """Cut a text in two: the start to train on, the end held out.

    The end is one piece, not scattered rows, because rows cut from the same sentences as the
    training rows would be no test of generalisation.

    Args:
        tokens_N: tokens, shape (N,).
        held_out: the share of tokens to hold out, between 0 and 1, both excluded.

    Returns:
        (training tokens, held-out tokens), views of `tokens_N`.

    Raises:
        ValueError: if `held_out` is not between 0 and 1.
    """
    if not 0.0 < held_out < 1.0:
        _reject("held_out", held_out, "between 0 and 1, both excluded")
    training_size = len(tokens_N) - round(len(tokens_N) * held_out)
    return tokens_N[:training_size], tokens_N[training_size:]


class TextBatches:
    """Batches of random rows of a text, resumable at any batch, bit for bit.

    Batch i is a pure function of (seed, i). There is no generator whose state could be lost:
    the whole state is one integer, the index of the next batch, so that going back 37 batches is
    setting it back by 37. Torch's global generator is neither read nor moved.

    Iterating goes on from that position, also after `load_state_dict` in the middle of a loop.
    With a `length`, an iterator ends at the next multiple of it, and the next one goes on from
    there with batches not seen before: an epoch is `length` batches.

    Args:
        tokens_N: int64 tokens, shape (N,), with N > context.
        batch_size: rows per batch, at least 1.
        context: tokens per row, at least 1.
        seed: any integer; different seeds give unrelated batches.
        length: batches per epoch, at least 1; None for a loader that never ends.

    Yields:
        (x_BT, y_BT): int64, shape (batch_size, context); y is x one token later in the text.

    Raises:
        ValueError: if an argument is outside what is accepted.
    """

    def __init__(
        self,
        tokens_N: Tensor,
        batch_size: int,
        context: int,
        seed: int = 0,
        length: int | None = None,
    ) -> None:
        if batch_size < 1:
            _reject("batch_size", batch_size, "at least 1")
        if context < 1:
            _reject("context", context, "at least 1")
        if length is not None and length < 1:
            _reject("length", length, "at least 1, or None")
        if tokens_N.ndim != 1 or tokens_N.dtype != torch.int64 or len(tokens_N) <= context:
            given = f"{tokens_N.dtype} of shape {tuple(tokens_N.shape)}"
            _reject("tokens_N", given, f"int64 of shape (N,) with N > context, which is {context}")
        self.tokens_N = tokens_N
        self.batch_size = batch_size
        self.context = context
        self.seed = seed
        self.length = length
        self.position = 0

    def batch_at(self, index: int) -> tuple[Tensor, Tensor]:
        """Return batch `index` (0 is the first), whatever the position, which stays as it is."""
        # One token is kept back for y, which ends one later than x.
        num_starts = len(self.tokens_N) - self.context
        first_draw = index * self.batch_size
        starts_B = torch.tensor(
            [
                random_word(self.seed, first_draw + row) % num_starts
                for row in range(self.batch_size)
            ]
        )
        rows = self.tokens_N[starts_B[:, None] + torch.arange(self.context + 1)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches from the present position to the end of the epoch."""
        epoch_end = None
        if self.length is not None:
            epoch_end = (self.position // self.length + 1) * self.length
        while epoch_end is None or self.position < epoch_end:
            batch = self.batch_at(self.position)
            # Before the yield: while batch i is in use, the position to resume from is i + 1.
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what the batches depend on besides the text itself."""
        return {
            "position": self.position,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "context": self.context,
            "num_tokens": len(self.tokens_N),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to the position of a `state_dict`; the next batch is the one that came next then.

        Raises:
            ValueError: if the state is not that of a loader that gives the same batches.
        """
        present = self.state_dict()
        if state.keys() != present.keys():
            _reject("state", sorted(state), f"a dict with the keys {sorted(present)}")
        if state["position"] < 0:
            _reject("position", state["position"], "at least 0")
        for name in present.keys() - {"position"}:
            if state[name] != present[name]:
                _reject(name, state[name], f"{present[name]}, as in the loader it is loaded into")
        self.position = state["position"]


def random_word(seed: int, counter: int) -> int:
    """Return 64 random bits, number `counter` of the stream of `seed`.

    Source: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014), whose n-th output needs none of those before. The seed is mixed first, or streams
    whose seeds differ by a multiple of the increment would be shifted copies of each other.
    """
    increment = 0x9E3779B97F4A7C15
    return _mix(_mix(seed) + (counter + 1) * increment)


def _mix(word: int) -> int:
    """Return SplitMix64's bijection of 64-bit words, which spreads every bit over all others."""
    mask = 0xFFFFFFFFFFFFFFFF
    word &= mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def _reject(name: str, given: object, accepted: str) -> NoReturn:
    raise ValueError(f"{name} must be {accepted}; got {given!r}")
