"""Display of the loads of an engine, for people: a bar in a terminal, plain lines elsewhere.

    with LoadDisplay() as display, OrionInferenceEngine() as engine:
        engine.subscribe(display.show)

Shows downloads, and loads that take a noticeable time. The bar needs the `rich` extra. Draws on a
thread of its own, so an engine never waits for a terminal. Does not show why a load failed: the
caller that waits for it gets the error.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from orion_oie.callbacks import host_log
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.units import size_text
from orion_oie.telemetry.events import Event, ModelFetched, ModelLoadFailed, ModelLoading
from orion_oie.threads import Event as Wake

if TYPE_CHECKING:  # an extra, and slow to import
    from rich.console import Console, Group
    from rich.live import Live

_TICK_S = 0.1
_BETWEEN_LINES_S = 0.5
_LONGEST_CLOSE_S = 2.0
_SHORTEST_MEASURED_S = 0.5  # a shorter load has too few steps for a measurement of its speed
_PHASES = {"initializing": "starting", "loading_shard": "loading"}


@dataclass(frozen=True, slots=True)
class _Load:
    """The state of a load. `had_bytes` were on this machine at its start; times are in seconds."""

    key: str
    started_at: float
    progress: LoadProgress
    had_bytes: int = 0
    is_fetched: bool = False
    outcome: str = ""
    ended_at: float = 0.0


class LoadDisplay:
    """Shows the loads of engines on `stream`, by default standard error. A context manager.

    `show` is a subscriber for `engine.subscribe`, for any number of engines and threads; it never
    raises and never waits. A load from the disk is shown once it takes `quiet_s` seconds. Call
    `close` before something else writes to the same terminal; nothing is shown after it.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet_s: float = 1.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet_s = quiet_s
        self._loads: dict[str, _Load] = {}
        self._lock = threading.Lock()
        self._wake = Wake()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def __enter__(self) -> "LoadDisplay":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, event: Event) -> None:
        """Note an event; those that are not about loads are passed over."""
        if not isinstance(event, ModelLoading | ModelFetched | ModelLoadFailed):
            return
        now = time.monotonic()
        with self._lock, contextlib.suppress(RuntimeError):  # no more threads: nothing is shown
            load = self._loads.get(event.key)
            if self._is_closed:
                return
            if isinstance(event, ModelLoading):
                load = _moved(load, event, now)
            elif load is None:
                return
            else:
                outcome = "fetched" if isinstance(event, ModelFetched) else "failed"
                load = replace(load, outcome=outcome, ended_at=now)
            self._loads[load.key] = load
            if load.outcome:
                self._wake.set()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="orion-display", daemon=True)
                thread.start()
                self._thread = thread

    def close(self) -> None:
        """Leave the last state on the screen and stop. Idempotent."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join(_LONGEST_CLOSE_S)  # bounded, because a suspended terminal blocks the thread

    def _run(self) -> None:
        try:
            self._draw()
        except Exception as error:  # noqa: BLE001 (a fault of the display must not affect the load)
            host_log.log(logging.DEBUG, "the display of loads ended", error=error)
            with self._lock:
                self._is_closed = True

    def _draw(self) -> None:
        canvas: _Canvas | None = None
        visible: set[str] = set()
        is_over = False
        while not is_over:
            self._wake.wait(_TICK_S)
            self._wake.clear()
            now = time.monotonic()
            with self._lock:
                loads = list(self._loads.values())
                self._loads = {load.key: load for load in loads if not load.outcome}
                is_closing = self._is_closed
            visible |= {
                load.key
                for load in loads
                if load.is_fetched or (load.ended_at or now) - load.started_at >= self._quiet_s
            }
            shown = [load for load in loads if load.key in visible]
            if shown:
                canvas = canvas or _canvas(self._stream)
                ended = [_summary(load) for load in shown if load.outcome]
                canvas.draw([load for load in shown if not load.outcome], ended, is_closing)
            visible -= {load.key for load in loads if load.outcome}
            with self._lock:
                is_over = is_closing or not self._loads
                if is_over:
                    self._thread = None


def _moved(load: _Load | None, event: ModelLoading, now: float) -> _Load:
    """A load after one more step of it; a new one if it is its first."""
    progress = event.progress
    if load is None or load.outcome:
        load = _Load(event.key, now, progress, progress.bytes_loaded)
    elif load.progress.bytes_total == 0:
        load = replace(load, had_bytes=progress.bytes_loaded)
    is_fetched = progress.phase == "downloading" or progress.mode == "progressive"
    is_over = progress.phase == "complete"
    return replace(
        load,
        progress=progress,
        is_fetched=load.is_fetched or is_fetched,
        outcome="complete" if is_over else "",
        ended_at=now if is_over else 0.0,
    )


# -- texts


def time_text(seconds: float) -> str:
    """A duration such as "9.5 s", "42 s", "2 min" or "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _stage(progress: LoadProgress) -> str:
    """The current phase, in words."""
    parts = [_PHASES.get(progress.phase, progress.phase)]
    if progress.mode == "progressive":
        parts.append("progressive")
    if progress.shards > 1:
        parts.append(f"{progress.shards_loaded} of {progress.shards} shards")
    return ", ".join(parts) + (f" ({progress.note})" if progress.note else "")


def _amount(progress: LoadProgress) -> str:
    """The part that is done, the speed and the time left, in words."""
    if not progress.bytes_total:
        return ""
    parts = [f"{progress.fraction * 100:.0f} % of {size_text(progress.bytes_total)}"]
    if progress.bytes_loaded < progress.bytes_total:
        if progress.bytes_per_s:
            parts.append(f"{size_text(progress.bytes_per_s)}/s")
        if progress.seconds_left is not None:
            parts.append(f"{time_text(progress.seconds_left)} left")
    return ", ".join(parts)


def _line(load: _Load) -> str:
    amount = _amount(load.progress)
    return f"{load.key}: {_stage(load.progress)}" + (f", {amount}" if amount else "")


def _summary(load: _Load) -> str:
    seconds = load.ended_at - load.started_at
    if load.outcome == "failed":
        return f"{load.key}: failed after {time_text(seconds)}"
    total = load.progress.bytes_total
    amount = size_text(total)
    if not load.is_fetched:
        return f"{load.key}: loaded{f' {amount}' if total else ''} in {time_text(seconds)}"
    came = total - load.had_bytes
    is_rest = total / 10 < load.had_bytes < total  # a little arrives before the first step
    part = f"{size_text(came)} of {amount}" if is_rest else amount
    speed = f" ({size_text(came / seconds)}/s)" if seconds >= _SHORTEST_MEASURED_S else ""
    how = ", progressive" if load.progress.mode == "progressive" else ""
    return f"{load.key}: fetched {part} in {time_text(seconds)}{speed}{how}"


# -- output


class _Canvas(Protocol):
    def draw(self, loads: Sequence[_Load], ended: Sequence[str], is_last: bool) -> None:
        """Show the loads in progress, and print one line for each that ended. What the last call
        shows stays on the screen."""
        ...


def _canvas(stream: TextIO) -> _Canvas:
    """Bars if the stream is a terminal and rich is installed, else lines."""
    if stream.isatty():
        try:
            from rich.console import Console
        except ImportError:
            return _Lines(stream)
        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal:
            return _Bars(console)
    return _Lines(stream)


class _Lines:
    """Prints a line when the phase changes or a shard or a tenth arrives, at most two a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._written: dict[str, object] = {}
        self._written_at = float("-inf")

    def draw(self, loads: Sequence[_Load], ended: Sequence[str], is_last: bool) -> None:
        now = time.monotonic()
        for load in loads:
            progress = load.progress
            tenth = int(progress.fraction * 10) if progress.phase == "downloading" else None
            step = (progress.phase, progress.mode, progress.shards_loaded, tenth)
            is_due = is_last or now - self._written_at >= _BETWEEN_LINES_S
            if is_due and self._written.get(load.key) != step:
                self._written[load.key] = step
                self._written_at = now
                self._write(_line(load))
        for text in ended:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class _Bars:
    """Draws two lines for each load at the bottom of a terminal: its phase, and a bar."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._live: Live | None = None

    def draw(self, loads: Sequence[_Load], ended: Sequence[str], is_last: bool) -> None:
        from rich.live import Live

        if self._live is None and loads and not is_last:
            # The output of other code must not be redirected.
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        if self._live is not None:
            self._live.update(_bars(loads), refresh=True)
            if is_last or not loads:
                self._live.stop()
                self._live = None
        for text in [*ended, *(_line(load) for load in loads if is_last)]:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _bars(loads: Sequence[_Load]) -> "Group":
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows: list[Text | Table] = []
    for load in loads:
        progress = load.progress
        head = Text.assemble((load.key, "bold"), "  ", _stage(progress))
        head.no_wrap, head.overflow = True, "ellipsis"
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        is_known = progress.bytes_total > 0
        bar.add_row(
            ProgressBar(1.0, progress.fraction, pulse=not is_known, complete_style="cyan"),
            Text(_amount(progress), style="cyan"),
        )
        rows += [head, bar]
    return Group(*rows)
