"""A picture in a file: how large, in which ink, under which title.

Drawn by matplotlib (the extra "plots"), which is imported when a picture is asked for; its global
state, the back end of a notebook included, is left alone.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from foreshock.records.atomic_file import write_atomically
from foreshock.records.curves_envelope import Envelope
from foreshock.records.strict_json import to_json_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#22252A", "#8A9099"


def draw_picture(
    path: Path,
    size_inches: tuple[float, float],
    fill: Callable[["Figure"], None],
    *,
    also_svg: bool = False,
) -> Path:
    """Draws a picture into a PNG file.

    Args:
        path: of the file.
        size_inches: width and height, of 130 pixels.
        fill: draws into the figure it is given.
        also_svg: whether there is to be an SVG file beside it.

    Returns:
        path.

    Raises:
        ImportError: matplotlib is not installed; says which extra has it.
        OSError: a file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        why = "the picture needs matplotlib; install foreshock[plots]"
        raise ImportError(why) from error
    figure = Figure(figsize=size_inches, dpi=130, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is no fault of the run
        fill(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png")
        if also_svg:
            figure.savefig(svg, format="svg", metadata={"Date": None})
    write_atomically(path, png.getvalue())
    if also_svg:
        write_atomically(path.with_suffix(".svg"), svg.getvalue())
    return path


def write_title(figure: "Figure", text: str) -> None:
    """Writes what the picture is of above it."""
    figure.suptitle(
        printable(text),
        x=0.012,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=INK,
        parse_math=False,
    )


def write_caption(figure: "Figure", num_rows: int, curves: Mapping[str, Envelope]) -> None:
    """Writes below the picture how much is in it, and what its bands mean."""
    text = f"{num_rows:,} record" + ("" if num_rows == 1 else "s")
    width = max((curve.width for curve in curves.values()), default=1)
    if width > 1:
        text += f".  Line: mean of up to {width:,} steps; band: from their lowest to their highest"
    figure.supxlabel(text, x=0.012, ha="left", fontsize=9, color=FAINT)


def shared_limits(steps: Iterable[int]) -> tuple[float, float]:
    """From where to where the steps of all panels go, with a margin; there is at least one."""
    low, high = min(steps := [*steps]), max(steps)
    margin = 0.01 * (high - low) or 0.5
    return low - margin, high + margin


def printable(text: str) -> str:
    """The text as it may be shown: what has no glyph as a question mark."""
    shown = to_json_value(text)
    said = shown if isinstance(shown, str) else "model name redacted"
    return "".join(mark if mark.isprintable() else "?" for mark in said)
