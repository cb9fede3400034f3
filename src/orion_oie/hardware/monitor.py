"""Memory over time: a thread takes samples, keeps them, and reports changes of the pressure level.

It frees nothing and stops nothing: the callbacks decide what to do about a level. Its thread holds
the monitor by a weak reference only, and ends when the monitor is garbage-collected.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orion_oie.errors import InvalidRequestError
from orion_oie.hardware import probe
from orion_oie.hardware.advice import advise
from orion_oie.hardware.pressure import (
    PressureGauge,
    PressureLevel,
)
from orion_oie.hardware.probe import (
    ProcessMemory,
    SystemMemory,
)
from orion_oie.hardware.sample import MemorySample
from orion_oie.threads import Event

CACHE_INTERVAL_S = 60.0  # measuring a folder takes much longer than a sample


class MemoryMonitor:
    """Takes a `MemorySample` every `interval_s` seconds between `start` and `stop`.

    workers: returns the pid of each loaded model's worker, by key; dead pids are left out.
    idle: returns the keys of models that are not in use, for the recommendations.
    on_error: receives what a reader or a callback raised; it must not raise itself.
    on_sample: called after each sample, followed by on_level(old, new, sample) if the level
    changed; both on the thread that took the sample, without any lock held.
    cache_dir: a folder whose size is measured every 60 s. history: the number of samples kept.
    clock: seconds, for intervals and `at_s`. The default readers are those of `probe`.

    Raises `InvalidRequestError` for an interval that is not positive, or a history below 1.
    """

    def __init__(
        self,
        workers: Callable[[], Mapping[str, int]],
        *,
        on_error: Callable[[Exception], None],
        cache_dir: Path | None = None,
        interval_s: float = 1.0,
        history: int = 600,
        idle: Callable[[], Iterable[str]] = tuple,
        on_sample: Callable[[MemorySample], None] = lambda _sample: None,
        on_level: Callable[[PressureLevel, PressureLevel, MemorySample], None] = (
            lambda _old, _new, _sample: None
        ),
        gauge: PressureGauge | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        read_system: Callable[[], SystemMemory] = probe.system_memory,
        read_process: Callable[[int], ProcessMemory | None] = probe.process_memory,
        read_folder: Callable[[Path], int] = probe.folder_bytes,
    ) -> None:
        if not interval_s > 0:
            raise InvalidRequestError(f"interval_s must be positive, not {interval_s}")
        if history < 1:
            raise InvalidRequestError(f"history must be at least 1 sample, not {history}")
        self._workers = workers
        self._idle = idle
        self._on_error = on_error
        self._on_sample = on_sample
        self._on_level = on_level
        self._cache_dir = cache_dir
        self._interval_s = interval_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._read_system = read_system
        self._read_process = read_process
        self._read_folder = read_folder
        self._lock = threading.Lock()
        self._gauge = gauge or PressureGauge()
        self._history: deque[MemorySample] = deque(maxlen=history)
        self._cache_bytes: int | None = None
        self._cache_due_s: float | None = None
        self._thread: threading.Thread | None = None
        self._stopping = Event()

    @property
    def latest(self) -> MemorySample | None:
        """The last sample; None before the first."""
        with self._lock:
            return self._history[-1] if self._history else None

    @property
    def level(self) -> PressureLevel:
        """The level of the last sample; LOW before the first."""
        with self._lock:
            return self._gauge.level

    def history(self) -> list[MemorySample]:
        """The kept samples, oldest first."""
        with self._lock:
            return list(self._history)

    def recommendations(self) -> list[str]:
        """Advice on the pressure of the last sample; empty if it is low."""
        sample = self.latest
        if sample is None or sample.level is PressureLevel.LOW:
            return []
        return advise(sample, self._idle())

    def start(self) -> None:
        """Start the thread that takes samples. Does nothing if it is running."""
        with self._lock:
            is_running = self._thread is not None and self._thread.is_alive()
            if is_running and not self._stopping.is_set():
                return
            stopping = Event()
            thread = threading.Thread(
                target=_run,
                args=(weakref.ref(self), stopping, self._interval_s),
                name="orion-memory",
                daemon=True,
            )
            thread.start()
            self._thread, self._stopping = thread, stopping

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Take no more samples. Returns False if a sample or a callback still runs after
        `timeout_s`, or if a callback is the caller: the thread then ends after it. The monitor may
        be started again."""
        with self._lock:
            thread = self._thread
            self._stopping.set()
        if thread is None:
            return True
        if thread is threading.current_thread():
            return False
        thread.join(timeout_s)
        return not thread.is_alive()

    def sample_now(self) -> MemorySample:
        """Take a sample on this thread. Like any other it enters the history, updates the level and
        calls the callbacks. Raises what a reader or `workers` raised, and `RuntimeError` if the
        memory of this process cannot be read."""
        self._measure_cache()
        system = self._read_system()
        host = self._read_process(os.getpid())
        if host is None:
            raise RuntimeError("the memory of this process cannot be read")
        found = {key: self._read_process(pid) for key, pid in self._workers().items()}
        workers = {key: memory for key, memory in found.items() if memory is not None}
        with self._lock:
            old = self._gauge.level
            sample = MemorySample(
                at_s=self._clock(),
                wall_s=self._wall_clock(),
                system=system,
                host=host,
                workers=workers,
                cache_bytes=self._cache_bytes,
                level=self._gauge.update(system),
            )
            self._history.append(sample)
        self._guarded(lambda: self._on_sample(sample))
        if sample.level is not old:
            self._guarded(lambda: self._on_level(old, sample.level, sample))
        return sample

    def _measure_cache(self) -> None:
        with self._lock:
            now_s = self._clock()
            if self._cache_due_s is not None and now_s < self._cache_due_s:
                return
            self._cache_due_s = now_s + CACHE_INTERVAL_S
        if self._cache_dir is None:
            return
        size_bytes = None
        try:
            size_bytes = self._read_folder(self._cache_dir)
        except OSError as error:
            self._on_error(error)
        with self._lock:
            self._cache_bytes = size_bytes

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 (reported; a faulty callback ends no monitoring)
            self._on_error(error)


def _run(monitor_ref: "weakref.ref[MemoryMonitor]", stopping: Event, interval_s: float) -> None:
    """Take samples until `stopping` is set or the monitor is garbage-collected; holds a reference
    to it only while it takes a sample."""
    while not stopping.is_set():
        monitor = monitor_ref()
        if monitor is None:
            return
        monitor._guarded(monitor.sample_now)
        del monitor
        stopping.wait(interval_s)
