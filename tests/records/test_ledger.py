"""What the ledger writes, and that nothing makes it write anything else."""

import errno
import gc
import hashlib
import json
import logging
import os
import re
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from json_like import is_same, json_like
from ledgers import KEY, OTHER_KEY, write_ledger

from foreshock.records import Ledger, is_private_value, read_ledger, verify, write_atomically
from foreshock.records.locked_file import LockedFile

ZEROS = "sha256:" + "0" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# What is written


def test_line_has_the_documented_shape_and_its_hash_can_be_computed_by_hand(path):
    with Ledger(path) as ledger:
        record = ledger.forget(
            policy="ttl",
            scope={"layers": ["a"], "datasets": ["ü"]},
            evidence={"theta": 0.42, "f_total": -0.8, "precursor_z": float("inf")},
        )
    line = path.read_text().removesuffix("\n")
    time = re.search(r'"time":"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)"', line)[1]
    body = (
        '{"event":"forget","evidence":{"f_total":-0.8,"precursor_z":"Infinity","theta":0.42},'
        '"operator":"auto","policy":"ttl","prev":"' + ZEROS + '",'
        '"scope":{"datasets":["ü"],"layers":["a"]},"seq":1,"time":"' + time + '"}'
    )
    digest = "sha256:" + hashlib.sha256(body.encode()).hexdigest()
    assert line == body.replace('"operator"', f'"hash":"{digest}","operator"')
    assert record == json.loads(line)
    assert ledger.head == digest


def test_records_are_numbered_and_chained(path):
    with Ledger(path) as ledger:
        assert (ledger.head, ledger.lines) == (ZEROS, 0)
        records = [ledger.append("lr_changed", lr=lr) for lr in (0.1, 0.01, 0.001)]
        records.append(ledger.retrain(policy="drift", scope={"layers": ["a"]}, operator="me"))
        assert (ledger.head, ledger.lines) == (records[3]["hash"], 4)
    assert [r["seq"] for r in records] == [1, 2, 3, 4]
    assert [r["prev"] for r in records] == [ZEROS, *(r["hash"] for r in records[:3])]
    assert records[3]["operator"] == "me"
    assert read_ledger(path) == records
    assert verify(path).head == ledger.head


def test_a_ledger_is_continued(path):
    for num_runs in range(1, 4):
        with Ledger(path, hmac_key=KEY) as ledger:
            ledger.append("forget", run=num_runs)
        assert verify(path, hmac_key=KEY).lines == num_runs
    assert [r["run"] for r in read_ledger(path)] == [1, 2, 3]


def test_a_ledger_of_long_lines_is_continued(path):
    for num_runs in range(1, 4):
        with Ledger(path, redact=False) as ledger:
            ledger.append("forget", text="x" * 200_000)
        assert verify(path).lines == num_runs


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(json_like)
def test_whatever_is_written_is_verified_and_read_back(path, value):
    path.unlink(missing_ok=True)
    with Ledger(path) as ledger:
        ledger.append("forget", value=value, numbers=[5e-324, -0.0, 1.7976931348623157e308])
        ledger.append("forget")
    assert verify(path)
    record = read_ledger(path)[0]
    assert is_same(record["value"], value)
    assert str(record["numbers"]) == "[5e-324, -0.0, 1.7976931348623157e+308]"


def test_secrets_and_keys_never_and_long_texts_only_on_demand_reach_the_file(path):
    with Ledger(path, hmac_key=KEY) as ledger:
        ledger.append("forget", api_key="hunter2", text="x" * 300)
    contents = path.read_bytes()
    for secret in (b"hunter2", KEY, KEY.hex().encode(), b"x" * 300):
        assert secret not in contents


def test_field_may_be_called_self(path):
    with Ledger(path) as ledger:
        assert ledger.append("forget", self=1)["self"] == 1


def test_lines_of_many_threads_are_one_chain(path):
    with Ledger(path) as ledger:
        threads = [
            threading.Thread(target=lambda: [ledger.append("forget") for _ in range(20)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify(path).lines == 80


# Private values


def test_private_values_are_digests_that_the_key_opens(path):
    with Ledger(path, hmac_key=KEY) as ledger:
        record = ledger.append("forget", private={"user": "alice", "password": [1, "x"]})
    contents = path.read_text()
    assert "alice" not in contents
    assert hashlib.sha256(b"alice").hexdigest() not in contents
    assert is_private_value(record, "user", "alice", hmac_key=KEY)
    assert is_private_value(record, "password", [1, "x"], hmac_key=KEY)
    assert not is_private_value(record, "user", "bob", hmac_key=KEY)
    assert not is_private_value(record, "user", "alice", hmac_key=OTHER_KEY)


def test_equal_private_values_have_different_digests(path):
    with Ledger(path, hmac_key=KEY) as ledger:
        records = [ledger.append("forget", private={"a": "x", "b": "x"}) for _ in range(2)]
    digests = [digest.split(":") for r in records for digest in r["private"].values()]
    assert len({digest for _, _, digest in digests}) == 4
    swapped = {"private": {"a": records[0]["private"]["b"]}}
    assert not is_private_value(swapped, "a", "x", hmac_key=KEY)


def test_private_values_need_a_key(path):
    with Ledger(path) as ledger, pytest.raises(ValueError, match="opened with hmac_key"):
        ledger.append("forget", private={"user": "alice"})
    assert path.read_bytes() == b""


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, "\udc80", b"raw"])
def test_private_values_that_have_no_one_spelling_are_refused_and_not_repeated(path, value):
    with (
        Ledger(path, hmac_key=KEY) as ledger,
        pytest.raises((TypeError, ValueError), match=r"private\['user'\] must be text") as caught,
    ):
        ledger.append("forget", private={"user": value})
    assert repr(value) not in str(caught.value)
    assert path.read_bytes() == b""


def test_a_record_without_the_digest_asked_for_is_an_error(path):
    with pytest.raises(KeyError):
        is_private_value({}, "user", "alice", hmac_key=KEY)
    with pytest.raises(ValueError, match=r"no digest under private\['user'\]"):
        is_private_value({"private": {"user": "x"}}, "user", "alice", hmac_key=KEY)


# One writer


def test_a_second_writer_is_refused_until_the_first_has_closed(path):
    with Ledger(path) as ledger:
        ledger.append("forget")
        with pytest.raises(BlockingIOError, match=r"being written, in this process or another"):
            Ledger(path)
        ledger.append("forget")
    with Ledger(path) as ledger:
        ledger.append("forget")
    assert verify(path).lines == 3


def test_a_writer_in_another_process_is_refused(path, run_python):
    script = """
from foreshock.records import Ledger
try:
    Ledger(sys.argv[1])
except BlockingIOError as error:
    print(error.filename)
"""
    with Ledger(path):
        assert run_python(script, path) == f"{path}\n"


def test_a_forgotten_ledger_does_not_keep_its_file(path):
    Ledger(path).append("forget")
    gc.collect()
    with Ledger(path) as ledger:
        ledger.append("forget")
    assert verify(path).lines == 2


def test_a_forked_child_neither_writes_nor_takes_the_lock_from_its_parent(path, run_python):
    script = """
import gc, os, logging
from foreshock.records import Ledger
logging.disable()
ledger = Ledger(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        ledger.append("forget")
    except RuntimeError as error:
        assert "before a fork" in str(error)
    else:
        os._exit(1)
    assert not ledger.try_append("forget") and ledger.lost_records == 1
    ledger.close()
    del ledger
    gc.collect()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
try:
    Ledger(sys.argv[1])
except BlockingIOError:
    print(ledger.append("forget")["seq"])
"""
    assert run_python(script, path) == "1\n"


def test_a_child_that_lives_on_does_not_keep_the_file_from_the_next_writer(path, run_python):
    script = """
import os, signal
from foreshock.records import Ledger
ledger = Ledger(sys.argv[1])
child = os.fork()
if child == 0:
    signal.pause()
ledger.close()
try:
    Ledger(sys.argv[1]).append("forget")
finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    run_python(script, path)
    assert verify(path).lines == 1


def test_a_signal_handler_that_interrupts_an_append_gets_an_error_not_a_deadlock(path, monkeypatch):
    write = LockedFile.write_synced
    with Ledger(path) as ledger:

        def interrupted(file, data, offset):
            with pytest.raises(RuntimeError, match="signal handler"):
                ledger.append("preempted")
            write(file, data, offset)

        monkeypatch.setattr(LockedFile, "write_synced", interrupted)
        ledger.append("forget")
    assert verify(path).lines == 1


# Disks that fail


def fail_before_write(monkeypatch):
    monkeypatch.setattr(os, "pwrite", full_disk)


def fail_after_half_a_line(monkeypatch):
    pwrite, num_calls = os.pwrite, []

    def short(descriptor, data, offset):
        num_calls.append(0)
        if len(num_calls) % 2 == 0:
            full_disk()
        return pwrite(descriptor, data[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", short)


def fail_to_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)


def fail_to_sync_and_to_take_back(monkeypatch):
    fail_to_sync(monkeypatch)
    monkeypatch.setattr(os, "ftruncate", full_disk)


FAILURES = [
    fail_before_write, fail_after_half_a_line, fail_to_sync, fail_to_sync_and_to_take_back,
]  # fmt: skip


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failing_disk_is_an_error_and_leaves_the_chain_whole(path, fail):
    with Ledger(path) as ledger:
        head = ledger.append("forget", text="y" * 90)["hash"]
        with pytest.MonkeyPatch.context() as patch:
            fail(patch)
            for _ in range(2):
                with pytest.raises(OSError, match="No space left"):
                    ledger.append("forget", text="x" * 100)
        assert ledger.head == head
        assert ledger.append("retrain")["seq"] == 2
    assert [r["event"] for r in read_ledger(path)] == ["forget", "retrain"]
    assert verify(path, head=head).lines == 2


@pytest.mark.parametrize("fail", FAILURES[:3])
def test_what_could_not_be_written_is_not_in_the_file(path, fail):
    with Ledger(path) as ledger:
        ledger.append("forget")
        before = path.read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            fail(patch)
            assert not ledger.try_append("forget", text="x" * 100)
        assert path.read_bytes() == before


def test_several_short_writes_are_one_line(path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    with Ledger(path) as ledger:
        ledger.append("forget")
        ledger.append("forget")
    assert verify(path).lines == 2


def test_an_interrupted_append_is_taken_back(path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with Ledger(path) as ledger:
        ledger.append("forget")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ledger.append("lost")
        ledger.append("retrain")
    assert verify(path).lines == 2
    assert [r["event"] for r in read_ledger(path)] == ["forget", "retrain"]


def test_training_goes_on_with_one_warning_and_a_count(path, monkeypatch, caplog):
    with Ledger(path) as ledger:
        with monkeypatch.context() as patch:
            fail_after_half_a_line(patch)
            assert [ledger.try_append("forget") for _ in range(3)] == [False] * 3
        assert ledger.lost_records == 3
        assert ledger.try_append("forget")
    ledger.try_append("forget")
    assert ledger.lost_records == 4
    assert verify(path).lines == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    assert str(path) in caplog.text


def test_a_device_that_is_always_full_can_be_opened(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.symlink_to("/dev/full")
    with Ledger(path) as ledger:
        with pytest.raises(OSError, match="No space left"):
            ledger.append("forget")
        assert not ledger.try_append("forget")


@pytest.mark.parametrize(
    "meddle",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(path.read_bytes() * 2),
        lambda path: write_atomically(path, b""),
    ],
    ids=["removed", "emptied", "added to", "replaced"],
)
def test_a_file_that_someone_else_changes_is_not_written_to(path, meddle):
    with Ledger(path) as ledger:
        ledger.append("forget")
        meddle(path)
        after = path.read_bytes() if path.exists() else None
        with pytest.raises(OSError, match="removed, replaced or written to"):
            ledger.append("forget")
    assert after == (path.read_bytes() if path.exists() else None)


def test_a_ledger_is_written_on_when_it_is_moved_or_the_process_goes_elsewhere(
    tmp_path, monkeypatch
):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    with Ledger("ledger.jsonl") as ledger:
        monkeypatch.chdir("/")
        ledger.append("forget")
        (tmp_path / "old").rename(tmp_path / "new")
        ledger.append("forget")
    assert verify(tmp_path / "new" / "ledger.jsonl").lines == 2


def test_a_directory_that_cannot_be_written_to_is_an_os_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", "/proc/foreshock"):
        with pytest.raises(OSError, match=str(directory)):
            Ledger(f"{directory}/ledger.jsonl")


def test_a_new_ledger_makes_its_directories(tmp_path):
    with Ledger(tmp_path / "a" / "b" / "ledger.jsonl") as ledger:
        assert ledger.append("forget")["seq"] == 1


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": ""}, ValueError, "path must name a file, it is empty"),
        ({"path": "."}, IsADirectoryError, "path must name a file, it is a directory"),
        ({"hmac_key": "text"}, TypeError, "hmac_key must be bytes, not str"),
        ({"hmac_key": b"short"}, ValueError, "hmac_key must have at least 16 bytes, not 5"),
        ({"signing_key": "text"}, TypeError, "signing_key must be an Ed25519PrivateKey.*not str"),
        ({"signing_key": b"x"}, ValueError, "signing_key must be .* these bytes are neither"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_the_ledger_are_named(path, arguments, error, message):
    with pytest.raises(error, match=message):
        Ledger(**{"path": path, **arguments})
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"event": ""}, ValueError, "event must be 1 to 256 printable characters, not ''"),
        ({"event": 3}, TypeError, "event must be text, not int"),
        ({"seq": 3, "hash": 1}, ValueError, r"fields must not hold \['hash', 'seq'\]"),
        ({"hmac": 3}, ValueError, r"fields must not hold \['hmac'\]"),
        ({"private": "x"}, TypeError, "private must be a mapping, not str"),
        ({"private": {3: "x"}}, TypeError, "private must have printable texts as keys, not 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("method", ["append", "try_append"])
def test_bad_arguments_of_append_are_named(path, method, arguments, error, message):
    with Ledger(path, hmac_key=KEY) as ledger, pytest.raises(error, match=message):
        getattr(ledger, method)(**{"event": "forget", **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "ltt"}, ValueError, "policy must be one of ttl, compliance, drift, guard, not"),
        ({"scope": "layers"}, TypeError, "scope must be a mapping, not str"),
        ({"scope": None}, TypeError, "scope must be a mapping, not NoneType"),
        ({"evidence": 3.0}, TypeError, "evidence must be a mapping, not float"),
        ({"operator": None}, TypeError, "operator must be text, not NoneType"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_forget_are_named(path, arguments, error, message):
    with Ledger(path) as ledger, pytest.raises(error, match=message):
        ledger.forget(**{"policy": "ttl", "scope": {}, **arguments})


def test_append_after_close_is_an_error(path):
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="the ledger is closed"):
        ledger.append("forget")


@pytest.mark.parametrize(
    ("begun_with", "continued_with", "message"),
    [
        ({"hmac_key": KEY}, {}, "hmac_key must be given"),
        ({}, {"hmac_key": KEY}, "hmac_key must not be given"),
        ({"hmac_key": KEY}, {"hmac_key": OTHER_KEY}, "cannot be continued with these keys"),
        ({"signing_key": KEY}, {}, "signing_key must be given"),
        ({}, {"signing_key": KEY}, "signing_key must not be given"),
        ({"signing_key": KEY}, {"signing_key": OTHER_KEY}, "its signature does not fit"),
    ],
)
def test_a_ledger_is_continued_with_the_keys_it_was_begun_with(
    path, begun_with, continued_with, message
):
    lines = write_ledger(path, 2, **begun_with)
    with pytest.raises(ValueError, match=message):
        Ledger(path, **continued_with)
    assert path.read_bytes() == b"".join(lines)
    Ledger(path, **begun_with).close()


def test_a_ledger_whose_last_line_is_broken_is_left_alone(path):
    lines = write_ledger(path, 3)
    path.write_bytes(b"".join(lines).replace(b"Schicht 2", b"Schicht 5"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot be continued: of its last line, altered"):
        Ledger(path)
    assert path.read_bytes() == before
