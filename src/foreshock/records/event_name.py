"""What an event may be called, in every file of lines."""

_MAX_CHARACTERS = 256


def check_event_name(event: str) -> None:
    """Checks the argument `event` of a public function.

    Args:
        event: the name.

    Raises:
        TypeError: it is not text.
        ValueError: it is empty, too long, or not printable.
    """
    if not isinstance(event, str):
        raise TypeError(f"event must be text, not {type(event).__name__}")
    if not event or len(event) > _MAX_CHARACTERS or not event.isprintable():
        raise ValueError(
            f"event must be 1 to {_MAX_CHARACTERS} printable characters, not {event[:300]!r}"
        )
