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
AGENTS = ["conversation", "code", "reasoning", "data", "creative", "multilingual", "vision"]


def draw_confusion(axes: "Axes", counts: Sequence[Sequence[Any]], title: str) -> None:
    """Rows add up to 100 %: what became of the prompts that an agent should have had."""
    table = {(should, did): count for should, did, count in counts}
    totals = {a: sum(c for (s, _), c in table.items() if s == a) for a in AGENTS}
    shares = [
        [100 * table.get((should, did), 0) / max(1, totals[should]) for did in AGENTS]
        for should in AGENTS
    ]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=130)
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            if share >= 0.5:
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color=INK)
    axes.set_xticks(range(len(AGENTS)), AGENTS, rotation=40, ha="right")
    axes.set_yticks(range(len(AGENTS)), [f"{a} ({totals[a]})" for a in AGENTS])
    axes.set_xlabel("went to, % of the row")
    axes.set_ylabel("should have gone to (prompts)")
    axes.set_title(title, color=INK)


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
        confused = Figure(figsize=(980 / PX_PER_INCH, 470 / PX_PER_INCH), layout="constrained")
        for axes, name, install in zip(
            confused.subplots(1, 2), NAMES, ("Core install", "With embeddings"), strict=True
        ):
            title = f"{install}, real prompts, by source"
            draw_confusion(axes, kept[name]["confusion"], title)
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
