"""How much host memory there is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from foreshock.guard import host_memory
from foreshock.guard.host_memory import as_text, available_bytes


def test_this_machine_has_some_and_not_more_than_there_is() -> None:
    available = available_bytes()
    assert available is not None
    assert 1 << 20 < available < 1 << 50


def group_of(tmp_path: Path, limit: str, used: int, cached: int) -> tuple[str, str, str]:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(str(used))
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nfile 9\n")
    return str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), "inactive_file"


@pytest.mark.parametrize(
    ("limit", "used", "expected"), [("1000", 300, 800), ("1000", 2000, 0), ("max\n", 300, 5000)]
)
def test_a_control_group_has_the_last_word_unless_it_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: int, expected: int
) -> None:
    monkeypatch.setattr(host_memory, "_GROUPS", (group_of(tmp_path, limit, used, 100),))
    monkeypatch.setattr(host_memory, "_of_machine", lambda: 5000)
    assert available_bytes() == expected


def test_where_nobody_says_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_GROUPS", (("/no/limit", "/no/usage", "x"),))
    monkeypatch.setattr(host_memory, "_of_machine", lambda: None)
    assert available_bytes() is None


@pytest.mark.parametrize(
    ("size", "text"),
    [(5, "5 bytes"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_amounts_are_said_as_people_read_them(size: int, text: str) -> None:
    assert as_text(size) == text
