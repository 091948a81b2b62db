"""Ed25519 signatures, made by the package `cryptography` (the extra "signing").

The only file of this room that needs more than the standard library, and only when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

from foreshock.records.ledger_chain import sealed_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    SigningKey: TypeAlias = Ed25519PrivateKey | bytes
    PublicKey: TypeAlias = Ed25519PublicKey | bytes

_RAW_KEY_BYTES = 32
_PREFIX = "ed25519:"


def load_signing_key(key: SigningKey) -> Ed25519PrivateKey:
    """Turns the argument `signing_key` into a key.

    Args:
        key: an Ed25519PrivateKey, its 32 raw bytes, or its PEM text (unencrypted) as bytes.

    Returns:
        The key.

    Raises:
        ImportError: `cryptography` is not installed; says how to install it.
        TypeError, ValueError: it is no such key.
    """
    _require_package("signing_key")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    accepted = "an Ed25519PrivateKey, its 32 bytes, or its unencrypted PEM as bytes"
    loaded: object = key
    if isinstance(key, bytes):
        if len(key) == _RAW_KEY_BYTES:
            return Ed25519PrivateKey.from_private_bytes(key)
        try:
            loaded = load_pem_private_key(key, password=None)
        except (TypeError, ValueError, UnsupportedAlgorithm):
            # Unchained: what the parser says could repeat a part of the key.
            raise ValueError(f"signing_key must be {accepted}; these bytes are neither") from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise TypeError(f"signing_key must be {accepted}, not {type(loaded).__name__}")
    return loaded


def load_public_key(key: PublicKey) -> Ed25519PublicKey:
    """Turns the argument `public_key` into a key.

    Args:
        key: an Ed25519PublicKey, its 32 raw bytes, or its PEM text as bytes.

    Returns:
        The key.

    Raises:
        ImportError: `cryptography` is not installed; says how to install it.
        TypeError, ValueError: it is no such key.
    """
    _require_package("public_key")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    accepted = "an Ed25519PublicKey, its 32 bytes, or its PEM as bytes"
    loaded: object = key
    if isinstance(key, bytes):
        if len(key) == _RAW_KEY_BYTES:
            return Ed25519PublicKey.from_public_bytes(key)
        try:
            loaded = load_pem_public_key(key)
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError(f"public_key must be {accepted}; these bytes are neither") from None
    if not isinstance(loaded, Ed25519PublicKey):
        raise TypeError(f"public_key must be {accepted}, not {type(loaded).__name__}")
    return loaded


def signature_of(record: dict[str, Any], key: Ed25519PrivateKey) -> str:
    """The signature of a record.

    Args:
        record: with or without it.
        key: the secret.

    Returns:
        "ed25519:" and 128 hexadecimal digits.
    """
    return _PREFIX + key.sign(sealed_bytes(record)).hex()


def is_signed_by(record: dict[str, Any], key: Ed25519PublicKey) -> bool:
    """Tells whether a record bears the signature of a key.

    Args:
        record: as it is written.
        key: the public key.

    Returns:
        True if it does.
    """
    from cryptography.exceptions import InvalidSignature

    signature = record.get("signature")
    if not isinstance(signature, str) or not signature.startswith(_PREFIX):
        return False
    try:
        key.verify(bytes.fromhex(signature.removeprefix(_PREFIX)), sealed_bytes(record))
    except (ValueError, InvalidSignature):
        return False
    return True


def _require_package(argument: str) -> None:
    try:
        importlib.import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError as error:
        raise ImportError(
            f"{argument} needs the package cryptography, which cannot be imported ({error}): "
            "pip install 'foreshock[signing]'"
        ) from error
