"""How surprised each layer was by each sample, from what `surprise.save_layerwise` has saved."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_MEMBERS = frozenset({"layers.npy", "surprise_LN.npy", "groups.npy"})
_MAX_BYTES = 256_000_000
_MAX_LAYERS = 200
_MAX_GROUPS = 8
_COLUMNS = 400


def is_layerwise(path: Path) -> bool:
    """Tells whether this is such a file; other .npz files are somebody else's."""
    try:
        with zipfile.ZipFile(path) as members:
            return set(members.namelist()) >= _MEMBERS
    except (OSError, zipfile.BadZipFile):
        return False


def read_layerwise(path: Path) -> dict[str, Any]:
    """Reads such a file, as a table with a strip of shades for each layer.

    The shades of a layer go from its own 2nd percentile to its 98th, as in `plot_layerwise`;
    samples of a group stand together, ordered by their mean over layers. Samples that share a
    column are averaged.

    Args:
        path: of the .npz.

    Returns:
        `{"groups": [name, ...], "layers": [{"name", "means" (by group), "shades" (0 to 255; None
        where nothing was finite)}, ...], "left_out": layers that are not shown}`.

    Raises:
        ValueError: the file is too large, or not what it should be.
        OSError: it cannot be read.
    """
    import numpy as np

    with zipfile.ZipFile(path) as members:
        size = sum(member.file_size for member in members.infolist())
    if size > _MAX_BYTES:
        raise ValueError(f"it holds {size} bytes; accepted: up to {_MAX_BYTES}")
    with np.load(path, allow_pickle=False) as saved:
        names, surprise_LN, groups = (saved[k] for k in ("layers", "surprise_LN", "groups"))
    samples = (len(names), len(groups))
    if surprise_LN.shape != samples or 0 in samples or surprise_LN.dtype.kind != "f":
        raise ValueError(f"surprise_LN is {surprise_LN.dtype} of {surprise_LN.shape}")
    labels = list(dict.fromkeys(groups.tolist()))[:_MAX_GROUPS]
    shown_LN = np.where(np.isfinite(surprise_LN), surprise_LN, np.nan)[:_MAX_LAYERS]
    shades_LC = _shades(shown_LN, groups)
    layers = [
        {
            "name": str(name),
            "means": [_mean(row_N[groups == label]) for label in labels],
            "shades": [None if np.isnan(s) else round(float(s) * 255) for s in shades_C],
        }
        for name, row_N, shades_C in zip(names.tolist(), shown_LN, shades_LC, strict=False)
    ]
    return {
        "groups": [str(label) or "all" for label in labels],
        "layers": layers,
        "left_out": max(0, len(names) - _MAX_LAYERS),
    }


def _shades(
    surprise_LN: np.ndarray[Any, Any], groups: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    import numpy as np

    low, high = (_percentile(surprise_LN, q) for q in (2, 98))
    shade_LN = np.clip((surprise_LN - low) / np.maximum(high - low, 1e-12), 0, 1)
    _, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
    order = np.lexsort((np.nan_to_num(shade_LN).mean(0), first[of_group]))
    columns = np.array_split(shade_LN[:, order], min(_COLUMNS, len(order)), axis=1)
    counts = [np.maximum((~np.isnan(column)).sum(1), 1) for column in columns]
    means = [np.nansum(c, 1) / n for c, n in zip(columns, counts, strict=True)]
    bad = [np.isnan(column).all(1) for column in columns]
    shades: np.ndarray[Any, Any] = np.where(np.stack(bad, 1), np.nan, np.stack(means, 1))
    return shades


def _percentile(values_LN: np.ndarray[Any, Any], q: float) -> np.ndarray[Any, Any]:
    """Of each row's finite values, (L, 1); 0 where it has none."""
    import numpy as np

    rows = (row[~np.isnan(row)] for row in values_LN)
    return np.array([[np.percentile(row, q) if row.size else 0.0] for row in rows])


def _mean(values: np.ndarray[Any, Any]) -> float | None:
    import numpy as np

    finite = values[~np.isnan(values)]
    return float(finite.mean(dtype=np.float64)) if finite.size else None
