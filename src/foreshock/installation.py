"""What of foreshock runs on this machine, and why the rest does not."""

from __future__ import annotations

import os
from importlib.metadata import version

import torch
from rich.table import Table

from foreshock.ops._backend import active_isa, explain, list_ops, load_kernels

_SWITCHES = ("FORESHOCK_BACKEND", "FORESHOCK_ISA", "FORESHOCK_STRICT")


def installation_table() -> Table:
    """Versions, switches, and every implementation of every op, with why it does or does not run.

    Returns:
        A table of two columns.

    Cost: loads what there is of every op.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("foreshock", version("foreshock"))
    table.add_row("torch", torch.__version__)
    kernels = load_kernels()
    if isinstance(kernels, str):
        table.add_row("compiled kernels", f"none: {kernels}")
    else:
        isas = [
            f"{name}{'' if usable else ' (not on this CPU)'}" for name, usable in kernels.isas()
        ]
        table.add_row("compiled kernels", str(kernels.__file__))
        table.add_row("instruction sets", f"{', '.join(isas)}; in use: {active_isa()}")
        table.add_row("threads", str(kernels.thread_count()))
    for switch in _SWITCHES:
        if switch in os.environ:
            table.add_row(switch, os.environ[switch])
    for op in list_ops():
        for device in ("cpu", "cuda"):
            for backend, said in explain(op, device).items():
                table.add_row(f"{op} on {device}", f"{backend}: {said}")
    return table
