"""The picture of a run: losses, learning rate, accuracy, perplexity, over the steps.

Drawn by matplotlib (the extra "plots"), which is imported when a picture is asked for; its global
state, the back end of a notebook included, is left alone.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foreshock.records.atomic_file import write_atomically
from foreshock.records.curves_envelope import Bucket, Envelope
from foreshock.records.strict_json import to_json_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Panel(NamedTuple):
    """One of the four.

    Attributes:
        title: what stands above it.
        name: of its main metric; others end in an underscore and this name.
        may_be_logarithmic: whether it is drawn so where its values span two orders and more.
    """

    title: str
    name: str
    may_be_logarithmic: bool


PANELS = (
    Panel("Loss", "loss", True),
    Panel("Learning rate", "learning_rate", False),
    Panel("Accuracy", "accuracy", False),
    Panel("Perplexity", "perplexity", True),
)

# Okabe and Ito's, which people who confuse red and green tell apart; blue for the main metric.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
_INK, _FAINT, _ALARM = "#22252A", "#8A9099", "#C62828"
# In a corner that falling curves leave free; to look for the best one costs a pass over all.
_LEGEND: dict[str, Any] = {"loc": "upper right", "frameon": False, "fontsize": 9, "ncols": 2}
_LOGARITHMIC_FROM = 100.0
_MARKED_UP_TO = 60
_LARGEST = 1e300


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
        num_rows: for the title.
        curves: by metric.

    Returns:
        path.

    Raises:
        ImportError: matplotlib is not installed; says which extra has it.
        OSError: a file cannot be written.

    Cost: about a second; it grows with the curves and not with the run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        why = "the picture needs matplotlib; install foreshock[plots]"
        raise ImportError(why) from error
    figure = Figure(figsize=(12, 7.6), dpi=130, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is no fault of the run
        _fill(figure, model_name, num_rows, curves)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png")
        figure.savefig(svg, format="svg", metadata={"Date": None})
    write_atomically(path, png.getvalue())
    write_atomically(path.with_suffix(".svg"), svg.getvalue())
    return path


def _fill(figure: "Figure", model_name: str, num_rows: int, curves: Mapping[str, Envelope]) -> None:
    figure.suptitle(
        _printable(model_name),
        x=0.012,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=_INK,
        parse_math=False,
    )
    axes = figure.subplots(2, 2).flat
    drawn = {name: curve.buckets() for name, curve in curves.items()}
    steps = [bucket.step for buckets in drawn.values() for bucket in buckets]
    for panel, ax in zip(PANELS, axes, strict=True):
        mine = {name: drawn[name] for name in drawn if panel_of(name) == panel}
        _draw_panel(ax, panel, dict(sorted(mine.items(), key=lambda kv: kv[0] != panel.name)))
        if any(mine.values()):
            margin = 0.01 * (max(steps) - min(steps)) or 0.5
            ax.set_xlim(min(steps) - margin, max(steps) + margin)
    figure.supxlabel(_caption(num_rows, curves), x=0.012, ha="left", fontsize=9, color=_FAINT)


def _caption(num_rows: int, curves: Mapping[str, Envelope]) -> str:
    rows = f"{num_rows:,} record" + ("" if num_rows == 1 else "s")
    width = max((curve.width for curve in curves.values()), default=1)
    if width == 1:
        return rows
    return f"{rows}.  Line: mean of up to {width:,} steps; band: from their lowest to their highest"


def _draw_panel(ax: "Axes", panel: Panel, curves: Mapping[str, Sequence[Bucket]]) -> None:
    _dress(ax, panel)
    if not any(curves.values()):
        ax.set(xticks=[], yticks=[], xlabel="", facecolor="#F6F7F9")
        ax.spines[:].set_visible(False)
        said = f"no {panel.title.lower()} was recorded"
        ax.text(0.5, 0.5, said, ha="center", va="center", transform=ax.transAxes, color=_FAINT)
        return
    for number, (name, buckets) in enumerate(curves.items()):
        _draw_curve(ax, name, buckets, number)
    _scale(ax, panel, [bucket for buckets in curves.values() for bucket in buckets])
    _mark_nonfinite(ax, [bucket for buckets in curves.values() for bucket in buckets])
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1 or labels != [panel.name]:
        legend = ax.legend(handles, labels, **_LEGEND, labelcolor=_INK)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _dress(ax: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.set_title(panel.title, loc="left", fontsize=11, color=_INK, pad=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#C9CDD3")
    ax.grid(axis="y", color="#E7E9EC", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors="#5B616A", labelsize=9, length=0, pad=5)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel("step", fontsize=9, color="#5B616A")


def _draw_curve(ax: "Axes", name: str, buckets: Sequence[Bucket], number: int) -> None:
    steps = [bucket.step for bucket in buckets]
    color = _COLORS[number % len(_COLORS)]
    dashes = "-" if number < len(_COLORS) else "--"
    if any(bucket.low < bucket.high for bucket in buckets):
        low = [_drawable(bucket.low) for bucket in buckets]
        high = [_drawable(bucket.high) for bucket in buckets]
        ax.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0.6, zorder=2)
    ax.plot(
        steps,
        [_drawable(bucket.mean) for bucket in buckets],
        dashes,
        color=color,
        linewidth=1.5,
        marker="o" if len(buckets) <= _MARKED_UP_TO else "",
        markersize=3.5,
        label=_printable(name),
        zorder=3 if number else 4,
    )


def _drawable(number: float) -> float:
    """NaN, a gap, for the extremes of what has no finite value."""
    # An axis must be able to span what it shows, and to leave a margin.
    return max(-_LARGEST, min(_LARGEST, number)) if math.isfinite(number) else math.nan


def _scale(ax: "Axes", panel: Panel, buckets: Sequence[Bucket]) -> None:
    finite = [bucket for bucket in buckets if bucket.low <= bucket.high]
    if not finite:
        return
    low, high = min(b.low for b in finite), max(b.high for b in finite)
    if panel.may_be_logarithmic and low > 0 and high / low >= _LOGARITHMIC_FROM:
        ax.set_yscale("log")
        ax.tick_params(which="both", length=0)
    elif panel.name == "learning_rate":
        ax.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # no power of ten set apart
    elif panel.name == "accuracy" and low >= 0 and high <= 1:
        ax.set_ylim(-0.02, 1.02)


def _mark_nonfinite(ax: "Axes", buckets: Sequence[Bucket]) -> None:
    steps = sorted({bucket.step for bucket in buckets if bucket.nonfinite})
    if steps:
        ax.plot(
            steps,
            [0.015] * len(steps),
            "x",
            color=_ALARM,
            markersize=5,
            markeredgewidth=1.4,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label="NaN or infinite",
            zorder=5,
        )


def _printable(text: str) -> str:
    shown = to_json_value(text)
    said = shown if isinstance(shown, str) else "model name redacted"
    return "".join(mark if mark.isprintable() else "?" for mark in said)
