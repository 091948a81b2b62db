"""The picture of a series: a panel for each of its names, over the steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from foreshock.records.curves_canvas import (
    draw_picture,
    shared_limits,
    write_caption,
    write_title,
)
from foreshock.records.curves_envelope import Envelope
from foreshock.records.curves_panel import Panel, draw_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL_INCHES = (6.0, 3.3)


def draw_series(path: Path, name: str, num_rows: int, curves: Mapping[str, Envelope]) -> Path:
    """Draws the curves into a PNG file.

    Where a name has labels, the line is the mean over them, and the band goes from the lowest of
    their numbers to the highest.

    Args:
        path: of the file.
        name: of the series, for the title.
        num_rows: for the caption.
        curves: by name, at least one.

    Returns:
        path.

    Raises:
        ImportError: matplotlib is not installed; says which extra has it.
        OSError: the file cannot be written.

    Cost: some tenths of a second for each panel, however many rows there are.
    """
    across = min(2, len(curves))
    down = -(-len(curves) // across)
    size = (_PANEL_INCHES[0] * across, _PANEL_INCHES[1] * down + 1)
    return draw_picture(path, size, lambda figure: _fill(figure, name, num_rows, curves))


def _fill(figure: "Figure", name: str, num_rows: int, curves: Mapping[str, Envelope]) -> None:
    write_title(figure, name)
    across = min(2, len(curves))
    axes = [*figure.subplots(-(-len(curves) // across), across, squeeze=False).flat]
    drawn = {name: curve.buckets() for name, curve in curves.items()}
    limits = shared_limits(bucket.step for buckets in drawn.values() for bucket in buckets)
    for (of_name, buckets), ax in zip(drawn.items(), axes, strict=False):
        draw_panel(ax, Panel(of_name, of_name, False), {of_name: buckets})
        ax.set_xlim(*limits)
    for ax in axes[len(drawn) :]:
        ax.set_visible(False)
    write_caption(figure, num_rows, curves)
