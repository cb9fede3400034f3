"""What every benchmark shares: its options, its rows, and how they are written.

Not a benchmark itself.
"""

import argparse
import atexit
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One figure. `bar` None means that it is for information only."""

    name: str
    value: float
    unit: str
    bar: float | None
    higher_is_better: bool
    ok: bool | None
    spread: str = ""


def row(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    bar: float | None = None,
    higher_is_better: bool = True,
) -> Row:
    """A row with the median of the values and their range."""
    value = statistics.median(values)
    ok = None if bar is None else (value >= bar if higher_is_better else value <= bar)
    spread = f"{min(values):.3g} to {max(values):.3g}, n={len(values)}"
    return Row(name, value, unit, bar, higher_is_better, ok, spread)


def options(description: str, *, data: bool = False, against: bool = False) -> argparse.Namespace:
    """`--quick` or `--smoke`, `--json FILE`, `--data FILE` for what a plot is made of, and
    `--against REVISION` for another revision of the library. What engines keep on the disk goes to
    a folder of this run.
    """
    kept = tempfile.TemporaryDirectory(prefix="orion-benchmark-")
    atexit.register(kept.cleanup)
    os.environ["ORION_CACHE_DIR"] = kept.name
    parser = argparse.ArgumentParser(description=description)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="fewer rounds, under 50 s")
    extent.add_argument(
        "--smoke",
        action="store_true",
        help="one round of the smallest size, to see that it runs; figures mean nothing",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    if data:
        parser.add_argument("--data", type=Path, metavar="FILE", help="write what a plot shows")
    if against:
        parser.add_argument("--against", metavar="REVISION", help="compare with that revision")
    return parser.parse_args()


def extent_of(given: argparse.Namespace, *, full: T, quick: T, smoke: T) -> T:
    """The one of three that the options ask for."""
    if given.smoke:
        return smoke
    return quick if given.quick else full


def show(rows: Sequence[Row]) -> None:
    """Print rows, one line each."""
    width = max(len(r.name) for r in rows)
    for r in rows:
        sign = ">=" if r.higher_is_better else "<="
        bar = "" if r.bar is None else f"  bar {sign} {r.bar:g}  {'met' if r.ok else 'MISSED'}"
        print(f"{r.name:<{width}}  {r.value:9.3f} {r.unit:<10} ({r.spread}){bar}", flush=True)


def finish(rows: Sequence[Row], to: Path | None) -> int:
    """Write the rows, if asked; the exit status is 1 if a bar is missed."""
    if to is not None:
        content = {"machine": platform.platform(), "rows": [asdict(r) for r in rows]}
        to.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if all(r.ok is not False for r in rows) else 1


def report(rows: Sequence[Row], to: Path | None) -> int:
    """Print the rows, write them if asked; the exit status is 1 if a bar is missed."""
    show(rows)
    return finish(rows, to)
