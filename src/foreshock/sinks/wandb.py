"""To Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foreshock.sinks.sink import (
    Record,
    is_measurement,
    numbers_of,
    of_extra,
    sentence_of,
    texts_of,
)

if TYPE_CHECKING:
    import wandb

_STEP = "foreshock/step"


class WandB:
    """Logs rows to a run: `foreshock/<name>` over `foreshock/step`, events as texts.

    A run's own step only counts its rows. So steps that are run again after a rollback are further
    points at the same `foreshock/step`, behind those that were taken back. NaN and infinities are
    logged as such.

    Args:
        run: to log to, which stays open; None: one of its own, that is finished in the end.
        init: for `wandb.init`, such as project, dir, mode="offline". If there are no `settings`
            among it, neither console nor command line nor code are recorded: nobody has taken the
            secrets out of those.
    Raises:
        ModuleNotFoundError: there is no wandb; install `foreshock[wandb]`.
        TypeError: both run and init are given.
        Exception: what `wandb.init` raises.
    """

    def __init__(self, run: wandb.Run | None = None, **init: Any) -> None:
        with of_extra("wandb"):
            import wandb
        if run is not None and init:
            raise TypeError(f"run is given, and {sorted(init)} too; accepted: one of them")
        self._is_own = run is None
        if run is None:
            reticent = wandb.Settings(
                console="off", disable_git=True, save_code=False, x_disable_meta=True
            )
            run = wandb.init(**{"reinit": "create_new", "settings": reticent, **init})
        self._run = run
        run.define_metric(_STEP, hidden=True)
        run.define_metric("foreshock/*", step_metric=_STEP)

    def write(self, record: Record) -> None:
        """Logs a row of its numbers and texts, or what it says."""
        row: dict[str, float | str] = {_STEP: record["step"]}
        if is_measurement(record):
            row |= {"/".join(("foreshock", *k)): v for k, v in numbers_of(record).items()}
            row |= {f"foreshock/{name}": text for name, text in texts_of(record).items()}
        else:
            row[f"foreshock/{record['event']}"] = sentence_of(record)
        self._run.log(row)

    def close(self) -> None:
        """Finishes the run, if it is its own."""
        if self._is_own:
            self._run.finish()
