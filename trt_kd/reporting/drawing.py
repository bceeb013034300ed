"""Drawings as inline SVG: no script, no file, no font of their own, ink that follows the page.

Text takes the page's colour and font, so one figure serves light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID = "#010203", "#040506"
"""Stand-ins in the drawing, replaced by the page's own colours."""
WIDTH = 4.2
"""Inches."""
FONT_POINTS = 9.5


@dataclass(frozen=True)
class Drawing:
    """One figure: what it shows in a sentence, and the SVG."""

    title: str
    text: str
    svg: str


@contextmanager
def canvas(height: float) -> "Iterator[Figure]":
    """A figure of ``height`` inches in the style of the report."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "trt_kd", "text.parse_math": False,
        "font.family": "sans-serif", "font.size": FONT_POINTS, "axes.titlesize": FONT_POINTS,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": GRID, "axes.edgecolor": GRID,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.formatter.use_mathtext": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        yield figure


def svg_of(figure: "Figure", title: str) -> str:
    """The drawing as an element to stand in a page: themed, titled, without outside names."""
    buffer = io.StringIO()
    for axes in figure.axes:
        axes.patch.set_visible(False)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    opening, _, body = buffer.getvalue().partition("<svg")[2].partition(">")
    box = re.search(r'viewBox="[\d. ]+"', opening)
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = body.replace(INK, "currentColor").replace(GRID, "var(--line)")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = _own_names(body, re.sub(r"\W+", "-", title.lower()))
    return f'<svg role="img" aria-label="{escape(title)}" {box[0]}>{body}'


def standalone(drawing: Drawing) -> str:
    """The drawing as a file of its own: dark ink on white."""
    named = drawing.svg.replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff;color:#1b1b1b" ', 1
    )
    return named.replace("var(--line)", "#d0d0d0") + "\n"


def file_name(drawing: Drawing) -> str:
    """What such a file is called."""
    return re.sub(r"\W+", "-", drawing.title.lower()) + ".svg"


def _own_names(text: str, prefix: str) -> str:
    """Drop names that nothing refers to and make the rest unique in the page."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))

    def name(found: "re.Match[str]") -> str:
        return f' id="{prefix}-{found[1]}"' if found[1] in used else ""

    text = re.sub(r'\sid="([^"]*)"', name, text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
