"""To MLflow."""

from __future__ import annotations

import re
from collections import Counter
from datetime import datetime

from foreshock.sinks.sink import Record, is_measurement, numbers_of, of_extra, sentence_of

_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
_MAX_NAME_CHARACTERS = 250
_MAX_METRICS_A_CALL = 1000


class MLflow:
    """Logs numbers as metrics `foreshock/<name>`, and events as metrics that count them.

    What an event says is in a tag of its name, as it was the last time. Steps that are run again
    after a rollback are further values at the same step, and count as the later ones. NaN and
    infinities are given to MLflow as such; of infinities its databases make the largest number.

    Args:
        tracking_uri: of the server or store; None: where MLflow itself would write.
        experiment: name; made if it is not there.
        run_id: of a run to log to, which stays open; None: one of its own, that is ended.
        run_name: of its own run.
    Raises:
        ModuleNotFoundError: there is no mlflow; install `foreshock[mlflow]`.
        mlflow.exceptions.MlflowException: the store cannot be used.
    Cost:
        One call of the store a record.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        experiment: str = "foreshock",
        run_id: str | None = None,
        run_name: str | None = None,
    ) -> None:
        with of_extra("mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        self._metric = Metric
        self._client = MlflowClient(tracking_uri)
        self._is_own = run_id is None
        if run_id is None:
            found = self._client.get_experiment_by_name(experiment)
            owner = found.experiment_id if found else self._client.create_experiment(experiment)
            run_id = str(self._client.create_run(owner, run_name=run_name).info.run_id)
        self.run_id = run_id
        """Of the run that is logged to."""
        self._counts: Counter[str] = Counter()
        self._last_ms = 0

    def write(self, record: Record) -> None:
        """Logs its numbers, or counts it and keeps what it says."""
        name = f"foreshock/{record['event']}"
        if is_measurement(record):
            self._log(record, {("foreshock", *k): v for k, v in numbers_of(record).items()})
            return
        self._counts[name] += 1
        self._log(record, {(name,): self._counts[name]})
        self._client.set_tag(self.run_id, _allowed(name), sentence_of(record))

    def _log(self, record: Record, numbers: dict[tuple[str, ...], float]) -> None:
        # Of two values of one step MLflow takes the later, and in one millisecond the larger.
        self._last_ms = time_ms = max(_milliseconds(record["time"]), self._last_ms + 1)
        metrics = [
            self._metric(_allowed("/".join(name)), number, time_ms, record["step"])
            for name, number in numbers.items()
        ]
        for i in range(0, len(metrics), _MAX_METRICS_A_CALL):
            self._client.log_batch(self.run_id, metrics[i : i + _MAX_METRICS_A_CALL])

    def close(self) -> None:
        """Ends the run, if it is its own."""
        if self._is_own:
            self._client.set_terminated(self.run_id)


def _allowed(name: str) -> str:
    """MLflow refuses all of a call for one name that it does not like."""
    return _NOT_IN_NAMES.sub("_", name)[:_MAX_NAME_CHARACTERS]


def _milliseconds(time: str) -> int:
    return round(datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() * 1000)
