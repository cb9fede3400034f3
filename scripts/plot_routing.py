"""Draws how the router does: which agent prompts went to, how true its confidence is, and how it
learned, as two SVGs.

Reads a JSON file that `benchmarks/routing.py --data FILE` wrote; measures nothing itself:

    {"real, core": {"confusion": [["should", "did", 1]], "bins": [[0.95, 0.97, 100]]},
     "real, embeddings": {...},
     "curve": [{"prompts": 100, "name": "core", "lenient": 0.8}]}

The same input gives the same bytes. Needs the bench extra.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import FancyBboxPatch

DOCS = Path(__file__).parents[1] / "docs"
PX_PER_INCH = 96
INK, FAINT, BLUE, ORANGE = "#24292f", "#d0d7de", "#3b8bc4", "#e17f45"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "orion-oie",
}
NAMES = ["real, core", "real, embeddings"]
AGENTS = ["conversation", "code", "reasoning", "data", "creative", "multilingual"]
# Readable on white as well as on black.
MUTED, RIGHT, WRONG = "#768390", "#2f7fb8", "#f0883e"
LEAST_SHOWN = 0.01


def draw_confusion(axes: "Axes", counts: Sequence[Sequence[Any]], install: str) -> None:
    """A row for each agent that prompts should have gone to: the share that did, and where the rest
    went. Prompts with an image are left out, since none of them goes astray."""
    table = {(should, did): count for should, did, count in counts}
    totals = {a: sum(c for (s, _), c in table.items() if s == a) for a in AGENTS}
    right = sum(table.get((agent, agent), 0) for agent in AGENTS) / max(1, sum(totals.values()))
    for y, should in enumerate(AGENTS):
        for x, did in enumerate(AGENTS):
            share = table.get((should, did), 0) / max(1, totals[should])
            is_right = should == did
            colour, alpha = (RIGHT, 1.0) if is_right else (WRONG, min(1.0, 0.25 + 5 * share))
            if share < LEAST_SHOWN:
                colour, alpha = MUTED, 0.12
            axes.add_patch(_cell(x, y, colour, alpha))
            if share >= LEAST_SHOWN:
                axes.text(
                    x,
                    y,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=15 if is_right else 13,
                    fontweight="bold" if is_right else "normal",
                    color="white" if is_right else INK,
                )
    axes.set(xlim=(-0.5, len(AGENTS) - 0.5), ylim=(len(AGENTS) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(AGENTS)), AGENTS, rotation=35, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(AGENTS)), [f"{a} ({totals[a]})" for a in AGENTS])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=12, labelcolor=MUTED)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        f"{install}: {100 * right:.0f} % right",
        fontsize=14,
        fontweight="bold",
        color=MUTED,
        labelpad=10,
    )


def _cell(x: int, y: int, colour: str, alpha: float) -> "FancyBboxPatch":
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x - 0.44, y - 0.44),
        0.88,
        0.88,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=colour,
        alpha=alpha,
        linewidth=0,
    )


def draw_calibration(axes: "Axes", kept: dict[str, Any]) -> None:
    """The share of right routes over the confidence that was claimed; the diagonal is ideal."""
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    for name, colour in zip(NAMES, (ORANGE, BLUE), strict=True):
        bins = kept[name]["bins"]
        total = sum(size for _, _, size in bins)
        axes.plot([b[0] for b in bins], [b[1] for b in bins], color=colour, linewidth=1)
        axes.scatter(
            [b[0] for b in bins],
            [b[1] for b in bins],
            s=[12 + 500 * b[2] / total for b in bins],
            color=colour,
            alpha=0.7,
            label=name,
            linewidths=0,
        )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="share of right routes")
    axes.set_title("Calibration (area: share of the prompts)", color=INK)
    legend = axes.legend(loc="upper left", frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([40.0])  # type: ignore[union-attr]


def draw_curve(axes: "Axes", points: Sequence[dict[str, Any]]) -> None:
    """How accuracy grows with the prompts that were trained on."""
    for name, colour in zip(dict.fromkeys(p["name"] for p in points), (ORANGE, BLUE), strict=False):
        some = [p for p in points if p["name"] == name]
        axes.plot(
            [p["prompts"] for p in some],
            [p["lenient"] for p in some],
            color=colour,
            marker="o",
            markersize=4,
            label=name,
        )
    axes.set(xlabel="prompts trained on", ylabel="right (lenient)")
    axes.grid(color=FAINT, linewidth=0.5)
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("Learning curve", color=INK)


def draw(kept: dict[str, Any], out: Path) -> list[Path]:
    """Write both pictures to a folder; returns their paths.

    Raises KeyError, and writes nothing, when something is missing."""
    import matplotlib.style  # heavy, and only drawing needs it
    from matplotlib.figure import Figure

    # The user's own settings must not change the picture.
    with matplotlib.style.context(["default", STYLE]):
        confused = Figure(figsize=(1000 / PX_PER_INCH, 460 / PX_PER_INCH), layout="constrained")
        for axes, name, install in zip(
            confused.subplots(1, 2), NAMES, ("Core install", "With embeddings"), strict=True
        ):
            draw_confusion(axes, kept[name]["confusion"], install)
        confused.suptitle(
            "Where real prompts went (columns) that should have gone to an agent (rows), "
            "in % of the row",
            fontsize=12,
            color=MUTED,
        )
        confused.patch.set_alpha(0)
        confident = Figure(figsize=(980 / PX_PER_INCH, 380 / PX_PER_INCH), layout="constrained")
        left, right = confident.subplots(1, 2)
        draw_calibration(left, kept)
        draw_curve(right, kept["curve"])
        figures = {
            out / "routing-confusion.svg": confused,
            out / "routing-confidence.svg": confident,
        }
        for path, figure in figures.items():
            # No date, and nothing that changes with the version of what drew it.
            figure.savefig(path, metadata={"Date": None, "Creator": None})
    return list(figures)


def main() -> str | None:
    """Draw; returns what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="what benchmarks/routing.py --data wrote")
    parser.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER")
    options = parser.parse_args()
    try:
        paths = draw(json.loads(options.data.read_text(encoding="utf-8")), options.out)
    except ModuleNotFoundError as error:
        return f"{error}; the plot needs the bench extra: pip install 'orion-oie[bench]'"
    except KeyError as error:
        return f"{options.data}: {error} is missing: it takes a full run, with the real prompts"
    except ValueError as error:
        return f"{options.data}: {error}"
    for path in paths:
        print(path)
    return None


if __name__ == "__main__":
    sys.exit(main())
