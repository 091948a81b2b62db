"""One panel of a picture: curves over the steps, each in the band of its extremes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from foreshock.records.curves_canvas import FAINT, INK, printable
from foreshock.records.curves_envelope import Bucket

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, which people who confuse red and green tell apart; blue for the main metric.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
_ALARM = "#C62828"
# In a corner that falling curves leave free; to look for the best one costs a pass over all.
_LEGEND: dict[str, Any] = {"loc": "upper right", "frameon": False, "fontsize": 9, "ncols": 2}
_LOGARITHMIC_FROM = 100.0
_MARKED_UP_TO = 60
_LARGEST = 1e300


class Panel(NamedTuple):
    """What of a picture is drawn in one place.

    Attributes:
        title: what stands above it.
        name: of its main metric; others end in an underscore and this name.
        may_be_logarithmic: whether it is drawn so where its values span two orders and more.
    """

    title: str
    name: str
    may_be_logarithmic: bool


def draw_panel(ax: "Axes", panel: Panel, curves: Mapping[str, Sequence[Bucket]]) -> None:
    """Draws the curves of one panel; one without data says so.

    Args:
        ax: where.
        panel: which.
        curves: by name, the main one first.
    """
    _dress(ax, panel)
    if not any(curves.values()):
        ax.set(xticks=[], yticks=[], xlabel="", facecolor="#F6F7F9")
        ax.spines[:].set_visible(False)
        said = f"no {panel.title.lower()} was recorded"
        ax.text(0.5, 0.5, said, ha="center", va="center", transform=ax.transAxes, color=FAINT)
        return
    for number, (name, buckets) in enumerate(curves.items()):
        _draw_curve(ax, name, buckets, number)
    _scale(ax, panel, [bucket for buckets in curves.values() for bucket in buckets])
    _mark_nonfinite(ax, [bucket for buckets in curves.values() for bucket in buckets])
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1 or labels != [panel.name]:
        legend = ax.legend(handles, labels, **_LEGEND, labelcolor=INK)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _dress(ax: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    ax.set_title(panel.title, loc="left", fontsize=11, color=INK, pad=8)
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
        label=printable(name),
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
