"""What a sink is, and what it finds in a record."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from foreshock.records.strict_json import dump_json, to_json_object
from foreshock.records.telemetry_schema import TELEMETRY_EVENT

Record: TypeAlias = Mapping[str, Any]
"""As `foreshock.records.read_telemetry` gives it, secrets and long texts redacted."""

_HEAD = frozenset({"event", "step", "time"})


@runtime_checkable
class Sink(Protocol):
    """Takes the records of one run, from a thread that may wait for it."""

    def write(self, record: Record) -> None:
        """Takes one; what it raises is counted, and training goes on."""

    def close(self) -> None:
        """Called once, after the last one, from the same thread."""


def is_measurement(record: Record) -> bool:
    """Tells measurements, which come every few steps, from events."""
    return bool(record["event"] == TELEMETRY_EVENT)


def numbers_of(record: Record) -> dict[tuple[str, ...], float]:
    """The numbers of a record by the names that lead to them: `("largest_gradients", "0.weight")`.

    Args:
        record: of any event.
    Returns:
        Also NaN and infinities; true is 1. The step, texts, lists, what is redacted and what is
        None are left out.
    """
    fields = {name: value for name, value in record.items() if name not in _HEAD}
    return dict(_numbers_under((), fields))


def _numbers_under(
    outer: tuple[str, ...], fields: Record
) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, value in fields.items():
        if isinstance(value, Mapping) and value.get("redacted") is not True:
            yield from _numbers_under((*outer, name), value)
        elif isinstance(value, int | float):
            with contextlib.suppress(OverflowError):  # an integer that no float can hold
                yield (*outer, name), float(value)


def texts_of(record: Record) -> dict[str, str]:
    """The texts of a record by name, such as the risk level; those of its head are left out."""
    return {k: v for k, v in record.items() if isinstance(v, str) and k not in _HEAD}


def sentence_of(record: Record) -> str:
    """What an event says, on one line."""
    said = {name: value for name, value in record.items() if name not in _HEAD}
    return f"{record['event']} at step {record['step']}: {dump_json(to_json_object(said))}"


@contextlib.contextmanager
def of_extra(extra: str) -> Iterator[None]:
    """Around the import of an optional package: a missing one is answered with how to get it.

    Args:
        extra: of foreshock, that installs it.
    Raises:
        ModuleNotFoundError: the package, or what it needs, is not there.
    """
    try:
        yield
    except ImportError as error:
        raise ModuleNotFoundError(
            f"this sink needs a package that is missing ({error}): pip install 'foreshock[{extra}]'"
        ) from error
