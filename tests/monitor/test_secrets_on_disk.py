"""Whatever way a secret or a long text takes into a run's directory, it does not arrive."""

from __future__ import annotations

import collections
import dataclasses
import enum
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreshock.guard import SnapshotSaved
from foreshock.journal import Journal
from foreshock.records import Ledger, MetricsRecorder, read_telemetry, write_autopsy

SECRET, NUMBER, LONG = "hunter2-canary", 8_675_309_000_001, "much-ado-canary " * 17
TRACES = (SECRET.encode(), str(NUMBER).encode(), LONG[:64].encode())


class Login(NamedTuple):
    user: str
    password: object


@dataclasses.dataclass
class Account:
    user: str
    api_key: object


class Field(enum.Enum):
    TOKEN = "auth_token"


class FileSink:
    """A sink that writes down all that it is given."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: list[Any] = []

    def write(self, record: Any) -> None:
        self._records.append(record)

    def close(self) -> None:
        self._path.write_text(repr(self._records))


HOLDERS: list[Callable[[Any], Any]] = [
    lambda secret: {"password": secret},
    lambda secret: {b"password": secret},
    lambda secret: {("db", "passwd"): secret},
    lambda secret: {Field.TOKEN: secret},
    lambda secret: {"Authorization": secret},
    lambda secret: {"AWS_SECRET_ACCESS_KEY": secret},
    lambda secret: collections.OrderedDict(clientSecret=secret),
    lambda secret: collections.UserDict(api_key=secret),
    lambda secret: Login("root", secret),
    lambda secret: Account("root", secret),
    lambda secret: {"password_" + "x" * 300: secret},
    lambda secret: {"hf_token": {"name": SECRET}},
]
SHELLS: list[Callable[[Any], Any]] = [
    lambda inner: [inner],
    lambda inner: (1, inner),
    lambda inner: {"a": inner},
    lambda inner: {2: [inner, inner]},
]


@st.composite
def data_with_secrets(draw: st.DrawFn) -> dict[str, Any]:
    data: Any = draw(st.sampled_from([SECRET, NUMBER, SECRET.encode(), LONG, {SECRET: 1}]))
    shells = st.lists(st.sampled_from(SHELLS), max_size=3)
    for put in (*draw(shells), draw(st.sampled_from(HOLDERS)), *draw(shells)):
        data = put(data)
    long = draw(st.sampled_from([LONG, [LONG], {LONG: 0.5}, Path(LONG), {LONG}, Account(LONG, 1)]))
    return {"innocent": draw(st.floats()), "given": data, "long": long}


def write_everything(run: Path, data: dict[str, Any]) -> None:
    journal = Journal(run, data, [FileSink(run / "sink")])
    journal.record_telemetry(1, **data)
    journal.record_telemetry(1, password=SECRET, token=NUMBER, text=LONG)
    journal.record(SnapshotSaved(2, data, 0))  # type: ignore[arg-type]
    write_autopsy(run, 2, "it failed", Account("root", data))
    journal.close()
    journal.write_summary(3, None, "recover", data)
    with Ledger(run / "ledger.jsonl") as ledger:
        ledger.forget(policy="ttl", scope=data, evidence=data)
    with MetricsRecorder(run, "model", save_interval=1) as recorder:
        recorder.record(1, 0, 0.5, 1e-3, **data)
        recorder.record(2, 0, 0.5, 1e-3, accuracy=0.5, token=NUMBER)
        assert recorder.poc_report(data, data, data) is not None
        assert recorder.saved_records == 2


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(data_with_secrets())
def test_no_secret_and_no_long_text_reaches_the_directory_of_a_run(data: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_everything(run, data)
        names = {file.relative_to(run).parts[0] for file in run.rglob("*") if file.is_file()}
        assert names == {
            "autopsy", "config.json", "ledger.jsonl", "metrics", "poc_reports", "sink",
            "summary.json", "telemetry.jsonl",
        }  # fmt: skip
        assert len(read_telemetry(run / "telemetry.jsonl").records) == 4
        for file in run.rglob("*"):
            written = file.read_bytes() if file.is_file() else b""
            assert not [trace for trace in TRACES if trace in written], file
