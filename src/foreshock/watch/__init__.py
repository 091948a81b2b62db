"""A run as it goes on, in a terminal."""

from foreshock.watch.loop import watch_run

__all__ = ["watch_run"]
