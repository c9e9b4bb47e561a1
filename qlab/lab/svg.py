"""The canvas of the report's plots: inline SVG that follows the page's light or dark colours.

Matplotlib draws with placeholder colours, which become CSS variables of the page (--fg, --muted,
--grid, --s0 ... --s7), so one drawing serves both themes. Text stays text, and the same data gives
the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, cast

FG, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0b0c0{i}" for i in range(8))


def ticks(axis: Any, count: int = 5, *, whole: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    if whole:
        axis.set_major_formatter(
            FuncFormatter(
                lambda x, _: (
                    f"{x / 1e6:g}M"
                    if abs(x) >= 1e6
                    else f"{x / 1e3:g}k"
                    if abs(x) >= 1e4
                    else f"{x:g}"
                )
            )
        )


def log_ticks(axis: Any) -> None:
    """Plain numbers near 1, powers of ten further out; between decades too where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    few = low > 0 and high / low < 300
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda x, _: _decade(x)))
    axis.set_minor_formatter(NullFormatter())


def _decade(x: float) -> str:
    """
    >>> [_decade(x) for x in (0.01, 1, 1000, 1e-5, 1e6)]
    ['0.01', '1', '1000', '10⁻⁵', '10⁶']
    """
    if 1e-3 <= x < 1e5 or x <= 0:
        return f"{x:g}"
    exponent = math.floor(math.log10(x) + 1e-9)
    lead = round(x / 10**exponent)
    return (
        ("" if lead == 1 else f"{lead}·")
        + "10"
        + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def figure(draw_all: Callable[[Any], None], title: str, width: int, height: int) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    quiet = {
        "svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "axes.unicode_minus": True,
        "font.size": 10.5, "font.family": "DejaVu Sans", "text.color": FG, "axes.labelcolor": MUTED,
        "axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 3, "ytick.major.size": 0,
        "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True,
        "lines.solid_capstyle": "round", "path.simplify": True,
    }  # fmt: skip
    with mpl.rc_context({"backend": "svg"}):
        mpl.rcdefaults()
        mpl.rcParams.update(cast(Any, quiet))
        fig = Canvas(figsize=(width / 72, height / 72), layout="constrained")
        fig.patch.set_visible(False)
        FigureCanvasSVG(fig)
        draw_all(fig)
        out = io.StringIO()
        fig.savefig(
            out,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            transparent=True,
        )
    return _themed(out.getvalue())


def _themed(svg: str) -> str:
    """An inline <svg> without identifiers of its own, coloured by the page."""
    svg = re.sub(
        r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>",
        "",
        svg,
        flags=re.S,
    )
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'id="arm-(\d+)-(\d+)"', r'class="arm-\1-\2"', svg)
    svg = re.sub(r"font-family: [^;\"]*(;|(?=\"))", "", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    names = {FG: "var(--fg)", MUTED: "var(--muted)", GRID: "var(--grid)"}
    names |= {c: f"var(--s{i})" for i, c in enumerate(SERIES)}
    for colour, name in names.items():
        svg = svg.replace(colour, name)
    return re.sub(r">\s+<", "><", svg).strip()


def own_ids(svg: str, prefix: str) -> str:
    """Makes an SVG's identifiers its own among several on one page; unused ones go."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))

    def rename(m: re.Match[str]) -> str:
        return f' id="{prefix}{m[1]}"' if m[1] in used else ""

    svg = re.sub(r' id="([^"]*)"', rename, svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
