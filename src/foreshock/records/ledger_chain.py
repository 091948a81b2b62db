"""What the writer and the verifier of ledger.jsonl agree on: one record, and its link to the last.

A line is the canonical JSON of its record: keys sorted by code point, no spaces, UTF-8, floats as
the shortest text that gives them back. So one record has one spelling, and no byte of a line can
change unseen. With + for joined bytes:

    body      = the record without "hash", "hmac" and "signature"
    hmac      = HMAC-SHA-256(key, "foreshock ledger record\\n" + body)      if there is a key
    signature = Ed25519(key, "foreshock ledger record\\n" + body)           if there is a key
    hash      = SHA-256(the record without "hash")
    prev      = hash of the line before; 64 zeros in the first line
    seq       = number of the line, from 1
"""

import hashlib
import hmac
import json
import re
import secrets
from typing import Any

from foreshock.records.strict_json import load_json

GENESIS = "sha256:" + "0" * 64

MARKS = ("hash", "hmac", "signature")
RESERVED_FIELDS = ("event", "time", "seq", "prev", "private", *MARKS)

_HASH = re.compile("sha256:[0-9a-f]{64}")
_MIN_KEY_BYTES = 16
_RECORD_DOMAIN = b"foreshock ledger record\n"
_PRIVATE_DOMAIN = b"foreshock ledger private\n"
_SALT_BYTES = 16


def canonical_json(value: object) -> bytes:
    """Writes a JSON value in the one spelling that is hashed.

    Args:
        value: what `to_json_value` makes.

    Returns:
        UTF-8 without a line break.

    Raises:
        TypeError, ValueError: JSON cannot hold it.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def hash_of(record: dict[str, Any]) -> str:
    """The hash of a record, whether it bears one or not.

    Args:
        record: as it is written.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    content = {name: value for name, value in record.items() if name != "hash"}
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


def sealed_bytes(record: dict[str, Any]) -> bytes:
    """What the HMAC and the signature of a record are made over.

    Args:
        record: with or without them.

    Returns:
        Bytes that no other use of the same key has.
    """
    body = {name: value for name, value in record.items() if name not in MARKS}
    return _RECORD_DOMAIN + canonical_json(body)


def hmac_of(record: dict[str, Any], key: bytes) -> str:
    """The HMAC of a record.

    Args:
        record: with or without it.
        key: the secret.

    Returns:
        "hmac-sha256:" and 64 hexadecimal digits.
    """
    return "hmac-sha256:" + hmac.digest(key, sealed_bytes(record), "sha256").hex()


def checked_hash(head: str, name: str) -> str:
    """Checks an argument that is to be the hash of a line.

    Args:
        head: what came.
        name: of the argument.

    Returns:
        What came.

    Raises:
        TypeError: it is not text.
        ValueError: it is no hash.
    """
    if not isinstance(head, str):
        raise TypeError(f"{name} must be text, not {type(head).__name__}")
    if not _HASH.fullmatch(head):
        raise ValueError(f"{name} must be sha256: and 64 digits of 0-9a-f, not {head[:100]!r}")
    return head


def checked_key(key: bytes) -> bytes:
    """Checks the argument `hmac_key` of a public function.

    Args:
        key: what came.

    Returns:
        What came.

    Raises:
        TypeError: it is not bytes.
        ValueError: it is so short that it can be guessed.
    """
    if not isinstance(key, bytes):
        raise TypeError(f"hmac_key must be bytes, not {type(key).__name__}")
    if len(key) < _MIN_KEY_BYTES:
        raise ValueError(f"hmac_key must have at least {_MIN_KEY_BYTES} bytes, not {len(key)}")
    return key


def parse_line(line: bytes) -> dict[str, Any]:
    """Reads a line and checks it by itself: its spelling, and that its hash fits.

    Args:
        line: without its line break.

    Returns:
        The record.

    Raises:
        ValueError: says in plain words what is wrong.
    """
    try:
        record = load_json(line)
        is_canonical = isinstance(record, dict) and canonical_json(record) == line
    except (ValueError, RecursionError):
        raise ValueError("altered: it is not a record in JSON") from None
    if not is_canonical:
        raise ValueError("altered: it is not a record in the ledger's spelling of JSON")
    if record.get("hash") != hash_of(record):
        raise ValueError("altered: its content does not fit its hash")
    if type(record.get("seq")) is not int:
        raise ValueError("altered: its seq is no number")
    return record  # type: ignore[no-any-return]


def check_link(record: dict[str, Any], seq: int, prev: str) -> None:
    """Checks that a record, sound by itself, stands where it belongs.

    Args:
        record: from `parse_line`.
        seq: the number of the line.
        prev: the hash of the line before.

    Raises:
        ValueError: says in plain words what is wrong.
    """
    found = record["seq"]
    if found > seq:
        raise ValueError(
            f"it was written as line {found}: what stood between is removed or reordered"
        )
    if found < seq:
        raise ValueError(f"it was written as line {found}: inserted again or reordered")
    if record.get("prev") != prev:
        raise ValueError("it does not continue the line before: one of the two is inserted")


def private_digest(field: str, value: object, key: bytes, salt: bytes | None = None) -> str:
    """The digest that stands in the ledger for a private value.

    HMAC-SHA-256(key, domain + salt + canonical JSON of [field, value]). The salt makes the digests
    of equal values differ, the field's name those of two fields.

    Args:
        field: its name.
        value: text, number, boolean, None, or lists and string-keyed dicts of these.
        key: the secret.
        salt: 16 bytes; new random ones if None.

    Returns:
        "hmac-sha256:", the salt, ":", the digest, in hexadecimal digits.

    Raises:
        TypeError, ValueError: the value is something else; its text is not repeated.
    """
    salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
    try:
        message = canonical_json([field, value])
    except (TypeError, ValueError, RecursionError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"private[{field!r}] must be text, a finite number, a boolean, None, or lists and "
            f"dicts of these, not {type(value).__name__}"
        ) from None
    digest = hmac.digest(key, _PRIVATE_DOMAIN + salt + message, "sha256")
    return f"hmac-sha256:{salt.hex()}:{digest.hex()}"


def is_private_value(record: dict[str, Any], field: str, value: object, *, hmac_key: bytes) -> bool:
    """Tells whether a record's private field holds the digest of this value.

    Args:
        record: of the ledger, as `read_ledger` gives it.
        field: the name that the value had in `private={...}`.
        value: what it is thought to have been.
        hmac_key: the ledger's.

    Returns:
        True if it was this value.

    Raises:
        KeyError: the record has no such private field.
        TypeError, ValueError: an argument is not what it should be, or the digest is none.
    """
    stored = record.get("private", {})[field]
    try:
        salt = bytes.fromhex(stored.split(":")[1])
    except (AttributeError, IndexError, ValueError):
        raise ValueError(f"record holds no digest under private[{field!r}]") from None
    expected = private_digest(field, value, checked_key(hmac_key), salt)
    return hmac.compare_digest(expected.encode(), stored.encode())
