"""calibrated_scores in Triton: in its interpreter, compiled ahead of time, and on a device.

Run as a module, this file is a process of triton_process.py.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from foreshock.ops import CalibratedScores
from tests.ops.calibrated_scores_cases import AGGREGATIONS, IMPLEMENTATIONS, assert_agrees, case
from tests.ops.triton_process import compile_all, interpreted, main, results_of

# One process has what Triton makes, once.
pytestmark = pytest.mark.xdist_group("calibrated_scores in Triton")

SHAPES = {"1x1x1": (1, 1, 1), "5x130x20": (5, 130, 20), "3x128x1000": (3, 128, 1000)}
CASES = ["-".join(each) for each in itertools.product(SHAPES, AGGREGATIONS)]


def given(name: str) -> Any:
    shape, aggregation = name.split("-")
    return case(*SHAPES[shape], aggregation)


def interpret() -> dict[str, Any]:
    from foreshock.ops.calibrated_scores import triton

    assert triton.why_unavailable("cpu") is None

    def attempt(name: str) -> tuple[Any, ...] | str:
        try:
            return tuple(given(name).scored_by(triton.score))
        except Exception:
            return traceback.format_exc()

    return {name: attempt(name) for name in CASES}


def compile_kernels() -> dict[str, Any]:
    from triton.compiler import ASTSource

    from foreshock.ops.calibrated_scores import triton as ours

    sources = {}
    for aggregation, has_reference in itertools.product(AGGREGATIONS, (True, False)):
        chosen = {
            "is_largest": aggregation == "max",
            "has_weights": aggregation == "weighted",
            "has_reference": has_reference,
        }
        signature = {"distances_ptr": "*fp32", "scale_ptr": "*fp32", "weights_ptr": "*fp64"}
        signature |= {"reference_ptr": "*fp64", "z_ptr": "*fp32", "scores_ptr": "*fp32"}
        signature |= {"share_ptr": "*fp64", "is_above_ptr": "*i1", "threshold": "fp32"}
        signature |= dict.fromkeys(("layers", "samples", "known", "halvings"), "i32")
        signature |= dict.fromkeys(chosen, "constexpr")
        order = ours._calibrated_scores_kernel.arg_names
        signature = {name: signature[name] for name in order}
        constants = {(order.index(name),): value for name, value in chosen.items()}
        sources[f"{aggregation}-{has_reference}"] = ASTSource(
            ours._calibrated_scores_kernel, signature, constants
        )
    return compile_all(sources, ours.OPTIONS)


COMPILED = [
    f"sm{capability}-{aggregation}-{has_reference}"
    for capability, aggregation, has_reference in itertools.product(
        (80, 90), AGGREGATIONS, (True, False)
    )
]


@pytest.fixture(scope="module")
def triton_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Results of `interpret` and `compile_kernels`, each run in a process of its own."""
    yield from results_of(__name__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CASES)
def test_triton_agrees_with_the_definition(triton_process: Callable[[str], Any], name: str) -> None:
    found = interpreted(triton_process("interpret")[name])
    assert_agrees(CalibratedScores(*found), given(name))


@pytest.mark.parametrize("name", COMPILED)
def test_triton_compiles_ahead_of_time(triton_process: Callable[[str], Any], name: str) -> None:
    kernel = triton_process("compile_kernels")[name]
    assert kernel["cubin"] == b"\x7fELF"
    assert kernel["shared_bytes"] <= 48 << 10  # what every device grants without being asked
    assert ".ftz" not in kernel["ptx"], "denormals would be flushed"
    assert "div.rn.f32" in kernel["ptx"]


def test_a_threshold_keeps_its_meaning_among_float32() -> None:
    pytest.importorskip("triton")
    from foreshock.ops.calibrated_scores.triton import _highest_float32

    for bound in (0.1, -0.1, 1 / 3, 1.0, 0.0, math.inf, -math.inf, 2.0**-140, 1e39):
        found = np.float32(_highest_float32(bound))
        assert float(found) <= bound
        with np.errstate(over="ignore"):
            assert bound == math.inf or float(np.nextafter(found, np.float32(np.inf))) > bound


# On a device.


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_agrees_on_the_device(backend: str, name: str) -> None:
    if backend == "triton":
        triton = pytest.importorskip("foreshock.ops.calibrated_scores.triton")
        reason = triton.why_unavailable("cuda")
        if reason is not None:
            pytest.skip(reason)
        score = triton.score
    else:
        score = IMPLEMENTATIONS["reference"].score
    assert_agrees(given(name).scored_by(score, "cuda"), given(name))


if __name__ == "__main__":
    main({"interpret": interpret, "compile_kernels": compile_kernels})
