"""Writes ledger.jsonl: events that must not be lost, altered or taken out unseen."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foreshock.records.atomic_file import write_atomically
from foreshock.records.event_name import check_event_name
from foreshock.records.ledger_chain import (
    GENESIS,
    RESERVED_FIELDS,
    canonical_json,
    check_link,
    checked_key,
    hash_of,
    hmac_of,
    parse_line,
    private_digest,
)
from foreshock.records.ledger_seals import SealCheck
from foreshock.records.ledger_signature import load_signing_key, signature_of
from foreshock.records.locked_file import LockedFile
from foreshock.records.posix_file import checked_path
from foreshock.records.strict_json import JsonValue, to_json_object
from foreshock.records.timestamp import format_utc

if TYPE_CHECKING:
    from foreshock.records.ledger_signature import SigningKey

_logger = logging.getLogger("foreshock")

POLICIES = ("ttl", "compliance", "drift", "guard")


class LedgerEntry(NamedTuple):
    """A record that is still without its place in the chain."""

    time_ns: int
    content: dict[str, JsonValue]


class _Tip(NamedTuple):
    """Where the chain stands; replaced in one step, so that no interruption can tear it."""

    size: int
    seq: int
    head: str


class Ledger:
    """Appends records to a ledger, each bound to the one before by its hash.

    `ledger_chain` has the format. A record is on disk, synced, when `append` returns. An existing
    file is continued. One that a kill has left with a torn last line is repaired: if the line only
    lacks its end it gets it, else it is moved to `<name>.torn-<digest>` beside the ledger, and a
    record `torn_tail` says so. A record that cannot be written is taken back, so that the chain
    stays whole; the next one tries anew.

    One writer at a time holds the file, by a lock that ends with the process. Any number of threads
    may share it. After a fork the parent has it.

    Args:
        path: the file; missing parent directories are created.
        hmac_key: a secret of at least 16 bytes; every record then bears its HMAC-SHA-256, and
            `private` can be used. It is never written down.
        signing_key: an Ed25519 private key (of the package `cryptography`; or its 32 bytes; or its
            unencrypted PEM, as bytes); every record then bears its signature.
        redact: replace texts of more than 256 characters by their length and digest. Values under
            keys that name secrets are redacted whatever this says.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: path is empty; a key is no key; the last line is not whole in itself, or was
            written with other keys than these. `verify` says more.
        ImportError: there is a signing_key, but no package `cryptography`.
        BlockingIOError: the file is being written by another Ledger.
        OSError: path cannot be opened for writing; the error names it.

    Cost: opening reads the last line only, whatever the size of the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        hmac_key: bytes | None = None,
        signing_key: SigningKey | None = None,
        redact: bool = True,
    ) -> None:
        self._path = checked_path(path)
        self._redact = redact
        self._hmac_key = None if hmac_key is None else checked_key(hmac_key)
        self._signing_key = None if signing_key is None else load_signing_key(signing_key)
        self._process_id = os.getpid()
        # Reentrant, as a signal handler may interrupt an append: it must get an error, not wait.
        self._write_lock = threading.RLock()
        self._is_writing = False
        self._has_debris = False
        self._is_closed = False
        self._count_lock = threading.RLock()
        self._num_lost = 0
        self._file = LockedFile(self._path)
        try:
            self._tip = self._continue_chain()
        except BaseException:
            self._file.close()
            raise

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def head(self) -> str:
        """The hash of the last record: who keeps it elsewhere can prove that nothing was cut off.

        "sha256:" and 64 zeros while there is none.
        """
        return self._tip.head

    @property
    def lines(self) -> int:
        """How many records the file holds, earlier runs included."""
        return self._tip.seq

    @property
    def lost_records(self) -> int:
        """How many records `try_append` and a `TelemetryWriter` could not write."""
        return self._num_lost

    def append(
        self, /, event: str, *, private: Mapping[str, object] | None = None, **fields: object
    ) -> dict[str, Any]:
        """Appends one record, stamped with the present time, and waits until it is on disk.

        Args:
            event: its name ("forget").
            private: values of which only a digest is written (see `is_private_value`): text,
                numbers, booleans, None, lists and dicts of these.
            **fields: what to record. How each kind of value is written is told in
                `foreshock.records.strict_json`.

        Returns:
            The record as it is written.

        Raises:
            TypeError, ValueError: an argument is not what it should be; a field has one of the
                names that the ledger itself writes; private is given, but the ledger has no key.
            RuntimeError: the ledger is closed; this is a forked child, or a signal handler that
                interrupts an append.
            OSError: it cannot be written (disk full, file removed). The file is as it was before.

        Cost: a sync, milliseconds on a real disk. `TelemetryWriter.write_to_ledger` does not wait.
        """
        return self._append(self.prepare(event, fields, private))

    def try_append(
        self, /, event: str, *, private: Mapping[str, object] | None = None, **fields: object
    ) -> bool:
        """As `append`, for a training loop: a disk that fails is counted, and warned of once.

        Args:
            event: as for `append`.
            private: as for `append`.
            **fields: as for `append`.

        Returns:
            True if the record is on disk.

        Raises:
            TypeError, ValueError: as `append`.
        """
        return self.write(self.prepare(event, fields, private))

    def forget(
        self,
        *,
        policy: str,
        scope: Mapping[str, object],
        evidence: Mapping[str, object] | None = None,
        operator: str = "auto",
        private: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Appends the tombstone of something that the model, or its data, no longer has.

        Args:
            policy: why: "ttl", "compliance", "drift" or "guard".
            scope: what: `{"layers": [...], "datasets": [...]}`.
            evidence: the numbers that led to it.
            operator: who.
            private: as for `append`.

        Returns:
            The record as it is written.

        Raises:
            TypeError, ValueError, RuntimeError, OSError: as `append`.

        Cost: as `append`.
        """
        named = _tombstone(policy, scope, evidence, operator)
        return self.append("forget", private=private, **named)

    def retrain(
        self,
        *,
        policy: str,
        scope: Mapping[str, object],
        evidence: Mapping[str, object] | None = None,
        operator: str = "auto",
        private: Mapping[str, object] | None = None,
    ) -> dict[str, Any]:
        """Appends the record that something was trained anew; everything else as for `forget`."""
        named = _tombstone(policy, scope, evidence, operator)
        return self.append("retrain", private=private, **named)

    def close(self) -> None:
        """Lets others write the file. Again is harmless; nothing is ever left to be written."""
        if os.getpid() != self._process_id:
            return
        with self._write_lock:
            self._is_closed = True
            self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- for the thread of the TelemetryWriter

    def prepare(
        self,
        event: str,
        fields: Mapping[str, object],
        private: Mapping[str, object] | None = None,
    ) -> LedgerEntry:
        """Checks and copies what `append` is given; `write` then appends it.

        Args:
            event: as for `append`.
            fields: as for `append`.
            private: as for `append`.

        Returns:
            The record without its place in the chain, stamped with the present time.

        Raises:
            TypeError, ValueError: as `append`.
        """
        check_event_name(event)
        reserved = sorted({*RESERVED_FIELDS} & fields.keys())
        if reserved:
            raise ValueError(f"fields must not hold {reserved}, which the ledger itself writes")
        content: dict[str, JsonValue] = {
            "event": event,
            **to_json_object(fields, redact=self._redact),
        }
        if private is not None:
            content["private"] = self._digests(private)
        return LedgerEntry(time.time_ns(), content)

    def write(self, entry: LedgerEntry) -> bool:
        """Appends what `prepare` has made; a failure is counted, and warned of once.

        Args:
            entry: the record.

        Returns:
            True if it is on disk.
        """
        try:
            self._append(entry)
        except Exception as error:  # whatever it is, training goes on
            self.lose(1, str(error))
            return False
        return True

    def lose(self, num_records: int, reason: str) -> None:
        """Counts records that did not get as far as the file, and warns the first time.

        Args:
            num_records: how many.
            reason: why, for the warning.
        """
        # In a forked child the lock may be held by a thread that the fork did not copy.
        is_child = os.getpid() != self._process_id
        with contextlib.nullcontext() if is_child else self._count_lock:
            is_first = self._num_lost == 0
            self._num_lost += num_records
        if is_first:
            # A broken log handler is one more thing that must not stop training.
            with contextlib.suppress(Exception):
                _logger.warning(
                    "the ledger %s is incomplete: %s. Training goes on; lost_records counts what "
                    "is missing, and this is the only warning.",
                    self._path,
                    reason,
                )

    # ---- the chain

    def _append(self, entry: LedgerEntry) -> dict[str, Any]:
        if os.getpid() != self._process_id:
            raise RuntimeError("the ledger was opened before a fork: only the parent may append")
        with self._write_lock:
            if self._is_closed:
                raise RuntimeError("the ledger is closed")
            if self._is_writing:
                raise RuntimeError("append was called by what had interrupted it, a signal handler")
            self._is_writing = True
            try:
                if self._has_debris:
                    self._file.cut(self._tip.size)
                    self._has_debris = False
                self._file.check_unchanged(self._tip.size)
                return self._put(entry)
            finally:
                self._is_writing = False

    def _put(self, entry: LedgerEntry) -> dict[str, Any]:
        record = self._chained(entry)
        line = canonical_json(record) + b"\n"
        try:
            self._file.write_synced(line, self._tip.size)
            self._tip = _Tip(self._tip.size + len(line), record["seq"], record["hash"])
        except BaseException:
            self._take_back()
            raise
        return record

    def _take_back(self) -> None:
        try:
            self._file.cut(self._tip.size)
        except OSError:
            self._has_debris = True

    def _chained(self, entry: LedgerEntry) -> dict[str, Any]:
        record: dict[str, Any] = {
            **entry.content,
            "time": format_utc(entry.time_ns),
            "seq": self._tip.seq + 1,
            "prev": self._tip.head,
        }
        seals = {}
        if self._hmac_key is not None:
            seals["hmac"] = hmac_of(record, self._hmac_key)
        if self._signing_key is not None:
            seals["signature"] = signature_of(record, self._signing_key)
        record |= seals
        record["hash"] = hash_of(record)
        return record

    def _digests(self, private: Mapping[str, object]) -> dict[str, JsonValue]:
        if not isinstance(private, Mapping):
            raise TypeError(f"private must be a mapping, not {type(private).__name__}")
        if self._hmac_key is None:
            raise ValueError(
                "private needs a ledger that was opened with hmac_key: without a secret, what is "
                "hidden could be guessed from its digest"
            )
        for field in private:
            if not isinstance(field, str) or not field.isprintable():
                raise TypeError(f"private must have printable texts as keys, not {field!r}")
        return {
            field: private_digest(field, value, self._hmac_key) for field, value in private.items()
        }

    # ---- what is there already

    def _continue_chain(self) -> _Tip:
        last_line, torn = self._file.read_tail()
        size = self._file.size() - len(torn)
        self._tip = _Tip(size, 0, GENESIS)
        if last_line is not None:
            self._tip = self._tip_behind(last_line, size)
        if torn and not self._complete(torn):
            self._set_aside(torn)
        return self._tip

    def _tip_behind(self, line: bytes, size: int) -> _Tip:
        try:
            record = parse_line(line)
        except ValueError as error:
            raise ValueError(
                f"path {str(self._path)!r} cannot be continued: of its last line, {error}. Keep it "
                "as evidence under another name, and a new ledger is begun"
            ) from None
        self._check_keys(record)
        return _Tip(size, record["seq"], record["hash"])

    def _check_keys(self, last_record: dict[str, Any]) -> None:
        public_key = None if self._signing_key is None else self._signing_key.public_key()
        for argument, seal, is_given in (
            ("hmac_key", "hmac", self._hmac_key is not None),
            ("signing_key", "signature", public_key is not None),
        ):
            if is_given != (seal in last_record):
                raise ValueError(
                    f"{argument} must {'not ' if is_given else ''}be given: the records in path "
                    f"{str(self._path)!r} bear {'no' if is_given else 'a'} {seal}, and a ledger is "
                    "continued as it was begun"
                )
        problem = SealCheck(self._hmac_key, public_key).problem(last_record)
        if problem is not None:
            raise ValueError(
                f"path {str(self._path)!r} cannot be continued with these keys: of its last line, "
                f"{problem}"
            )

    def _complete(self, torn: bytes) -> bool:
        """Ends a line of which a kill has spared everything but its line break."""
        try:
            record = parse_line(torn)
            check_link(record, self._tip.seq + 1, self._tip.head)
            self._check_keys(record)
        except ValueError:
            return False
        size = self._tip.size + len(torn)
        self._file.write_synced(b"\n", size)
        self._tip = _Tip(size + 1, record["seq"], record["hash"])
        return True

    def _set_aside(self, torn: bytes) -> None:
        digest = hashlib.sha256(torn).hexdigest()
        kept_in = self._path.with_name(f"{self._path.name}.torn-{digest[:16]}")
        write_atomically(kept_in, torn)
        # Written over the torn line, and what is left of that cut off afterwards: there is no
        # moment at which neither of the two is in the file.
        evidence = {"bytes": len(torn), "sha256": digest, "kept_in": kept_in.name}
        self._put(self.prepare("torn_tail", evidence))


def _tombstone(
    policy: str,
    scope: Mapping[str, object],
    evidence: Mapping[str, object] | None,
    operator: str,
) -> dict[str, object]:
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {policy!r}")
    for name, value in (("scope", scope), ("evidence", evidence)):
        if not isinstance(value, Mapping) and (name, value) != ("evidence", None):
            raise TypeError(f"{name} must be a mapping, not {type(value).__name__}")
    if not isinstance(operator, str):
        raise TypeError(f"operator must be text, not {type(operator).__name__}")
    return {"policy": policy, "scope": scope, "evidence": evidence or {}, "operator": operator}
