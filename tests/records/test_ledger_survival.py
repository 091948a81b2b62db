"""Ledgers of processes that are killed while they write."""

import hashlib
import random
import time

import pytest
from ledgers import KEY, write_ledger

from foreshock.records import Ledger, read_ledger, verify

WRITE_FOR_EVER = """
from foreshock.records import Ledger
ledger = Ledger(sys.argv[1], hmac_key=bytes(range(32)))
print("ready", flush=True)
while True:
    print(ledger.append("forget", text="x" * 200, numbers=[*range(2000)])["hash"], flush=True)
"""


def test_killed_writers_leave_all_that_was_appended_and_a_ledger_to_be_continued(
    tmp_path, start_python
):
    path = tmp_path / "ledger.jsonl"
    moments = random.Random(0)
    heads = []
    for _ in range(12):
        with start_python(WRITE_FOR_EVER, path) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.04))
            process.kill()
            heads += process.stdout.read().split("\n")[:-1]
        found = verify(path, head=heads[-1] if heads else None, hmac_key=KEY)
        assert found, found.problem
    hashes = [record["hash"] for record in read_ledger(path)]
    assert len(heads) > 12
    assert set(heads) <= set(hashes)
    torn_tails = [record for record in read_ledger(path) if record["event"] == "torn_tail"]
    assert len(torn_tails) == len(list(tmp_path.glob("ledger.jsonl.torn-*")))
    with Ledger(path, hmac_key=KEY) as ledger:
        assert ledger.append("retrain")["seq"] >= len(hashes) + 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize("num_missing", [2, 3, 100, -1])
@pytest.mark.parametrize("num_lines", [1, 3])
@pytest.mark.parametrize("keys", [{}, {"hmac_key": KEY, "signing_key": KEY}], ids=["", "keys"])
def test_a_torn_line_is_kept_beside_the_ledger_and_told_of_in_it(
    path, num_lines, num_missing, keys
):
    lines = write_ledger(path, num_lines, **keys)
    torn = lines[-1][:-num_missing] if num_missing > 0 else lines[-1][:1]
    path.write_bytes(b"".join(lines[:-1]) + torn)
    assert verify(path).torn_bytes == len(torn)
    with Ledger(path, **keys) as ledger:
        assert ledger.lines == num_lines
        ledger.append("retrain")
    assert verify(path, hmac_key=keys.get("hmac_key"))
    *before, told, after = read_ledger(path)
    assert len(before) == num_lines - 1
    assert (told["event"], told["bytes"], after["event"]) == ("torn_tail", len(torn), "retrain")
    assert told["sha256"] == hashlib.sha256(torn).hexdigest()
    assert (path.parent / told["kept_in"]).read_bytes() == torn


def test_a_line_that_lacks_only_its_end_is_completed(path):
    lines = write_ledger(path, 3)
    path.write_bytes(b"".join(lines)[:-1])
    with Ledger(path) as ledger:
        assert ledger.lines == 3
        ledger.append("retrain")
    assert path.read_bytes().startswith(b"".join(lines))
    assert verify(path).lines == 4
    assert list(path.parent.iterdir()) == [path]


def test_a_whole_line_of_another_place_without_its_end_is_no_line_of_this_ledger(path):
    lines = write_ledger(path, 3)
    path.write_bytes(b"".join(lines) + lines[1][:-1])
    with Ledger(path):
        pass
    assert verify(path).lines == 4
    assert read_ledger(path)[3]["event"] == "torn_tail"


def test_a_torn_line_longer_than_the_record_about_it_is_cut_off(path):
    lines = write_ledger(path, 2)
    torn = b"\0" * 100_000
    path.write_bytes(b"".join(lines) + torn)
    with Ledger(path):
        pass
    found = verify(path)
    assert (found.lines, found.torn_bytes) == (3, 0)
    assert (path.parent / read_ledger(path)[2]["kept_in"]).read_bytes() == torn


def test_a_torn_line_that_cannot_be_kept_is_left_where_it_is(path, monkeypatch):
    lines = write_ledger(path, 2)
    torn = b"".join(lines)[:-10]
    path.write_bytes(torn)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foreshock.records.ledger.write_atomically", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Ledger(path)
    assert path.read_bytes() == torn
    monkeypatch.undo()
    Ledger(path).close()
    assert verify(path).lines == 2
