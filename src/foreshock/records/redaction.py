"""What must not reach the disk: secrets, recognised by their key, and long texts.

A key is cut into words at everything that is not a letter and at camelCase borders, so "monkey" is
one word and holds no "key". Its words then decide:

- A secret word (password, secret, credential, authorization and their spellings), or "token"/"key"
  right after a word that makes a credential of it ("api_key", "accessToken", "x-auth-token"):
  everything under the key is redacted.
- "token" or "key" as the only word ("token", "key_2"): text and integers are redacted, at any
  depth. Other floats stay: no secret is one, and attention has statistics of query, key, value.
- "token" or "key" among other words, or the bare plural ("tokens_per_second", "num_tokens",
  "attention.self.key.weight", "tokens"): these are names of metrics and layers as often as of
  secrets. Text under them is redacted, at any depth; numbers stay.

A redacted secret keeps neither length nor digest: a short one could be guessed from its digest. A
long text keeps both, so that two of them can be told apart. A secret inside an innocent value (a
password in an address, say) is not recognised.
"""

import hashlib
import re
from enum import IntEnum
from functools import lru_cache

MAX_TEXT_CHARACTERS = 256

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORD = re.compile(
    "passwords?|passwd|pwd|passphrases?|secrets?|credentials?|authori[sz]ation|auth"
    "|(api|access|auth|private|secret)(keys?|tokens?)"
)
_AMBIGUOUS_WORD = re.compile("(token|key)s?")
_BARE_WORDS = (["token"], ["key"])
_CREDENTIAL_PREFIX = re.compile(
    "access|api|bearer|client|encryption|private|refresh|session|signing|ssh"
)


class Secrecy(IntEnum):
    """How much of what stands under a key is hidden; more is greater."""

    NOTHING = 0
    TEXT = 1
    TEXT_AND_INTEGERS = 2
    EVERYTHING = 3


def secrecy_of_key(key: str) -> Secrecy:
    """Tells from a key how much of the value under it must be hidden.

    Args:
        key: the key as the user spelt it, in snake, kebab, camel or dotted case.

    Returns:
        How much; the module's text says what decides.

    Cost: a dictionary look-up for a key seen before, some microseconds for a new one.
    """
    # The cache must not keep long keys alive.
    return _judge_cached(key) if len(key) <= MAX_TEXT_CHARACTERS else _judge(key)


def _judge(key: str) -> Secrecy:
    words = [word.lower() for word in _WORD.findall(key)]
    if any(_SECRET_WORD.fullmatch(word) for word in words):
        return Secrecy.EVERYTHING
    before_ambiguous = [
        previous
        for previous, word in zip(["", *words], words, strict=False)
        if _AMBIGUOUS_WORD.fullmatch(word)
    ]
    if any(_CREDENTIAL_PREFIX.fullmatch(word) for word in before_ambiguous):
        return Secrecy.EVERYTHING
    if words in _BARE_WORDS:
        return Secrecy.TEXT_AND_INTEGERS
    return Secrecy.TEXT if before_ambiguous else Secrecy.NOTHING


_judge_cached = lru_cache(maxsize=4096)(_judge)


def redacted_secret() -> dict[str, bool]:
    """What stands in the file in place of a secret: `{"redacted": true}`."""
    return {"redacted": True}


def redacted_text(text: str) -> dict[str, bool | int | str]:
    """What stands in the file in place of a long text.

    Args:
        text: any text without lone surrogates.

    Returns:
        `{"redacted": true, "length": characters, "sha256": hexadecimal digest of the UTF-8}`.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"redacted": True, "length": len(text), "sha256": digest}
