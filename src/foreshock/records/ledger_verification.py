"""Reads ledger.jsonl, and finds the first line that is not as it was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreshock.records.ledger_chain import (
    GENESIS,
    check_link,
    checked_hash,
    checked_key,
    parse_line,
)
from foreshock.records.ledger_seals import SealCheck
from foreshock.records.ledger_signature import load_public_key
from foreshock.records.posix_file import checked_path
from foreshock.records.strict_json import decode_nonfinite_texts, load_json
from foreshock.records.summary import read_summary

if TYPE_CHECKING:
    from foreshock.records.ledger_signature import PublicKey

_TEXT_FIELDS = frozenset({"event", "time"})
_LEDGER_NAME = "ledger.jsonl"
_SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class Verification:
    """What a ledger turned out to be.

    Attributes:
        is_intact: nothing that was looked at is wrong. An unfinished last line alone, which a kill
            leaves, is no fault; `torn_bytes` tells of it.
        lines: whole lines that are as they should be, from the first on.
        head: hash of the last of them; "sha256:" and 64 zeros if there is none.
        first_bad_line: number, from 1, of the first line that is not what has to stand there; one
            more than there are lines if the end is missing. None if is_intact.
        problem: what is wrong with it, in plain words. None if is_intact.
        is_keyed: an hmac_key was given, and the HMAC of every line fits.
        is_signed: a public_key was given, and the signature of every line fits.
        head_line: number of the line whose hash is the head that was given: up to there nothing is
            cut off. 0 if that head is the one of an empty ledger, None if no head was given, or it
            was not found.
        torn_bytes: length of the unfinished last line, 0 if there is none.
    """

    is_intact: bool
    lines: int
    head: str
    first_bad_line: int | None
    problem: str | None
    is_keyed: bool
    is_signed: bool
    head_line: int | None
    torn_bytes: int

    def __bool__(self) -> bool:
        return self.is_intact


def verify(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    hmac_key: bytes | None = None,
    public_key: PublicKey | None = None,
) -> Verification:
    """Checks a ledger, also one that is being written, line by line from the first.

    Line n must be in the ledger's spelling, fit its own hash, say that it is line n, and hold the
    hash of line n - 1; the first that does not is named. So for a line that was removed it is the
    line now in its place; for one inserted, that one; for two swapped, the upper one. Whoever
    writes a line anew with a hash that fits gives himself away in the line after it; in the last
    line, or if he writes all lines anew, only to a `head` or a key.

    Args:
        path: the file.
        head: the hash of a line that must be there, such as the "ledger_head" of summary.json. It
            is the only thing that shows a missing end. Lines behind it are no fault.
        hmac_key: the secret that the ledger was written with.
        public_key: the Ed25519 public key (of the package `cryptography`; or its 32 bytes; or its
            PEM, as bytes) that belongs to its signing_key.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        OSError: the file cannot be read.
        TypeError, ValueError: an argument is not what it should be.
        ImportError: there is a public_key, but no package `cryptography`.

    Cost: one pass, one line in memory at a time; tens of microseconds a line, and with a
    public_key some hundreds.
    """
    file = checked_path(path)
    wanted = None if head is None else checked_hash(head, "head")
    seals = SealCheck(
        None if hmac_key is None else checked_key(hmac_key),
        None if public_key is None else load_public_key(public_key),
    )
    lines, last, head_line = 0, GENESIS, 0 if wanted == GENESIS else None
    problem: str | None = None
    torn_bytes = 0
    for line in _lines(file):
        if not line.endswith(b"\n"):
            torn_bytes = len(line)
            break
        try:
            last = _checked_hash_of(line[:-1], lines + 1, last, seals)
        except ValueError as error:
            problem = str(error)
            break
        lines += 1
        if last == wanted:
            head_line = lines
    if problem is None and wanted is not None and head_line is None:
        problem = (
            "the line is unfinished, and the head is not found before it: the end is cut off"
            if torn_bytes
            else "the line is missing: no line has the head as its hash, so the end is cut off, or "
            "all was written anew"
        )
    return Verification(
        is_intact=problem is None,
        lines=lines,
        head=last,
        first_bad_line=None if problem is None else lines + 1,
        problem=problem,
        is_keyed=problem is None and hmac_key is not None,
        is_signed=problem is None and public_key is not None,
        head_line=head_line,
        torn_bytes=torn_bytes,
    )


def read_ledger(
    path: str | os.PathLike[str], *, decode_nonfinite: bool = True
) -> list[dict[str, Any]]:
    """Reads the records of a ledger without verifying them; an unfinished last line is left out.

    Args:
        path: the file.
        decode_nonfinite: give the texts "NaN", "Infinity" and "-Infinity" back as floats.

    Returns:
        The records, oldest first.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: the path is a directory.
        ValueError: a whole line is not one JSON object; says which.

    Cost: one pass; all records are held in memory.
    """
    records = []
    for number, line in enumerate(_lines(checked_path(path)), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = load_json(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"path {os.fspath(path)!r} holds no JSON object in line {number}")
        if decode_nonfinite:
            for name in record.keys() - _TEXT_FIELDS:
                record[name] = decode_nonfinite_texts(record[name])
        records.append(record)
    return records


def head_in_summary(path: str | os.PathLike[str]) -> str | None:
    """Looks up the head that a run has left in the summary beside its ledger.

    Args:
        path: the ledger.

    Returns:
        The head; None if the ledger is not a run's `ledger.jsonl`, there is no summary, or none is
        named in it.

    Raises:
        OSError, ValueError: there is a summary, but it cannot be read, or its head is none.
    """
    ledger = checked_path(path)
    if ledger.name != _LEDGER_NAME:
        return None
    try:
        head = read_summary(ledger.with_name(_SUMMARY_NAME)).get("ledger_head")
    except FileNotFoundError:
        return None
    return None if head is None else checked_hash(head, f"ledger_head in {_SUMMARY_NAME}")


def _lines(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as lines:
        yield from lines


def _checked_hash_of(line: bytes, seq: int, prev: str, seals: SealCheck) -> str:
    record = parse_line(line)
    check_link(record, seq, prev)
    problem = seals.problem(record)
    if problem is not None:
        raise ValueError(problem)
    return str(record["hash"])
