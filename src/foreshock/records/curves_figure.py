"""The picture of a run: losses, learning rate, accuracy, perplexity, over the steps."""

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

PANELS = (
    Panel("Loss", "loss", True),
    Panel("Learning rate", "learning_rate", False),
    Panel("Accuracy", "accuracy", False),
    Panel("Perplexity", "perplexity", True),
)


def panel_of(metric: str) -> Panel | None:
    """In which panel a metric is drawn, by its name; None: in no one.

    Args:
        metric: such as "loss", "pet_loss", "validation_accuracy".
    """
    for panel in PANELS:
        if metric == panel.name or metric.endswith("_" + panel.name):
            return panel
    return None


def draw_curves(path: Path, model_name: str, num_rows: int, curves: Mapping[str, Envelope]) -> Path:
    """Draws the four panels into a PNG file, and an SVG file beside it.

    Args:
        path: of the PNG file.
        model_name: for the title.
        num_rows: for the caption.
        curves: by metric.

    Returns:
        path.

    Raises:
        ImportError: matplotlib is not installed; says which extra has it.
        OSError: a file cannot be written.

    Cost: about a second; it grows with the curves and not with the run.
    """
    return draw_picture(
        path,
        (12, 7.6),
        lambda figure: _fill(figure, model_name, num_rows, curves),
        also_svg=True,
    )


def _fill(figure: "Figure", model_name: str, num_rows: int, curves: Mapping[str, Envelope]) -> None:
    write_title(figure, model_name)
    axes = figure.subplots(2, 2).flat
    drawn = {name: curve.buckets() for name, curve in curves.items()}
    steps = [bucket.step for buckets in drawn.values() for bucket in buckets]
    for panel, ax in zip(PANELS, axes, strict=True):
        mine = {name: drawn[name] for name in drawn if panel_of(name) == panel}
        draw_panel(ax, panel, dict(sorted(mine.items(), key=lambda kv: kv[0] != panel.name)))
        if any(mine.values()):
            ax.set_xlim(*shared_limits(steps))
    write_caption(figure, num_rows, curves)
