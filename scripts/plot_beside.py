"""Draws how the engine follows other programs that use the cores, as an SVG.

Above, the speed of the answers over time; below, the threads that computed them. In the grey spans,
another process used a core. Reads a JSON file that `benchmarks/beside.py --data FILE` wrote, and
measures nothing itself. Times are in seconds:

    {"tokens": [0.1], "threads": [[0.1, 2]], "came": [2.0], "went": [8.0]}

The same input gives the same bytes. Needs the bench extra.
"""

import argparse
import json
import sys
from bisect import bisect_left
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "beside.svg"
WIDTH_PX, HEIGHT_PX, PX_PER_INCH = 900, 380, 96
WINDOW_S, STEP_S = 0.4, 0.1
PAPER, INK, SPAN, LINE = "#ffffff", "#24292f", "#e4e8ec", "#0b5c9e"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "orion-oie",
}


def draw(data: dict[str, Any], out: Path) -> None:
    """Write the plot; the suffix of `out` says in which format.

    Raises ValueError when there is nothing to draw."""
    import matplotlib.style  # heavy, and only drawing needs it
    from matplotlib.figure import Figure

    if len(data["tokens"]) < 2 or len(data["threads"]) < 2:
        raise ValueError("a plot over time needs two tokens and two looks at the threads, or more")
    # The user's own settings must not change the picture.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH_PX / PX_PER_INCH, HEIGHT_PX / PX_PER_INCH))
        above, below = figure.subplots(
            2, 1, sharex=True, gridspec_kw={"height_ratios": [4, 1], "hspace": 0.14}
        )
        figure.subplots_adjust(left=0.075, right=0.985, top=0.87, bottom=0.12)
        end = max(at for at, _ in data["threads"])
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(0, end)
            for came, went in zip(data["came"], data["went"], strict=True):
                axes.axvspan(came, went, color=SPAN, linewidth=0)
        draw_speed(above, sorted(data["tokens"]), end)
        draw_threads(below, data["threads"])
        figure.text(0.075, 0.93, "Answers while another process comes and goes", weight="bold")
        figure.text(0.985, 0.93, "grey: the other process uses a core", ha="right")
        # No date, and nothing that changes with the version of what drew it.
        no_date = {"Date": None, "Creator": None} if out.suffix == ".svg" else {}
        figure.savefig(out, metadata=no_date, dpi=PX_PER_INCH)


def draw_speed(axes: "Axes", tokens: list[float], end: float) -> None:
    """Tokens per second, over a moving window."""
    times = [STEP_S * index for index in range(round((end - WINDOW_S) / STEP_S) + 1)]
    speeds = [
        (bisect_left(tokens, at + WINDOW_S) - bisect_left(tokens, at)) / WINDOW_S for at in times
    ]
    middles = [round(at + WINDOW_S / 2, 3) for at in times]
    axes.plot(middles, speeds, color=LINE, linewidth=1.6)
    axes.set_ylim(0, max(speeds) * 1.1)
    axes.set_ylabel("tokens/s")


def draw_threads(axes: "Axes", looks: list[list[float]]) -> None:
    """A step for each change."""
    changes = [next(group) for _, group in groupby(looks, key=lambda look: look[1])]
    changes.append(looks[-1])
    times, threads = zip(*changes, strict=True)
    axes.step(times, threads, where="post", color=LINE, linewidth=1.6)
    most = int(max(threads))
    axes.set_ylim(0, most + 0.5)
    axes.set_yticks([1, most] if most > 1 else [1])
    axes.set_ylabel("threads")
    axes.set_xlabel("seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="what benchmarks/beside.py --data wrote")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    given = parser.parse_args()
    try:
        draw(json.loads(given.data.read_text(encoding="utf-8")), given.out)
    except (OSError, ValueError, KeyError) as error:
        print(f"{given.data}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
