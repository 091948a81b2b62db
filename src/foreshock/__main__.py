"""`python -m foreshock` is `foreshock`."""

from foreshock.cli import app

app(prog_name="foreshock")
