"""A benchmark's `main` as it is typed."""

from __future__ import annotations

from collections.abc import Callable

import typer


def command(main: Callable[..., None]) -> typer.Typer:
    """What `typer.run` makes of it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app
