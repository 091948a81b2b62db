"""What a monitor follows of a training for a long time, as its settings ask."""

from __future__ import annotations

import torch

from foreshock.distributed_part import is_split
from foreshock.guard import Consensus
from foreshock.monitor_settings import MonitorSettings
from foreshock.noise_watch import NoiseWatch
from foreshock.signals import SpectralWatch
from foreshock.step_watch import StepWatch


def follow_spectra(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    given: MonitorSettings,
    ranks: Consensus | None,
) -> SpectralWatch | None:
    """The spectra of the model's matrices; None if nobody asks.

    Where a matrix is split, the ranks add up what each sees of it; copies need no word.
    """
    if not given.spectral_enabled:
        return None
    has_parts = any(map(is_split, model.parameters()))
    return SpectralWatch(
        dict(model.named_parameters()),
        optimizer,
        given.spectral_interval,
        given.spectral_include,
        given.spectral_exclude,
        given.spectral,
        ranks.group if ranks is not None and has_parts else None,
    )


def follow_noise(optimizer: torch.optim.Optimizer, given: MonitorSettings) -> NoiseWatch | None:
    """The noise of loss and gradients; None if nobody asks."""
    if not given.fingerprint_enabled:
        return None
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    noise = NoiseWatch(updated, given.fingerprint, given.alignment_interval)
    if given.fingerprint_reference is not None:
        noise.load_reference(given.fingerprint_reference)
    return noise


def follow_surprise(model: torch.nn.Module, probe: object, interval: int) -> StepWatch:
    """How surprising the batches are to a probe of this model.

    Raises:
        TypeError, ValueError: it is no probe, or one of another model.
    """
    from foreshock.surprise import SurpriseProbe  # not for those who have no probe
    from foreshock.surprise_watch import SurpriseWatch

    if not isinstance(probe, SurpriseProbe):
        given = type(probe).__name__
        raise TypeError(f"surprise is a {given}; accepted: a SurpriseProbe or None")
    if not any(probe.model is module for module in model.modules()):
        raise ValueError("surprise is a probe of another model; accepted: one of this model")
    return SurpriseWatch(probe, interval)
