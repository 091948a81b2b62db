"""Which implementation of an op runs on a device, and why the others do not.

Read from the environment once, when an op is first bound:

FORESHOCK_BACKEND   reference, cpu, triton or cuda: use this one or fail
FORESHOCK_ISA       baseline, avx2, avx512 or neon: instruction set of the cpu backend
FORESHOCK_STRICT    1: an error instead of a fallback to anything but the preferred backend that
                    there is for an op
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
from types import ModuleType
from typing import NamedTuple

BACKENDS = ("reference", "cpu", "triton", "cuda")

# In order of preference. What is not listed is served by the reference.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for, or that FORESHOCK_STRICT expects, cannot run here."""


@functools.cache
def load_kernels() -> ModuleType | str:
    """The compiled extension, or why there is none."""
    try:
        kernels = importlib.import_module("foreshock._kernels")
    except ImportError as error:
        return f"the compiled extension is not installed ({error})"
    import torch

    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"torch {torch.__version__} has no DLPack exchange functions (2.11 has)"
    return kernels


def supported_isas() -> list[str]:
    """Instruction sets that the extension has kernels for and this processor runs, widest last."""
    kernels = load_kernels()
    if isinstance(kernels, str):
        return []
    return [name for name, is_supported in kernels.isas() if is_supported]


@functools.cache
def active_isa() -> str | None:
    """Instruction set that the cpu backend uses; None without the extension.

    Raises:
        BackendUnavailable: FORESHOCK_ISA names one that is not to be had.
    """
    usable = supported_isas()
    asked = os.environ.get("FORESHOCK_ISA")
    if asked and asked not in usable:
        raise BackendUnavailable(
            f"FORESHOCK_ISA={asked}, but accepted here: {', '.join(usable) or 'none'}"
        )
    return asked or (usable[-1] if usable else None)


class Choice(NamedTuple):
    """The implementation that runs, and why those preferred to it do not."""

    backend: str
    module: ModuleType
    passed_over: dict[str, str]


def _why_not(op: str, backend: str, device_type: str) -> tuple[ModuleType | None, str | None]:
    """An implementation's module, and what keeps it from running on a device (None: nothing)."""
    if backend == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return None, f"triton is not installed ({error})"
    name = _module_of(op, backend)
    if name is None:
        return None, f"{op} has no implementation in {backend}"
    module = importlib.import_module(name)
    return module, module.why_unavailable(device_type)


def _module_of(op: str, backend: str) -> str | None:
    """Name of an implementation; None where none is written, as for an op that CUDA C++ would not
    serve better than Triton."""
    name = f"foreshock.ops.{op}.{backend}"
    return None if importlib.util.find_spec(name) is None else name


def _asked_backend() -> str | None:
    asked = os.environ.get("FORESHOCK_BACKEND")
    if asked and asked not in BACKENDS:
        raise BackendUnavailable(f"FORESHOCK_BACKEND={asked}, but accepted: {', '.join(BACKENDS)}")
    return asked or None


@functools.cache
def choose(op: str, device_type: str) -> Choice:
    """Binds an op to an implementation for a type of device ("cpu", "cuda", ...).

    Raises:
        BackendUnavailable: FORESHOCK_BACKEND asks for one that cannot run there, or
            FORESHOCK_STRICT is set and the preferred one cannot.
    """
    asked = _asked_backend()
    preferred = _PREFERENCE.get(device_type, ("reference",))
    passed_over: dict[str, str] = {}
    for backend in (asked,) if asked else preferred:
        module, reason = _why_not(op, backend, device_type)
        if reason is None and module is not None:
            break
        passed_over[backend] = str(reason)
    else:
        raise BackendUnavailable(
            f"FORESHOCK_BACKEND={asked}, but {op} on {device_type} cannot use it: "
            f"{passed_over[str(asked)]}"
        )
    unwritten = {name for name in passed_over if _module_of(op, name) is None}
    is_fallback = backend == "reference" or bool(set(passed_over) - unwritten)
    if passed_over and is_fallback and os.environ.get("FORESHOCK_STRICT") == "1":
        reasons = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
        raise BackendUnavailable(
            f"FORESHOCK_STRICT=1, but {op} on {device_type} would fall back to {backend}: {reasons}"
        )
    return Choice(backend, module, passed_over)


def explain(op: str, device_type: str) -> dict[str, str]:
    """Says of every backend whether it runs an op on a device, and of the others why not."""
    chosen = choose(op, device_type)
    said = {}
    for backend in BACKENDS:
        reason = chosen.passed_over.get(backend) or _why_not(op, backend, device_type)[1]
        otherwise = "available" if backend != chosen.backend else "active"
        said[backend] = reason or otherwise
    return said


def list_ops() -> list[str]:
    """Names of the ops: each is a package beside this module."""
    package = importlib.import_module("foreshock.ops")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)


def active_backends() -> dict[str, dict[str, str]]:
    """For each op, the backend that serves each kind of device present."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: {d: choose(op, d).backend for d in devices} for op in list_ops()}
