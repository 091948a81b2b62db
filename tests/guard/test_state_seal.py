"""Sums of bits by which a change between two updates is found."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from foreshock.guard.state_seal import StateSeal


def trained(**how: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **how)
    update(model, optimizer)
    return model, optimizer


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()


def sealed(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> StateSeal:
    seal = StateSeal(dict(model.named_parameters()), optimizer)
    seal.set()
    return seal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_flipped_bit_of_every_tensor_is_found_and_named(dtype: torch.dtype) -> None:
    model, optimizer = trained()
    for p in model.parameters():
        p.data = p.data.to(dtype)
    seal, rng = sealed(model, optimizer), random.Random(0)
    named = {name: (p, "parameter") for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, tensor in optimizer.state[p].items():
            named[f"{name}: {key}"] = (tensor, "optimizer state")
    for name, (tensor, kind) in named.items():
        memory = tensor.detach().view(-1).view(torch.uint8)
        for _ in range(20):
            at, bit = rng.randrange(len(memory)), 1 << rng.randrange(8)
            memory[at] ^= bit
            assert seal.differs()
            changed = seal.find_changed()
            assert changed is not None
            assert (changed.name, changed.kind) == (name, kind)
            memory[at] ^= bit
            assert not seal.differs()
    assert seal.find_changed() is None


def test_what_only_the_scheduler_changes_is_no_change() -> None:
    model, optimizer = trained()
    seal = sealed(model, optimizer)
    optimizer.param_groups[0].update(lr=7.0, betas=(0.1, 0.2))
    optimizer.zero_grad()
    assert not seal.differs()


def test_an_update_and_lost_or_new_state_are_changes() -> None:
    model, optimizer = trained()
    seal = sealed(model, optimizer)
    state = dict(optimizer.state)
    optimizer.state.clear()
    assert seal.differs()
    assert seal.find_changed() is not None
    optimizer.state.update(state)
    assert not seal.differs()
    update(model, optimizer)
    assert seal.differs()


def test_a_seal_that_was_never_set_is_not_broken() -> None:
    model, optimizer = trained()
    seal = StateSeal(dict(model.named_parameters()), optimizer)
    assert not seal.is_set
    assert not seal.differs()


@pytest.mark.parametrize("numel", [0, 1, 3, 7, 9])
def test_memory_of_any_size_is_summed_up_whole(numel: int) -> None:
    p = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
    seal = StateSeal({"p": p}, torch.optim.SGD([p, torch.nn.Parameter(torch.ones(1))], lr=0.1))
    seal.set()
    for i in range(numel):
        p.data.view(torch.int16)[i] ^= 1
        assert seal.differs()
        p.data.view(torch.int16)[i] ^= 1
    assert not seal.differs()
