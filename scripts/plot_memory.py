"""Draws what the models of an engine took of memory over time, as an SVG.

Reads a JSON file with what was measured; measures nothing itself. Times are in seconds:

    {"budget_bytes": 1, "samples": [{"t": 0.0, "workers_bytes": 1, "private_bytes": 1,
     "models": {"key": 1}}], "loads": [{"t": 0.0, "key": "key"}], "evictions": [...]}

The same input gives the same bytes. Needs the bench extra.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
WIDTH_PX, HEIGHT_PX = 900, 420
MOST_SAMPLES = 150
PX_PER_INCH = 96  # of an SVG, where an inch has 72 pt
DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "memory.svg"
# Told apart by people with any kind of colour vision (Okabe and Ito), a little paler.
COLOURS = ["#3b8bc4", "#ebb33d", "#3fb391", "#d89abb", "#86c9ee", "#e17f45", "#f2e86b"]
HATCHES = ["", "///", "...", "xxx"]  # one for each time that the colours start again
INK, FAINT, ALARM = "#24292f", "#d0d7de", "#b3261e"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "orion-oie",
}


def draw(data: dict[str, Any], out: Path) -> None:
    """Write the plot; the suffix of `out` says in which format.

    Raises ValueError when there is nothing to draw."""
    import matplotlib.style  # heavy, and only drawing needs it
    from matplotlib.figure import Figure

    samples = thinned(sorted(data["samples"], key=lambda sample: sample["t"]))
    if len(samples) < 2:
        raise ValueError(f"a plot over time needs two samples or more; there are {len(samples)}")
    events = [*data["loads"], *data["evictions"]]
    in_order = [key for sample in samples for key in sample["models"]]
    keys = list(dict.fromkeys(in_order + [event["key"] for event in events]))
    looks = {
        key: {
            "facecolor": COLOURS[i % len(COLOURS)],
            "hatch": HATCHES[i // len(COLOURS) % len(HATCHES)],
        }
        for i, key in enumerate(keys)
    }
    # The user's own settings must not change the picture.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH_PX / PX_PER_INCH, HEIGHT_PX / PX_PER_INCH))
        above, below = figure.subplots(
            2, 1, sharex=True, height_ratios=[10, 1.1], gridspec_kw={"hspace": 0.06}
        )
        draw_memory(above, samples, looks, data["budget_bytes"])
        draw_events(below, data["loads"], data["evictions"], looks)
        times = [entry["t"] for entry in [*samples, *events]]
        below.set_xlim(min(times), max(times))
        finish(figure, above)
        # No date, and nothing that changes with the version of what drew it.
        no_date = {"Date": None, "Creator": None} if out.suffix == ".svg" else {}
        figure.savefig(out, metadata=no_date, dpi=PX_PER_INCH)


def thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """No more samples than can be told apart: of each equal span of time the one with the most
    memory, so that no peak is lost."""
    if len(samples) <= MOST_SAMPLES:
        return samples
    start, end = samples[0]["t"], samples[-1]["t"]
    spans: dict[int, dict[str, Any]] = {}
    for sample in samples:
        span = int((sample["t"] - start) / (end - start) * MOST_SAMPLES)
        known = spans.get(span)
        if known is None or sample["workers_bytes"] > known["workers_bytes"]:
            spans[span] = sample
    return list(spans.values())


def draw_memory(
    axes: "Axes", samples: list[dict[str, Any]], looks: dict[str, Any], budget_bytes: int
) -> None:
    """The models, one on top of the other, what the workers take in all, and the budget."""
    times = [sample["t"] for sample in samples]
    bottom = [0.0] * len(samples)
    for key, look in looks.items():
        sizes = [sample["models"].get(key, 0) / MIB for sample in samples]
        top = [b + size for b, size in zip(bottom, sizes, strict=True)]
        # Where it is, and the samples beside: else there would be a line where nothing is.
        is_there = [any(sizes[max(0, i - 1) : i + 2]) for i in range(len(sizes))]
        axes.fill_between(
            times, bottom, top, where=is_there, label=key, linewidth=0.6, edgecolor="white", **look
        )
        bottom = top
    workers = [sample["workers_bytes"] / MIB for sample in samples]
    private = [sample["private_bytes"] / MIB for sample in samples]
    axes.plot(times, workers, color=INK, linewidth=1.2, label="all workers")
    axes.plot(times, private, color=INK, linewidth=1.0, linestyle=":", label="all workers, private")
    budget = budget_bytes / MIB
    axes.axhline(budget, color=ALARM, linewidth=1.4, linestyle=(0, (6, 3)))
    axes.annotate(
        f"budget {budget:,.0f} MiB",
        (0.0, budget),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 4),
        textcoords="offset points",
        color=ALARM,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
    )
    axes.set_ylim(0, 1.12 * max(budget, *bottom, *workers))
    axes.set_ylabel("memory (MiB)")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(bottom=False)


def draw_events(
    axes: "Axes", loads: list[dict[str, Any]], evictions: list[dict[str, Any]], looks: Any
) -> None:
    """A row of ticks for the loads, and one for the evictions, in the colours of the models.

    With more models than colours a tick may be of either model of its colour."""
    for height, events in ((1, loads), (0, evictions)):
        axes.vlines(
            [event["t"] for event in events],
            height - 0.36,
            height + 0.36,
            colors=[looks[event["key"]]["facecolor"] for event in events],
            linewidth=2.0,
        )
    axes.set_ylim(-0.6, 1.6)
    axes.set_yticks([1, 0], ["loads", "evictions"])
    axes.set_xlabel("time (s)")
    axes.tick_params(left=False)


def finish(figure: "Figure", axes: "Axes") -> None:
    """Margins, and the legend beside the plot: the models as they are stacked, then the lines."""
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    lines = [(h, name) for h, name in zip(handles, labels, strict=True) if h in axes.lines]
    areas = [(h, name) for h, name in zip(handles, labels, strict=True) if h not in axes.lines]
    shown = [*reversed(areas), *lines]
    legend = figure.legend(
        [handle for handle, _ in shown],
        [name for _, name in shown],
        loc="upper right",
        bbox_to_anchor=(1.0, 0.985),
        frameon=False,
    )
    left_of_legend = legend.get_window_extent().x0 / figure.bbox.width
    figure.subplots_adjust(left=0.085, right=left_of_legend - 0.005, top=0.965, bottom=0.12)


def main() -> str | None:
    """Draw; returns what went wrong."""
    parser = argparse.ArgumentParser(description="Draw the memory of an engine's models over time")
    parser.add_argument("data", type=Path, help="the JSON file with what was measured")
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT, help="%(default)s")
    arguments = parser.parse_args()
    try:
        draw(json.loads(arguments.data.read_text(encoding="utf-8")), arguments.out)
    except ModuleNotFoundError as error:
        return f"{error}; the plot needs the bench extra: pip install 'orion-oie[bench]'"
    except KeyError as error:
        return f"{arguments.data}: {error} is missing"
    except ValueError as error:
        return f"{arguments.data}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
