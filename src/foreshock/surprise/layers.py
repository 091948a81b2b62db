"""Which layers of a model are listened to: by name, or by where they lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

Layers = dict[str, nn.Module]

_STAGE = re.compile(r"(^|\.)(layer|stage|block|group)s?[._]?\d+$")
_MOST_LISTED = 40


def _of(layers: Layers, kind: type[nn.Module]) -> Layers:
    return {name: layer for name, layer in layers.items() if isinstance(layer, kind)}


def _last(layers: Layers, count: int = 1) -> Layers:
    return dict(list(layers.items())[-count:])


def _first(layers: Layers) -> Layers:
    return dict(list(layers.items())[:1])


def _stages(model: nn.Module) -> list[str]:
    """Names of the outermost stages in the order of the model; a stage has layers inside it."""
    stages: list[str] = []
    for name, module in model.named_modules():
        is_stage = _STAGE.search(name) and next(module.children(), None) is not None
        if is_stage and not name.startswith(tuple(f"{stage}." for stage in stages)):
            stages.append(name)
    return stages


def _in_stages(model: nn.Module, layers: Layers, last: int | None) -> Layers:
    stages = _stages(model)
    inside = tuple(f"{stage}." for stage in (stages if last is None else stages[-last:]))
    return {name: layer for name, layer in layers.items() if name.startswith(inside)}


_SHORTCUTS: dict[str, Callable[[nn.Module, Layers], Layers]] = {
    "all_linear": lambda _, layers: _of(layers, nn.Linear),
    "all_conv": lambda _, layers: _of(layers, nn.Conv2d),
    "first_linear": lambda _, layers: _first(_of(layers, nn.Linear)),
    "last_linear": lambda _, layers: _last(_of(layers, nn.Linear)),
    "first_conv": lambda _, layers: _first(_of(layers, nn.Conv2d)),
    "last_conv": lambda _, layers: _last(_of(layers, nn.Conv2d)),
    "last_block": lambda model, layers: _in_stages(model, layers, 1),
    "last_two_blocks": lambda model, layers: _in_stages(model, layers, 2),
    "all_blocks": lambda model, layers: _in_stages(model, layers, None),
}


def select(
    model: nn.Module,
    layers: str | Sequence[str],
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> dict[str, nn.Module]:
    """The layers that are meant, by dotted name, in the order of the model.

    Args:
        model: a module whose layers are initialised.
        layers: a shortcut or a dotted name, or a sequence of them, of which the union is taken.
            "all_linear", "all_conv"; "first_" and "last_" of "linear" and "conv", in the order of
            definition; "last_block", "last_two_blocks", "all_blocks": the layers of every kind
            within the last, the last two and all stages of a residual network, which are its
            outermost modules named like `layer4`, `stage_2`, `stages.1` or `blocks.0`.
        kinds: what counts as a layer; a shortcut never gives anything else.
    Returns:
        Each layer once, by its first name. The `out_proj` of an nn.MultiheadAttention is none: its
        weight is read there and its forward never runs.
    Raises:
        TypeError: model or layers is something else.
        ValueError: an unknown shortcut or name, or nothing selected; lists the candidates.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted: torch.nn.Module")
    wanted = _as_names(layers)
    candidates = _candidates(model, kinds)
    chosen: set[str] = set()
    for one in wanted:
        found = _SHORTCUTS[one](model, candidates) if one in _SHORTCUTS else {}
        if one not in _SHORTCUTS:
            found = _named(model, candidates, one)
        if not found:
            raise ValueError(f"layers: {one!r} selects no layer; {_accepted(candidates)}")
        chosen.update(found)
    if not chosen:
        raise ValueError(f"layers is empty; {_accepted(candidates)}")
    return {name: layer for name, layer in candidates.items() if name in chosen}


def _as_names(layers: str | Sequence[str]) -> list[str]:
    wanted = [layers] if isinstance(layers, str) else layers
    if not isinstance(wanted, Iterable) or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"layers is {layers!r}; accepted: a string or a sequence of strings")
    return list(wanted)


def _candidates(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Layers:
    modules = dict(model.named_modules())
    unheard = {m.out_proj for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    return {n: m for n, m in modules.items() if isinstance(m, kinds) and m not in unheard}


def _named(model: nn.Module, candidates: Layers, name: str) -> Layers:
    """The layer of a dotted name, which may be a second one of a shared layer."""
    named = dict(model.named_modules(remove_duplicate=False))
    if name not in named:
        raise ValueError(
            f"layers: {name!r} is no shortcut and names no module; {_accepted(candidates)}"
        )
    return {first: layer for first, layer in candidates.items() if layer is named[name]}


def _accepted(candidates: Layers) -> str:
    names = list(candidates)
    listed = ", ".join(repr(name) for name in names[:_MOST_LISTED]) or "none in this model"
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"accepted: {', '.join(map(repr, _SHORTCUTS))}, and the names of layers: {listed}{more}"
