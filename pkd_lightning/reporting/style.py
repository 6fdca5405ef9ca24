"""How every figure looks, and how a figure becomes inline SVG or a PNG file."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pkd_lightning.checkpoint import atomic_write
from pkd_lightning.reporting.values import engineering

# Okabe and Ito's colours: distinguishable with every common form of colour blindness, yellow left out (on white).
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY = "#222222", "#767676"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# One width for all: two figures side by side on a 1280 pixel page, one on a phone, text legible in both.
WIDTH = 5.0
TEACHER_DASH = (0, (5, 3))

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.facecolor": "white",
    "svg.fonttype": "path",  # the reader's fonts have other widths: labels would collide
    "svg.hashsalt": "pkd",  # the same data gives the same file
    "text.parse_math": False,  # a name with dollar signs is a name; so no formatter may write mathematics
    "axes.formatter.useoffset": False,  # 97.5, not 0.5 and "+97" in a corner
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside this context."""
    with mpl.rc_context(RC):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure (inches), drawn without pyplot: no global state, no display."""
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page.

    Comments and metadata go (they repeat data unescaped, and name web addresses), the size goes (the page scales it),
    and identifiers get the figure's name, because all figures share the page's one name space.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    opening = text[: text.index(">") + 1]
    plain = re.sub(r'\s(?:width|height|version)="[^"]*"', "", opening)
    plain = plain.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
    return re.sub(r"\n\s*", "\n", plain + text[len(opening) :])


def save_png(figure: Figure, file: Path, title: str) -> None:
    """The figure as a PNG file of 150 dpi, with its title (the page has the title as text); a link is replaced."""
    figure.set_figheight(figure.get_figheight() + 0.3)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    atomic_write(file, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def legend_above(axes: Axes, columns: int) -> None:
    """A legend above the axes, where it can cover no data; none where nothing has a label.

    The page's figure takes about 60 characters a line.
    """
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def student_axis(axes: Axes, students: int, label: str = "number of students") -> None:
    """Whole numbers of students on x, every one of them as long as they fit."""
    axes.set_xlim(0.5, max(students, 1) + 0.5)
    axes.set_xlabel(label)
    ticks = range(1, students + 1)
    axes.xaxis.set_major_locator(FixedLocator(ticks) if students <= 16 else MaxNLocator(integer=True))


def accuracy_axis(axes: Axes, label: str) -> None:
    """Accuracies in % on y, with room around the data but no tick that cannot be reached."""
    axes.set_ylabel(label)
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2.0), min(high, 101.0))


def mac_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of multiply-accumulates on x, labelled 10 k, 1 M, also where it spans less than a decade."""
    axes.set_xscale("log")
    axes.set_xlabel("total multiply-accumulates (MACs) per image, log scale")
    low, high = min(values), max(values)
    axes.set_xlim(low / 1.6, high * 1.6)
    _log_ticks(axes.xaxis, high > 50 * low, engineering)


def loss_axis(axes: Axes, losses: Sequence[float], label: str = "loss") -> None:
    """Losses on y: logarithmic, with plain decimals as labels, where they are positive and span a factor of 30."""
    axes.set_ylabel(label)
    low, high = min(losses), max(losses)
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.set_ylabel(f"{label} (log scale)")
        _log_ticks(axes.yaxis, math.floor(math.log10(high)) - math.ceil(math.log10(low)) >= 2, plain)


def epoch_axis(axes: Axes) -> None:
    """Whole epochs on x, where there is one only, too."""
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xticks([round((low + high) / 2)])


def error_axis(axes: Axes, errors: Sequence[float]) -> None:
    """Test errors in % on y: logarithmic, with plain decimals as labels, where all of them are above 0."""
    axes.set_ylabel("test error (%)")
    if min(errors) > 0:
        axes.set_yscale("log")
        axes.set_ylabel("test error (%), log scale")
        _log_ticks(axes.yaxis, max(errors) > 50 * min(errors), plain)


def plain(value: float) -> str:
    """A number without an exponent: 0.05, 20, 0.00001."""
    return f"{value:.12f}".rstrip("0").rstrip(".")


def _log_ticks(axis: Axis, decades: bool, words: Callable[[float], str]) -> None:
    """Labels at the decades, or where these are too few at 1, 2, 5 in each; matplotlib's own are mathematics."""
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_formatter(NullFormatter())


# A point every half of a small label's box, from -1 to 1 of its half sizes.
BOX = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])
# Where a point's number may stand, in order of preference: the unit vectors from the point to the number.
PLACES = ((0, 1), (0, -1), (-0.75, 0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, -0.75), (1, 0), (-1, 0))


def label_points(axes: Axes, xs: Sequence[float], ys: Sequence[float], labels: Sequence[str], color: str) -> None:
    """Write a label beside each point, the last point first, clear of every line, marker and label drawn so far.

    A label that has room nowhere around its point is left out.
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        return
    figure.draw_without_rendering()  # settles the layout, which the distances depend on
    scale = 72 / figure.dpi  # from pixels to points, the unit of fonts and offsets
    lines = [line.get_transform().transform(line.get_xydata()) * scale for line in axes.get_lines()]
    ink = np.concatenate([_along(line) for line in lines])
    frame = axes.get_window_extent().get_points() * scale
    points = axes.transData.transform(np.column_stack([xs, ys])) * scale
    for x, y, point, label in reversed(list(zip(xs, ys, points, labels, strict=True))):
        half = np.array([2.4 * len(label), 3.3])  # of the label's box, at 7.5 points
        for place in PLACES:
            offset = np.array(place) * (half + 5.5)
            center = point + offset
            clear = (np.abs(ink - center) > half + 2).any(axis=1).all()  # the lines are about 2 points wide
            inside = (center - half > frame[0]).all() and (center + half < frame[1]).all()
            if clear and inside:
                text = axes.annotate(label, (x, y), tuple(offset), textcoords="offset points", fontsize=7.5)
                text.set(ha="center", va="center", color=color)
                ink = np.concatenate([ink, center + half * BOX])
                break


def _along(corners: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Points along a line through `corners`, (n, 2), at most 1 unit apart."""
    pieces = [corners]
    for start, end in pairwise(corners):
        steps = int(np.abs(end - start).max()) + 2
        pieces.append(start + np.linspace(0, 1, steps)[:, None] * (end - start))
    return np.concatenate(pieces)
