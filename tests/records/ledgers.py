"""Ledgers to be tampered with."""

from foreshock.records import Ledger

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


def write_ledger(path, num_lines, **keys):
    """Writes a ledger of different lines; gives its lines as they are in the file."""
    path.unlink(missing_ok=True)
    with Ledger(path, **keys) as ledger:
        for number in range(num_lines):
            ledger.append("forget", scope={"layers": [f"Schicht {number} ä"]}, theta=number / 3)
    return path.read_bytes().splitlines(keepends=True)
