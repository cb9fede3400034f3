"""The display of loads: lines and bars that people can read, and that disturb nobody."""

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
from helpers import run_all, wait_until

from orion_oie import OrionInferenceEngine
from orion_oie.schemas.loading import LoadPhase, LoadProgress
from orion_oie.schemas.units import size_text
from orion_oie.telemetry import progress
from orion_oie.telemetry.events import (
    ModelFetched,
    ModelLoadFailed,
    ModelLoading,
    RequestReceived,
)
from orion_oie.telemetry.progress import LoadDisplay

KEY = "main@q4"
MB = 10**6


def set_pause(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Change the pause between two lines, which is made for people."""
    monkeypatch.setattr(progress, "_BETWEEN_LINES_S", seconds)


def set_longest_close(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Shorten the wait for a terminal that takes nothing, which is made for people."""
    monkeypatch.setattr(progress, "_LONGEST_CLOSE_S", seconds)


@pytest.fixture(autouse=True)
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws often, and keeps no pause between lines."""
    monkeypatch.setattr(progress, "_TICK_S", 0.002)
    set_pause(monkeypatch, 0.0)


def step(phase: LoadPhase, key: str = KEY, **fields: Any) -> ModelLoading:
    """An event of a load, as an engine publishes it."""
    return ModelLoading(key=key, progress=LoadProgress(phase, **fields))


def arrived(key: str = KEY) -> ModelFetched:
    """The end of a download of 100 MB."""
    return ModelFetched(key=key, bytes=100 * MB)


def fetched(
    megabytes: int, key: str = KEY, phase: LoadPhase = "downloading", **fields: Any
) -> ModelLoading:
    """A step at which that much of 100 MB is here, 50 MB a second."""
    left = 100 - megabytes
    return step(
        phase,
        key,
        fraction=megabytes / 100,
        bytes_total=100 * MB,
        bytes_loaded=megabytes * MB,
        bytes_per_s=50e6,
        seconds_left=left / 50,
        **fields,
    )


def display_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "orion-display"]


class Lines(io.StringIO):
    """A stream that is no terminal."""

    @property
    def lines(self) -> list[str]:
        return self.getvalue().splitlines()

    def expect(self, *parts: str) -> None:
        """Wait for a line that has all the parts."""
        wait_until(lambda: any(all(part in line for part in parts) for line in self.lines))


class Terminal:
    """A pseudo-terminal: `stream` writes to it, `text` is what came out."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._master, 65536)
            except OSError:  # the other end was closed
                return
            self.text += piece.decode("utf-8", "replace")

    def close(self) -> None:
        self.stream.close()
        self._reader.join(5)
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    opened = Terminal()
    yield opened
    opened.close()


# -- lines


def test_a_load_that_is_over_at_once_is_not_shown() -> None:
    """A model that comes from the disk in no time leaves nothing, not even a thread."""
    stream = Lines()
    display = LoadDisplay(stream, quiet_s=30)
    for phase in ("initializing", "loading_shard", "ready", "complete"):
        display.show(step(phase, bytes_total=100 * MB, bytes_loaded=100 * MB))
    wait_until(lambda: not display_threads())
    assert stream.lines == []


def test_a_load_that_takes_time_is_shown() -> None:
    """A load from the disk is told once it takes noticeable time, and when it has ended."""
    stream = Lines()
    with LoadDisplay(stream, quiet_s=0.02) as display:
        display.show(step("initializing"))
        stream.expect("main@q4: starting")
        here = {"bytes_total": 100 * MB, "bytes_loaded": 100 * MB}
        display.show(step("loading_shard", fraction=0.4, **here))
        stream.expect("main@q4: loading, 40 % of 100.0 MB")
        display.show(step("complete", fraction=1.0, **here))
        stream.expect("main@q4: loaded 100.0 MB in 0.")
    assert len(stream.lines) == 3


def test_a_download_is_always_shown() -> None:
    """A download is shown however quick it is: size, speed, time left, and the end."""
    stream = Lines()
    with LoadDisplay(stream, quiet_s=30) as display:
        display.show(fetched(0))
        stream.expect("main@q4: downloading, 0 % of 100.0 MB, 50.0 MB/s, 2.0 s left")
        display.show(fetched(35))
        stream.expect("35 % of 100.0 MB, 50.0 MB/s, 1.3 s left")
        display.show(arrived())
    assert re.fullmatch(r"main@q4: fetched 100.0 MB in \d\.\d s", stream.lines[-1])


def test_each_phase_and_each_shard_has_a_line() -> None:
    """Of a load that is computed while it arrives, each phase and each shard is told once."""
    stream = Lines()
    with LoadDisplay(stream) as display:
        for shards in (0, 0, 1, 1, 2):
            loading = {"shards": 2, "shards_loaded": shards, "mode": "progressive"}
            display.show(fetched(10 + shards, phase="loading_shard", **loading))
            stream.expect(f"loading, progressive, {shards} of 2 shards, {10 + shards} %")
        display.show(fetched(100, phase="ready", **loading))
        stream.expect("ready, progressive, 2 of 2 shards, 100 % of 100.0 MB")
        display.show(fetched(100, phase="complete", **loading))
    assert len(stream.lines) == 5
    assert re.search(r"fetched 100.0 MB in .*, progressive$", stream.lines[-1])


def test_lines_do_not_come_faster_than_they_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes before the next line is due are left out; the end is not."""
    set_pause(monkeypatch, 60.0)
    stream = Lines()
    with LoadDisplay(stream) as display:
        display.show(fetched(0))
        stream.expect("downloading, 0 %")
        for megabytes in range(1, 100):
            display.show(fetched(megabytes))
        display.show(arrived())
    assert len(stream.lines) == 2
    assert "fetched 100.0 MB" in stream.lines[-1]


def test_the_speed_of_a_download_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of a download that took a while has its mean speed."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = Lines()
    display = LoadDisplay(stream)
    display.show(fetched(0))
    now[0] += 2.5
    display.show(arrived())
    display.close()
    assert stream.lines[-1] == "main@q4: fetched 100.0 MB in 2.5 s (40.0 MB/s)"


def test_what_was_here_before_is_not_counted_as_fetched() -> None:
    """After a download that was resumed, the last line says how much came this time."""
    stream = Lines()
    with LoadDisplay(stream) as display:
        display.show(fetched(70))
        display.show(fetched(100))
        display.show(arrived())
    assert "fetched 30.0 MB of 100.0 MB" in stream.lines[-1]


def test_the_reason_for_an_unexpected_mode_is_shown() -> None:
    """The note of a load stands behind its phase."""
    stream = Lines()
    with LoadDisplay(stream) as display:
        display.show(fetched(10, note="another process fetches it"))
        stream.expect("downloading (another process fetches it), 10 %")


def test_a_failed_load_ends() -> None:
    """A failure is the last line of a load; whoever waits for it is told why."""
    stream = Lines()
    with LoadDisplay(stream) as display:
        display.show(fetched(10))
        stream.expect("10 %")
        display.show(ModelLoadFailed(key=KEY, error="OrionError: no"))
        stream.expect("main@q4: failed after 0.0 s")
        wait_until(lambda: not display_threads())


def test_a_second_load_of_a_model_begins_anew() -> None:
    """A model that was evicted and is loaded again is told again."""
    stream = Lines()
    with LoadDisplay(stream, quiet_s=0.0) as display:
        for count in (1, 2):
            display.show(step("initializing"))
            wait_until(
                lambda count=count: sum("starting" in line for line in stream.lines) == count
            )
            display.show(step("complete"))
            wait_until(
                lambda count=count: sum("loaded in" in line for line in stream.lines) == count
            )


def test_closing_tells_the_last_state_and_ends_it_all() -> None:
    """`close` leaves what was last known, and afterwards there is neither a line nor a thread."""
    stream = Lines()
    display = LoadDisplay(stream)
    display.show(fetched(10))
    stream.expect("10 %")
    display.show(fetched(90))
    display.close()
    assert "90 %" in stream.lines[-1]
    display.show(fetched(95))
    display.close()
    assert "90 %" in stream.lines[-1]
    assert display_threads() == []


def test_other_events_are_passed_over() -> None:
    """Events that are not about loads, or end loads that nobody saw, start nothing."""
    display = LoadDisplay(Lines())
    display.show(RequestReceived(query="?"))
    display.show(arrived())
    display.show(ModelLoadFailed(key=KEY, error="OrionError: no"))
    assert display_threads() == []


# -- nobody is disturbed


def test_events_may_come_on_many_threads() -> None:
    """Loads that report at the same time are each told to their end, in whole lines."""
    stream = Lines()
    with LoadDisplay(stream) as display:

        def load(key: str) -> Callable[[], None]:
            def report() -> None:
                for megabytes in range(0, 101, 5):
                    display.show(fetched(megabytes, key))
                display.show(arrived(key))

            return report

        keys = [f"model{number}@q4" for number in range(8)]
        for run in run_all([load(key) for key in keys]):
            run.join()
    ends = [line for line in stream.lines if ": fetched 100.0 MB in " in line]
    assert sorted(line.partition(":")[0] for line in ends) == keys
    assert all(line.startswith("model") for line in stream.lines)


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads this")


@pytest.mark.parametrize("stream", [Broken(), io.StringIO()], ids=["broken", "closed"])
def test_a_stream_that_cannot_be_written_to_ends_the_display(stream: io.StringIO) -> None:
    """An engine does not notice that nobody can see its loads."""
    if not isinstance(stream, Broken):
        stream.close()
    with LoadDisplay(stream) as display:
        display.show(fetched(10))
        wait_until(lambda: not display_threads())
        display.show(fetched(20))
        assert not display_threads()


def test_a_stream_that_waits_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """`show` returns while a terminal does not take its text, and so does `close`."""
    set_longest_close(monkeypatch, 0.01)
    let_go, waits = threading.Event(), threading.Event()

    class Stopped(io.StringIO):
        def write(self, text: str) -> int:
            waits.set()
            let_go.wait(10)
            return len(text)

    display = LoadDisplay(Stopped())
    display.show(fetched(10))
    assert waits.wait(10)
    display.show(fetched(20))
    display.close()
    assert not let_go.is_set()
    let_go.set()
    wait_until(lambda: not display_threads())


def test_a_system_without_threads_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`show` does not raise when no thread can be started."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with LoadDisplay(Lines()) as display, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        display.show(fetched(10))


def test_it_subscribes_to_an_engine(make_engine: Callable[..., OrionInferenceEngine]) -> None:
    """`engine.subscribe(display.show)` shows the loads of that engine."""
    stream = Lines()
    engine = make_engine()
    with LoadDisplay(stream, quiet_s=0.0) as display:
        engine.subscribe(display.show)
        engine.infer("Hello?")
        stream.expect("main@")


# -- terminals


def test_a_terminal_has_a_bar(terminal: Terminal) -> None:
    """With rich, the bar is redrawn in place and in the end replaced by one line; the cursor is
    hidden meanwhile only."""
    pytest.importorskip("rich")
    with LoadDisplay(terminal.stream) as display:
        loading = {"shards": 8, "shards_loaded": 3, "mode": "progressive"}
        display.show(fetched(40, phase="loading_shard", **loading))
        wait_until(lambda: "40 % of 100.0 MB, 50.0 MB/s, 1.2 s left" in terminal.text)
        assert "loading, progressive, 3 of 8 shards" in terminal.text
        assert "━" in terminal.text
        display.show(fetched(80, "other@q8"))
        wait_until(lambda: "80 %" in terminal.text and "other@q8" in terminal.text)
        display.show(fetched(100, phase="complete", **loading))
        wait_until(lambda: "main@q4: fetched 60.0 MB of 100.0 MB" in terminal.text)
    wait_until(lambda: "other@q8: downloading, 80 % of 100.0 MB" in terminal.text)
    assert terminal.text.count("\x1b[?25l") == terminal.text.count("\x1b[?25h") == 1
    last = terminal.text.rpartition("\x1b[?25h")[2]
    assert "━" not in last


def test_a_bar_takes_no_print_of_others(terminal: Terminal) -> None:
    """While there is a bar, what the application prints goes where it printed it."""
    pytest.importorskip("rich")
    before = sys.stdout, sys.stderr
    with LoadDisplay(terminal.stream) as display:
        display.show(fetched(40))
        wait_until(lambda: "40 %" in terminal.text)
        assert (sys.stdout, sys.stderr) == before


def test_a_terminal_without_rich_has_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is optional: without it a terminal gets the lines that a file gets."""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with LoadDisplay(terminal.stream) as display:
        display.show(fetched(40))
    wait_until(lambda: terminal.text.endswith("\n"))
    assert terminal.text == "main@q4: downloading, 40 % of 100.0 MB, 50.0 MB/s, 1.2 s left\r\n"


def test_a_dumb_terminal_has_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor gets no codes."""
    monkeypatch.setenv("TERM", "dumb")
    with LoadDisplay(terminal.stream) as display:
        display.show(fetched(40))
    wait_until(lambda: terminal.text.endswith("\n"))
    assert "\x1b" not in terminal.text


def test_a_file_gets_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is no terminal gets no codes and no carriage returns, even if forced."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = Lines()
    with LoadDisplay(stream) as display:
        display.show(fetched(40))
        display.show(fetched(50, "other@q8"))
    assert len(stream.lines) == 2
    assert not {"\x1b", "\r"} & set(stream.getvalue())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1234, "1.2 kB"),
        (98.36e6, "98.4 MB"),
        (4.68e9, "4.68 GB"),
    ],
)
def test_sizes_in_words(count: float, text: str) -> None:
    """Sizes are decimal, as everywhere in models.json."""
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.5, "9.5 s"), (42, "42 s"), (90, "2 min"), (7500, "2 h 5 min")],
)
def test_times_in_words(seconds: float, text: str) -> None:
    """Times become coarser as they grow."""
    assert progress.time_text(seconds) == text
