"""What holds for every command, and `foreshock report` and `foreshock watch` as they are typed."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreshock import cli
from tests.interpreter import run_python
from tests.report.runs import write_run

COMMANDS = ["demo", "drill", "info", "bench", "report", "watch", "verify"]
PLAIN = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


def typed(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [*map(str, words)], env=PLAIN)
    return done.exit_code, done.output


def test_these_are_the_commands() -> None:
    assert [command.callback.__name__ for command in cli.app.registered_commands] == COMMANDS  # type: ignore[union-attr]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_are_accepted_and_the_exit_codes(command: str) -> None:
    code, said = typed(command, "--help")
    assert code == 0
    examples = re.findall(rf"^ +(foreshock {command}\b[^|\n]*)", said.split("Examples")[1], re.M)
    assert examples
    for example in examples:
        words = [*shlex.split(example)[1:], "--help"]  # which is looked at last
        assert typed(*words)[0] == 0, example
        known = set(re.findall(r"--[a-z-]+", said.split("Examples")[0]))
        assert set(re.findall(r"--[a-z-]+", example)) <= known
    codes = re.findall(r"^ +([012])  (\S.*\S) *$", said.split("Exit codes")[1], re.M)
    assert [code for code, _ in codes] == (["0", "2"] if command == "info" else ["0", "1", "2"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documentation_tells_the_same_exit_codes(command: str) -> None:
    text = " ".join(DOCS.read_text().split())
    codes = re.findall(
        r"^ +[012]  (\S.*\S) *$", typed(command, "--help")[1].split("Exit codes")[1], re.M
    )
    for meaning in codes:
        assert meaning in text


def test_help_and_completion_import_no_torch() -> None:
    code = """
        from typer.testing import CliRunner
        from foreshock import cli
        for words in (["--help"], ["drill", "--help"], ["watch", "--help"]):
            assert CliRunner().invoke(cli.app, words).exit_code == 0
        heavy = {"torch", "numpy", "matplotlib", "jinja2"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_report_and_a_look_import_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = f"""
        from typer.testing import CliRunner
        from foreshock import cli
        for words in (["report", {str(tmp_path)!r}], ["watch", {str(tmp_path)!r}]):
            assert CliRunner().invoke(cli.app, words).exit_code == 0
        assert "torch" not in sys.modules
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [("foreshock rep", {"report"}), ("foreshock demo --fault nan-w", {"nan-weight"})],
)
def test_the_shell_is_offered_commands_and_faults(words: str, offered: set[str]) -> None:
    asked = {
        "_FORESHOCK_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    assert set(run_module(**asked).stdout.split()) == offered


def test_completion_can_be_shown_and_installed(tmp_path: Path) -> None:
    env = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = run_module("--show-completion", "bash", **env)
    assert "complete -o default -F _foreshock_completion foreshock" in shown.stdout
    run_module("--install-completion", "bash", **env)
    installed = tmp_path / ".bash_completions" / "foreshock.sh"
    assert "_foreshock_completion" in installed.read_text()


def run_module(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "foreshock", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_report_is_written_and_its_path_told(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert typed("report", tmp_path) == (0, f"{tmp_path}/report.html\n")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("command", ["report", "watch"])
def test_what_is_no_run_is_named_with_what_is_accepted(tmp_path: Path, command: str) -> None:
    code, said = typed(command, tmp_path / "nowhere")
    assert code == 2
    said = " ".join(said.split())
    assert f"RUN is '{tmp_path}/nowhere', which is not there; accepted: a run's directory" in said


def test_a_report_that_cannot_be_written_is_1(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "report.html").mkdir()
    code, said = typed("report", tmp_path)
    assert code == 1
    assert "report.html" in said


def test_a_look_at_a_run_that_has_not_begun_is_1(tmp_path: Path) -> None:
    assert typed("watch", tmp_path, "--once") == (
        1,
        f"{tmp_path.name}: waiting for telemetry.jsonl\n",
    )


def test_ctrl_c_ends_the_watch_with_0(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foreshock", "watch", str(tmp_path), "--interval", "0.05"]
    pipe = subprocess.PIPE
    # A test run in the background has its children ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    start = functools.partial(subprocess.Popen, stdout=pipe, stderr=pipe, text=True)
    with start(command, preexec_fn=heed) as watch:
        assert watch.stdout is not None
        assert "waiting" in watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, errors = watch.communicate(timeout=20)
    assert watch.returncode == 0
    assert errors == ""


def test_the_list_of_faults_names_each() -> None:
    from foreshock.drill.scenarios import SCENARIOS

    code, said = typed("drill", "--list")
    assert code == 0
    assert [line.split()[0] for line in said.splitlines()[1:]] == list(SCENARIOS)
