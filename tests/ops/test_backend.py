"""Which implementation runs, how it is forced, and that no fallback goes unseen."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

from foreshock.ops import _backend, _table
from foreshock.ops._table import PythonTable, compiled_table
from foreshock.ops._tensor_layout import find_tensor_layout
from tests.interpreter import NO_EXTENSION, NO_TRITON, run_python

SCAN = """
    import torch, foreshock
    from foreshock.ops._backend import choose
    stats = foreshock.ops.health_scan([torch.tensor([1.0, float("nan"), 2.0])])
    assert stats.nan.tolist() == [1] and stats.sum.tolist() == [3.0]
    scanner = foreshock.ops.HealthScanner([torch.ones(3)])
    assert scanner().sum.item() == 3 and scanner([torch.ones(4)]).sum.item() == 4
    print(choose("health_scan", "cpu").backend, choose("health_scan", "cpu").passed_over)
"""


def test_the_compiled_kernels_are_preferred() -> None:
    done = run_python(SCAN)
    assert done.stdout.split() == ["cpu", "{}"], done.stderr


def test_without_the_extension_the_reference_runs_and_says_why() -> None:
    done = run_python(SCAN, NO_EXTENSION)
    assert done.stdout.startswith("reference"), done.stderr
    assert "extension is not installed" in done.stdout


def test_without_triton_everything_else_runs() -> None:
    done = run_python(SCAN, NO_TRITON)
    assert done.stdout.startswith("cpu"), done.stderr
    done = run_python(SCAN, NO_TRITON, NO_EXTENSION)
    assert done.stdout.startswith("reference"), done.stderr


def test_strict_turns_a_fallback_into_an_error() -> None:
    """Trap 34."""
    done = run_python(SCAN, NO_EXTENSION, FORESHOCK_STRICT="1")
    assert done.returncode != 0
    assert "FORESHOCK_STRICT=1, but health_scan on cpu would fall back to reference" in done.stderr
    assert "extension is not installed" in done.stderr
    assert run_python(SCAN, FORESHOCK_STRICT="1").returncode == 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_can_be_forced(backend: str) -> None:
    assert run_python(SCAN, FORESHOCK_BACKEND=backend).stdout.startswith(backend)


def test_a_forced_backend_that_cannot_run_is_an_error_with_its_reason() -> None:
    done = run_python(SCAN, FORESHOCK_BACKEND="cuda")
    assert "FORESHOCK_BACKEND=cuda, but health_scan on cpu cannot use it" in done.stderr
    done = run_python(SCAN, NO_EXTENSION, FORESHOCK_BACKEND="cpu")
    assert "extension is not installed" in done.stderr
    done = run_python(SCAN, FORESHOCK_BACKEND="gpu")
    assert "accepted: reference, cpu, triton, cuda" in done.stderr


@pytest.mark.parametrize("isa", _backend.supported_isas())
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    code = SCAN + "\n    from foreshock.ops._backend import active_isa; print(active_isa())"
    assert run_python(code, FORESHOCK_ISA=isa).stdout.split()[-1] == isa


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run_python(SCAN, FORESHOCK_ISA="avx9000")
    assert "FORESHOCK_ISA=avx9000, but accepted here: baseline" in done.stderr


def test_every_backend_is_explained() -> None:
    said = _backend.explain("health_scan", "cpu")
    assert set(said) == set(_backend.BACKENDS)
    assert sorted(said.values()).count("active") == 1
    assert all(said.values())


def test_every_op_has_every_room() -> None:
    """Design: adding an op is adding a folder of this shape."""
    for op in _backend.list_ops():
        for room in ("reference", "cpu", "register"):
            importlib.import_module(f"foreshock.ops.{op}.{room}")
        for room in ("triton", "cuda"):
            if op in ("health_scan", "power_iteration"):
                assert importlib.util.find_spec(f"foreshock.ops.{op}.{room}") is not None


def test_an_op_without_a_backend_says_so() -> None:
    without = [
        (op, backend)
        for op in _backend.list_ops()
        for backend in ("triton", "cuda")
        if importlib.util.find_spec(f"foreshock.ops.{op}.{backend}") is None
    ]
    for op, backend in without:
        assert "no implementation" in _backend.explain(op, "cpu")[backend]


# ---- the table that a bound op compares its tensors with


def test_the_layout_of_torchs_tensors_is_made_out() -> None:
    layout = find_tensor_layout()
    assert layout is not None
    assert len({*layout}) >= 6


@pytest.mark.parametrize("kind", ["layout", "exchange", "python"])
def test_the_table_notices_every_kind_of_change(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "exchange":
        monkeypatch.setattr(_table, "_tensor_layout", lambda: None)
    make = PythonTable if kind == "python" else compiled_table
    x = torch.nn.Parameter(torch.zeros(4, 6))
    deep = torch.zeros(1, 2, 1, 2, 1, 2, 3)
    tensors = [x, None, deep, torch.zeros(())]
    table = make(tensors)
    assert table.matches(tensors)
    assert table.matches([x, None, deep.view_as(deep), tensors[3]])
    assert not table.matches(tensors[:3])
    assert not table.matches([x, x, deep, tensors[3]])
    assert not table.matches([None, None, deep, tensors[3]])
    others = {
        "type": torch.zeros(4, 6, dtype=torch.int32).view(torch.float32),
        "bits": x.detach().view(torch.int32),
        "shape": x.detach().view(6, 4),
        "stride": x.detach().t(),
        "fewer": x.detach()[:3],
        "offset": x.detach().flatten()[1:],
    }
    for name, other in others.items():
        try:
            is_same = table.matches([torch.nn.Parameter(other, requires_grad=False), *tensors[1:]])
        except TypeError:
            is_same = False  # an element type that no table holds
        assert not is_same, name
    assert not table.matches([x, None, deep.transpose(1, 3), tensors[3]])
    with torch.no_grad():
        x.data = torch.zeros(4, 6)
    assert not table.matches(tensors)


@pytest.mark.parametrize("kind", ["layout", "exchange"])
def test_a_table_follows_tensors_that_have_only_moved(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "exchange":
        monkeypatch.setattr(_table, "_tensor_layout", lambda: None)
    x, deep = torch.zeros(4, 6), torch.zeros(1, 2, 1, 2, 1, 2, 3)
    table = compiled_table([x, None, deep])
    moved = [x.clone(), None, deep.clone()]
    assert table.follow(moved)
    assert table.matches(moved)
    assert not table.matches([x, None, deep])
    for other in (
        [x, None],
        [x, x, deep],
        [None, None, deep],
        [x.t(), None, deep],
        [x.double(), None, deep],
        [x.int(), None, deep],
        [torch.nn.Parameter(x), None, deep],
        [x.to_sparse(), None, deep],
        [x[:3], None, deep],
    ):
        assert not compiled_table([x, None, deep]).follow(other)


def test_a_tensor_without_memory_in_a_tables_place_is_a_mismatch() -> None:
    x = torch.zeros(3, 3)
    assert not compiled_table([x]).matches([torch.eye(3).to_sparse()])


def test_an_op_that_needs_no_cuda_is_served_by_triton_without_complaint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not by the reference: that is a fallback."""
    from foreshock.ops.rolling_zscore import triton

    monkeypatch.setenv("FORESHOCK_STRICT", "1")
    monkeypatch.setattr(triton, "why_unavailable", lambda device_type: None)
    _backend.choose.cache_clear()
    assert _backend.choose("rolling_zscore", "cuda").backend == "triton"
    monkeypatch.setattr(triton, "why_unavailable", lambda device_type: "it is off")
    _backend.choose.cache_clear()
    with pytest.raises(_backend.BackendUnavailable, match="triton: it is off"):
        _backend.choose("rolling_zscore", "cuda")
    _backend.choose.cache_clear()
