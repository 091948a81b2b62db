"""Which modules of a model are its layers, and how wide their output is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

_MOST_LISTED = 12
_WIDTHS = ("out_features", "normalized_shape", "nf", "embedding_dim")
"""Attributes that say how wide a module's output is; `nf` is that of Conv1D of transformers."""


def select(model: nn.Module, layers: str | int | Sequence[str | int]) -> dict[str, nn.Module]:
    """The layers that are meant, by dotted name; see `attach`."""
    if layers == "intermediate":
        names = _stack(model)
        if len(names) < 3:
            raise ValueError(
                f"layers is 'intermediate', and the model has {_counted(names)}, none of which is "
                "between a first and a last; accepted: 'all', indices or dotted names"
            )
        chosen = names[1:-1]
    elif layers == "all":
        chosen = _stack(model)
    else:
        chosen = [_named(model, one) for one in _as_list(layers)]
    if not chosen:
        raise ValueError("layers is empty; accepted: at least one index or dotted name")
    return {name: model.get_submodule(name) for name in chosen}


def _as_list(layers: Any) -> list[str | int]:
    given = [layers] if isinstance(layers, str | int) else layers
    is_list = isinstance(given, Iterable) and not isinstance(given, dict)
    listed = list(given) if is_list else []
    is_right = all(isinstance(one, str | int) and not isinstance(one, bool) for one in listed)
    if not is_list or not is_right:
        raise TypeError(
            f"layers is {layers!r}; accepted: 'intermediate', 'all', indices, or dotted names"
        )
    return listed


def _named(model: nn.Module, one: str | int) -> str:
    if isinstance(one, int):
        names = _stack(model)
        if not -len(names) <= one < len(names):
            raise ValueError(f"layers: there is no layer {one}; the model has {_counted(names)}")
        return names[one]
    named = dict(model.named_modules())
    if one and one in named:
        return one
    near = difflib.get_close_matches(one, [name for name in named if name], 1)
    hint = f"; did you mean {near[0]!r}" if near else ""
    raise ValueError(
        f"layers: {one!r} names no module{hint}; accepted: 'intermediate', 'all', indices, and "
        f"names of modules, such as {_listed([name for name in named if name])}"
    )


def _stack(model: nn.Module) -> list[str]:
    """The names of the decoder layers, in their order."""
    wanted = _config(model, "num_hidden_layers")
    found: dict[str, int] = {}
    for kind in (nn.ModuleList, nn.Sequential):
        stacks = _outermost(model, kind)
        found |= stacks
        longest = _longest({n: size for n, size in stacks.items() if wanted in (None, size)})
        if longest is not None:
            children = model.get_submodule(longest).named_children()
            return [f"{longest}.{child}" if longest else child for child, _ in children]
    looked = "longer than any other" if wanted is None else f"of num_hidden_layers={wanted} modules"
    listed = ", ".join(f"{name or 'the model'} of {size}" for name, size in found.items())
    raise ValueError(
        f"layers: the model's layers were not found. Looked for: one nn.ModuleList, or else one "
        f"nn.Sequential, {looked}. Found: "
        f"{listed or 'none, and the children ' + _listed([n for n, _ in model.named_children()])}. "
        "Accepted: dotted names of layers"
    )


def _longest(stacks: dict[str, int]) -> str | None:
    """The longest of some; of several as long as each other, the decoder's."""
    longest = [name for name, size in stacks.items() if size == max(stacks.values())]
    if len(longest) > 1:
        longest = [name for name in longest if "decoder" in name]
    return longest[0] if len(longest) == 1 else None


def _outermost(model: nn.Module, kind: type[nn.Module]) -> dict[str, int]:
    """Modules of a kind that are in none of that kind, with how many children each has."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{other}." if other else "") for other in found)
        if isinstance(module, kind) and len(list(module.children())) and not is_inside:
            found[name] = len(list(module.children()))
    return found


def width_of(model: nn.Module, name: str) -> int:
    """The last dimension of what a layer puts out.

    Raises:
        ValueError: it is written nowhere; says where was looked.
    """
    layer = model.get_submodule(name)
    own = _width(layer)
    if own is not None:
        return own
    hidden = _config(model, "hidden_size")
    within = [width for module in layer.modules() if (width := _width(module)) is not None]
    if hidden is not None or within:
        return within[-1] if hidden is None else hidden
    raise ValueError(
        f"dim: the width of layer {name!r} was not found. Looked for: config.hidden_size, and "
        f"{', '.join(_WIDTHS)} in its modules. Found: a {type(layer).__name__} with children "
        f"{_listed([n for n, _ in layer.named_children()])}. Accepted: dim="
    )


def _width(module: nn.Module) -> int | None:
    for attribute in _WIDTHS:
        width = getattr(module, attribute, None)
        width = width[-1] if isinstance(width, tuple) and width else width
        if isinstance(width, int):
            return width
    return None


def _config(model: nn.Module, key: str) -> int | None:
    """A number of the configuration that models of transformers have."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    value = getattr(config, key, None)
    return value if isinstance(value, int) else None


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} layers ({_listed(names)})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (", ".join(map(repr, names[:_MOST_LISTED])) or "none") + more
