"""Draws how the models of an engine share its memory over time, as an SVG.

Above, what each worker takes, one on top of the other, under the budget; below, a row for each
model, from the start of its worker through its load to its eviction. Reads a JSON file that
`benchmarks/memory.py --data FILE` wrote; measures nothing itself. Times are in seconds:

    {"requests": 1, "budget_bytes": 1, "samples": [{"t": 0.0, "workers": {"worker": 1}}],
     "loads": [{"t": 0.0, "key": "model@variant", "worker": "worker"}],
     "evictions": [{"t": 0.0, "key": "model@variant"}]}

The same input gives the same bytes. Needs the bench extra.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
WIDTH_PX, ROW_PX = 900, 25  # a row for each model
TOP_PX, ABOVE_PX, GAP_PX, BOTTOM_PX, LEFT_PX, RIGHT_PX = 74, 250, 44, 52, 72, 152
CHARACTER_PX, LINE_PX = 7.5, 14
PX_PER_INCH = 96  # of an SVG, where an inch has 72 pt
PX = 72 / PX_PER_INCH  # in points
MOST_SAMPLES = 400
DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "memory.svg"
# Dark and pale of one hue, and an orange: told apart with any kind of colour vision, and in grey.
PAPER, INK, FAINT = "#ffffff", "#24292f", "#e4e8ec"
DARK, PALE, BUDGET = "#0b5c9e", "#b9d7ef", "#c2410c"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 12 * PX,
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


@dataclass(frozen=True)
class Life:
    """What a worker was for: its model's key, "" if it never loaded one, and its times, from the
    last sample before it to the first one after it. It was loaded from `loaded` to `evicted`, and
    then took `size_mib`."""

    key: str
    start: float
    end: float
    loaded: float
    evicted: float
    size_mib: float

    @property
    def name(self) -> str:
        return self.key.partition("@")[0] or "spare"


def draw(data: dict[str, Any], out: Path) -> None:
    """Write the plot; the suffix of `out` says in which format.

    Raises ValueError when there is nothing to draw."""
    import matplotlib.style  # heavy, and only drawing needs it
    from matplotlib.figure import Figure

    samples = sorted(data["samples"], key=lambda sample: sample["t"])
    if len(samples) < 2:
        raise ValueError(f"a plot over time needs two samples or more; there are {len(samples)}")
    lives = lives_of(samples, data["loads"], data["evictions"])
    keys = sorted({life.key for life in lives.values() if life.key})
    if not keys:
        raise ValueError("no worker of the samples loaded a model")
    rows_px = ROW_PX * len(keys)
    height_px = TOP_PX + ABOVE_PX + GAP_PX + rows_px + BOTTOM_PX
    # The user's own settings must not change the picture.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH_PX / PX_PER_INCH, height_px / PX_PER_INCH))
        above = panel(figure, TOP_PX, ABOVE_PX)
        below = panel(figure, TOP_PX + ABOVE_PX + GAP_PX, rows_px)
        for axes in (above, below):
            axes.set_xlim(0, samples[-1]["t"])
        draw_memory(above, thinned(samples), lives, data["budget_bytes"] / MIB)
        draw_lives(below, list(lives.values()), keys)
        draw_key(below)
        say_what_it_shows(figure, data, list(lives.values()))
        # No date, and nothing that changes with the version of what drew it.
        no_date = {"Date": None, "Creator": None} if out.suffix == ".svg" else {}
        figure.savefig(out, metadata=no_date, dpi=PX_PER_INCH)


def panel(figure: "Figure", top_px: float, tall_px: float) -> "Axes":
    """Axes that begin so far below the top, between margins left and right."""
    height_px = figure.bbox.height / figure.dpi * PX_PER_INCH
    axes = figure.add_axes(
        (
            LEFT_PX / WIDTH_PX,
            1 - (top_px + tall_px) / height_px,
            1 - (LEFT_PX + RIGHT_PX) / WIDTH_PX,
            tall_px / height_px,
        )
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(left=False)
    return axes


def total(sample: dict[str, Any]) -> int:
    """What all workers took, in bytes."""
    return sum(sample["workers"].values())


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
        if known is None or total(sample) > total(known):
            spans[span] = sample
    return list(spans.values())


def lives_of(
    samples: Sequence[dict[str, Any]],
    loads: Sequence[dict[str, Any]],
    evictions: Sequence[dict[str, Any]],
) -> dict[str, Life]:
    """The lives of the workers that the samples have, in the order of their starts."""
    last = len(samples) - 1
    found: dict[str, Life] = {}
    for worker in dict.fromkeys(worker for sample in samples for worker in sample["workers"]):
        alive = [i for i, sample in enumerate(samples) if worker in sample["workers"]]
        start, end = samples[max(0, alive[0] - 1)]["t"], samples[min(last, alive[-1] + 1)]["t"]
        load = next((one for one in loads if one["worker"] == worker), None)
        key, loaded = ("", end) if load is None else (load["key"], load["t"])
        ends = [one["t"] for one in evictions if one["key"] == key and one["t"] >= loaded]
        evicted = min([*ends, end])
        while_loaded = [i for i in alive if loaded <= samples[i]["t"] <= evicted]
        size = statistics.median(samples[i]["workers"][worker] for i in while_loaded or alive)
        found[worker] = Life(key, start, end, loaded, evicted, size / MIB)
    return found


def draw_memory(
    axes: "Axes", samples: Sequence[dict[str, Any]], lives: dict[str, Life], budget_mib: float
) -> None:
    """The workers, one on top of the other, dark while their models are loaded, and the budget."""
    import numpy as np

    measured = np.array([sample["t"] for sample in samples])
    changes = [t for life in lives.values() for t in (life.loaded, life.evicted)]
    times = np.union1d(measured, np.clip(changes, measured[0], measured[-1]))
    sizes = {
        worker: np.interp(
            times, measured, [sample["workers"].get(worker, 0) / MIB for sample in samples]
        )
        for worker in lives
    }
    in_all = sum(sizes.values(), np.zeros(len(times)))
    axes.set_ylim(0, 1.08 * max(budget_mib, in_all.max()))
    bottom = np.zeros(len(times))
    for worker, life in lives.items():
        top = bottom + sizes[worker]
        alive = (times >= life.start) & (times <= life.end)
        loaded = (times >= life.loaded) & (times <= life.evicted)
        for where, colour in ((alive, PALE), (loaded, DARK)):
            axes.fill_between(
                times[where], bottom[where], top[where], color=colour, linewidth=0, zorder=2
            )
        axes.plot(times[alive], top[alive], color=PAPER, linewidth=1.5 * PX, zorder=3)
        is_named = any(
            name_inside(axes, life.name, times[free], bottom[free], top[free], ink)
            for free, ink in ((loaded, PAPER), (alive & ~loaded, INK))
        )
        is_top = alive & (sizes[worker] > 0) & (in_all - top < 1)
        if not is_named and is_top.any():
            name_above(axes, life.name, times[is_top], top[is_top])
        bottom = top
    axes.axhline(budget_mib, color=BUDGET, linewidth=2.5 * PX)
    beside(axes, budget_mib, f"budget {budget_mib:,.0f} MiB", color=BUDGET, weight="bold")
    peak = in_all.max()
    axes.axhline(peak, color=INK, linewidth=1.2 * PX, linestyle=(0, (4, 4)))
    _, line = in_data(axes, 0, LINE_PX)  # so much between the two, that both can be read
    at = min(peak, budget_mib - line) if peak <= budget_mib else max(peak, budget_mib + line)
    beside(axes, at, f"peak {peak:,.0f} MiB", weight="bold")
    axes.set_ylabel("memory of all workers (MiB)")
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=FAINT, linewidth=PX)
    axes.set_axisbelow(True)
    axes.tick_params(bottom=False, labelbottom=False)


def name_inside(axes: "Axes", name: str, times: Any, bottom: Any, top: Any, colour: str) -> bool:
    """Write a name where a band has most room for it; False if it does not fit."""
    width, height = in_data(axes, CHARACTER_PX * len(name), LINE_PX)
    best, at = height, None
    for start in times[times + width <= times.max(initial=0)]:
        under = (times >= start) & (times <= start + width)
        low, high = bottom[under].max(), top[under].min()
        if high - low >= best:
            best, at = high - low, (start + width / 2, (low + high) / 2)
    if at is not None:
        axes.text(*at, name, color=colour, ha="center", va="center", zorder=5)
    return at is not None


def name_above(axes: "Axes", name: str, times: Any, top: Any) -> None:
    """Write a name over the highest place of a band that has no other above it, if the band is as
    wide as the name, and no other name is there."""
    width, height = in_data(axes, CHARACTER_PX * len(name), LINE_PX)
    if times[-1] - times[0] < width:
        return
    x, y = times[top.argmax()], top.max() + height / 4
    for other in axes.texts:
        there = other.get_position()
        if abs(there[0] - x) < width and abs(there[1] - y) < height:
            return
    axes.text(x, y, name, ha="center", va="bottom", zorder=5)


def in_data(axes: "Axes", width_px: float, height_px: float) -> tuple[float, float]:
    """A width in seconds and a height in MiB."""
    box, (left, right), (low, high) = axes.bbox, axes.get_xlim(), axes.get_ylim()
    return width_px * (right - left) / box.width, height_px * (high - low) / box.height


def beside(axes: "Axes", y: float, text: str, **how: Any) -> None:
    """Write to the right of the plot, at a height."""
    axes.text(1.012, y, text, transform=axes.get_yaxis_transform(), va="center_baseline", **how)


def draw_lives(axes: "Axes", lives: Sequence[Life], keys: Sequence[str]) -> None:
    """A row for each model: pale while its worker starts or ends, dark while it is loaded."""
    for row, key in enumerate(keys):
        mine = [life for life in lives if life.key == key]
        for life in mine:
            axes.barh(row, life.end - life.start, 0.72, left=life.start, color=PALE)
            axes.barh(row, life.evicted - life.loaded, 0.72, left=life.loaded, color=DARK)
        beside(axes, row, f"{mine[-1].size_mib:,.0f} MiB, {counted(mine, 'load')}")
    axes.set_ylim(len(keys) - 0.45, -0.55)
    axes.set_yticks(range(len(keys)), [key.partition("@")[0] for key in keys])
    axes.set_xlabel("time (s)")


def counted(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"


def draw_key(axes: "Axes") -> None:
    """What the two shades are, over the rows."""
    width, height = in_data(axes, 1, 1)
    middle = axes.get_ylim()[1] + 22 * height
    for left, colour, text in (
        (0, PALE, "a worker starts or ends"),
        (195, DARK, "its model is loaded, until it is evicted"),
    ):
        axes.barh(middle, 16 * width, 12 * height, left=left * width, color=colour, clip_on=False)
        axes.text((left + 24) * width, middle, text, va="center_baseline")


def say_what_it_shows(figure: "Figure", data: dict[str, Any], lives: Sequence[Life]) -> None:
    """The finding as a title, and how it came about under it."""
    budget, peak = data["budget_bytes"] / MIB, max(map(total, data["samples"])) / MIB
    sizes = {life.key: life.size_mib for life in lives if life.key}
    turns = (
        f"take turns within a budget of {budget:,.0f} MiB"
        if peak <= budget
        else f"exceed their budget of {budget:,.0f} MiB by {peak - budget:,.0f} MiB"
    )
    title = f"{len(sizes)} models of {sum(sizes.values()):,.0f} MiB in all {turns}"
    details = (
        f"{data['requests']} requests, {counted(data['loads'], 'load')}, "
        f"{counted(data['evictions'], 'eviction')}: "
        "an idle model leaves when the next one needs its memory"
    )
    x, top = 16 / WIDTH_PX, figure.bbox.height / figure.dpi * PX_PER_INCH
    figure.text(x, 1 - 30 / top, title, size=17 * PX, weight="bold")
    figure.text(x, 1 - 53 / top, details, size=13 * PX)


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
