"""The probe on a real device: what it says there, and that it waits for nothing."""

from __future__ import annotations

import pytest
import torch

from tests.surprise.networks import data, fitted, mlp

pytestmark = pytest.mark.gpu


def test_what_was_fitted_on_the_cpu_says_the_same_on_the_gpu() -> None:
    model = mlp().eval()
    probe, x = fitted(model), data(200, seed=3)
    expected = probe(x)
    model.cuda()
    seen = probe.to("cuda")(x)
    assert seen.score.is_cuda
    torch.testing.assert_close(seen.score.cpu(), expected.score, rtol=1e-3, atol=1e-3)


def test_a_model_on_the_gpu_is_fitted_there() -> None:
    probe, x = fitted(mlp().eval().cuda()), data(200, seed=3)
    assert all(buffer.is_cuda for buffer in probe.buffers())
    torch.testing.assert_close(probe(x).score.cpu(), fitted()(x).score, rtol=0.05, atol=0.05)


def test_watching_waits_for_nothing() -> None:
    model = mlp().eval().cuda()
    probe, x = fitted(model), data(64, seed=3).cuda()
    probe(x)  # compiles, and puts the reference scores on the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with probe.watch() as seen, torch.no_grad():
            model(x)
        said = seen.surprise()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not said.score.isnan().any()
