"""What only the holder of a key can write: checked for every record alike."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any

from foreshock.records.ledger_chain import hmac_of
from foreshock.records.ledger_signature import is_signed_by

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class SealCheck:
    """Checks the HMAC and the signature of records, as far as there are keys for it.

    Args:
        hmac_key: None: the HMAC is not looked at.
        public_key: None: the signature is not looked at.
    """

    def __init__(self, hmac_key: bytes | None, public_key: Ed25519PublicKey | None) -> None:
        self._hmac_key = hmac_key
        self._public_key = public_key

    def problem(self, record: dict[str, Any]) -> str | None:
        """What is wrong with the seals of a record.

        Args:
            record: as it is written.

        Returns:
            Plain words; None if nothing is.
        """
        if self._hmac_key is not None:
            given = record.get("hmac")
            if not isinstance(given, str):
                return "it bears no HMAC: written by someone without the key"
            if not hmac.compare_digest(given.encode(), hmac_of(record, self._hmac_key).encode()):
                return "its HMAC does not fit: rewritten by someone without the key, or another key"
        if self._public_key is not None:
            if "signature" not in record:
                return "it bears no signature: written by someone without the key"
            if not is_signed_by(record, self._public_key):
                return (
                    "its signature does not fit: rewritten by someone without the key, or another "
                    "key"
                )
        return None
