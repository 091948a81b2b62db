"""What the verification of a ledger proves, and what it does not, in words."""

from collections.abc import Iterator

from foreshock.records.ledger_verification import Verification


def tell_limits(found: Verification, head_source: str) -> Iterator[str]:
    """Tells what a ledger that is intact proves, and what it does not.

    Args:
        found: what `verify` has returned.
        head_source: where the head came from, as "summary.json".

    Yields:
        Sentences of one line.
    """
    if found.torn_bytes:
        yield (
            f"line {found.lines + 1} is unfinished ({found.torn_bytes} bytes): it is being "
            "written, a kill has torn it, or it was cut"
        )
    if found.head_line is None:
        yield "not proven: that no lines are missing at the end; give --head"
    else:
        added = found.lines - found.head_line
        yield f"complete up to line {found.head_line}, the head in {head_source}" + (
            f"; behind it {tell_lines(added)}" if added else ""
        )
    if found.is_keyed:
        yield "every line bears the HMAC of the key"
    if found.is_signed:
        yield "every line bears the signature of the key"
    if not (found.is_keyed or found.is_signed):
        yield (
            "not proven: that nobody wrote the whole chain anew; give --key-file or --public-key "
            "for a ledger that was written with a key, or a --head that was kept elsewhere"
        )


def tell_lines(number: int) -> str:
    """A number of lines, in words."""
    return "1 line" if number == 1 else f"{number} lines"
