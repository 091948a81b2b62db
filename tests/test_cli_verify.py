"""`foreshock verify` as it is typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreshock import cli
from foreshock.records import Ledger, write_summary

KEY = bytes(range(32))
FULL_WIDTH = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}


def write(path: Path, num_lines: int = 3, **keys: bytes) -> str:
    with Ledger(path, **keys) as ledger:  # type: ignore[arg-type]
        for number in range(num_lines):
            ledger.append("forget", number=number)
        return ledger.head


def verify(*typed: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["verify", *map(str, typed)], env=FULL_WIDTH)
    return done.exit_code, done.output


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_an_intact_ledger_is_0_and_what_is_not_proven_is_told(path: Path) -> None:
    head = write(path)
    code, said = verify(path)
    assert code == 0
    assert f"intact: {path}, 3 lines" in said
    assert head in said
    assert "not proven: that no lines are missing at the end" in said
    assert "not proven: that nobody wrote the whole chain anew" in said


def test_a_broken_ledger_is_1_and_the_line_and_reason_are_told(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes().replace(b'"number":1', b'"number":7'))
    code, said = verify(path)
    assert code == 1
    assert f"broken: {path}, line 2: altered: its content does not fit its hash" in said
    assert "before it 1 line that fit together" in said
    assert "intact" not in said


def test_a_missing_end_is_found_against_a_head(path: Path) -> None:
    head = write(path)
    assert verify(path, "--head", head)[0] == 0
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert verify(path)[0] == 0
    code, said = verify(path, "--head", head)
    assert code == 1
    assert "line 3: the line is missing" in said


def test_the_head_is_looked_up_in_the_summary_of_the_run(path: Path) -> None:
    head = write(path)
    write_summary(path.with_name("summary.json"), {"ledger_head": head})
    code, said = verify(path)
    assert code == 0
    assert "complete up to line 3, the head in summary.json" in said
    write(path, num_lines=1)
    assert "the head in summary.json; behind it 1 line" in verify(path)[1]
    path.write_bytes(b"")
    assert verify(path)[0] == 1
    assert verify(path, "--head", "sha256:" + "0" * 64)[0] == 0


@pytest.mark.parametrize("summary", [{}, {"ledger_head": None}])
def test_a_summary_without_a_head_is_none(path: Path, summary: dict[str, None]) -> None:
    write(path)
    write_summary(path.with_name("summary.json"), summary)
    code, said = verify(path)
    assert code == 0
    assert "not proven: that no lines are missing at the end" in said


def test_the_summary_of_a_run_says_nothing_of_other_ledgers_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "other.jsonl")
    write_summary(tmp_path / "summary.json", {"ledger_head": "sha256:" + "1" * 64})
    assert verify(tmp_path / "other.jsonl")[0] == 0


def test_keys_are_read_from_files(path: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    write(path, hmac_key=KEY, signing_key=KEY)
    key_file, public_key = tmp_path / "key", tmp_path / "public"
    key_file.write_bytes(KEY)
    public_key.write_bytes(
        Ed25519PrivateKey.from_private_bytes(KEY).public_key().public_bytes_raw()
    )
    code, said = verify(path, "--key-file", key_file, "--public-key", public_key)
    assert code == 0
    assert "every line bears the HMAC of the key" in said
    assert "every line bears the signature of the key" in said
    assert "wrote the whole chain anew" not in said
    key_file.write_bytes(KEY[::-1])
    code, said = verify(path, "--key-file", key_file)
    assert code == 1
    assert "line 1: its HMAC does not fit" in said


def test_an_unfinished_line_is_told(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-10])
    code, said = verify(path)
    assert code == 0
    assert "2 lines" in said
    assert "line 3 is unfinished" in said


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], "Missing argument"),
        (["{tmp}/nowhere"], "does not exist"),
        (["{tmp}"], "is a directory"),
        (["{tmp}/ledger.jsonl", "--head", "x"], "head must be sha256:"),
        (["{tmp}/ledger.jsonl", "--key-file", "{tmp}/nowhere"], "does not exist"),
        (["{tmp}/ledger.jsonl", "--key-file", "{tmp}/short"], "hmac_key must have at least 16"),
        (["{tmp}/ledger.jsonl", "--public-key", "{tmp}/short"], "public_key must be"),
        (["{tmp}/torn/ledger.jsonl"], "does not hold strict JSON"),
    ],
)
def test_what_cannot_be_verified_is_2(tmp_path: Path, typed: list[str], told: str) -> None:
    write(tmp_path / "ledger.jsonl")
    write(tmp_path / "torn" / "ledger.jsonl")
    (tmp_path / "torn" / "summary.json").write_text("{")
    (tmp_path / "short").write_bytes(b"short")
    code, said = verify(*(word.format(tmp=tmp_path) for word in typed))
    assert code == 2
    assert told in " ".join(said.split())


def test_brackets_in_a_name_are_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "[bold]x[/]" / "ledger.jsonl"
    write(path)
    assert "[bold]x[/]" in verify(path)[1]


def test_the_exit_code_is_that_of_the_process_and_a_pipe_gets_no_colours(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[1:])
    command = [sys.executable, "-m", "foreshock.cli", "verify", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("broken: ")
    assert "\x1b" not in done.stdout
