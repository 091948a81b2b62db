"""A loop in JAX behind four functions; where JAX is installed, which `make test` does not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foreshock as fs

jax = pytest.importorskip("jax")

FEATURES, STEPS = 4, 80


def update(weights: Any, key: Any, rate: float) -> Any:
    """One step of linear regression, its batch drawn from the key."""
    key, own = jax.random.split(jax.random.wrap_key_data(key))
    x = jax.random.normal(own, (16, FEATURES), weights["w"].dtype)

    def loss_of(weights: Any) -> Any:
        return jax.numpy.mean((x @ weights["w"] + weights["b"] - x.sum(1)) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(weights)
    weights = jax.tree.map(lambda w, g: (w - rate * g).astype(w.dtype), weights, gradient)
    return weights, jax.random.key_data(key), loss


def train(out_dir: Path, dtype: Any, strikes: set[int]) -> tuple[Any, dict[str, Any]]:
    zeros = {"w": jax.numpy.zeros(FEATURES, dtype), "b": jax.numpy.zeros((), dtype)}
    state = {"weights": zeros, "key": jax.random.key_data(jax.random.key(0))}
    compiled = jax.jit(update)
    guard = fs.Guard(mode="recover", snapshot_interval=10, lr_backoff=1.0)
    functions = (lambda: state, state.update, lambda: 0.1, lambda rate: None)
    with fs.Monitor.from_functions(*functions, out_dir, guard) as monitor:
        while monitor.next_step < STEPS:
            step = monitor.next_step
            if step in strikes:
                strikes.remove(step)
                struck = jax.numpy.asarray(state["weights"]["w"]).at[2].set(np.nan)
                state["weights"] = {**state["weights"], "w": struck}
            state["weights"], state["key"], loss = compiled(state["weights"], state["key"], 0.1)
            assert monitor.step(step, loss, state["weights"])
    return state["weights"], monitor.finalize()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_in_jax_that_gets_a_nan_ends_with_the_bits_of_one_that_does_not(
    tmp_path: Path, dtype: str
) -> None:
    clean, _ = train(tmp_path / "clean", dtype, set())
    struck, summary = train(tmp_path / "struck", dtype, {50})
    assert summary["guard"]["total_rollbacks"] == 1
    assert summary["guard"]["integrity_status"] == "RECOVERED"
    for name in clean:
        assert np.array_equal(np.asarray(clean[name]), np.asarray(struck[name]))
