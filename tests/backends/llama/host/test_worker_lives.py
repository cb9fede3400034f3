"""The life of a worker's process as the host sees it: its end is noticed, told as what it was, and
waited for only so long."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
from conftest import worker_processes
from contracts import INFO, job
from helpers import BOUND_S, Running, no_more_threads, run_all, wait_until
from internals import pending_of

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.loader import LlamaBackend, LoaderSettings
from orion_oie.backends.llama.host.process import WorkerProcess
from orion_oie.cancellation import CancelScope
from orion_oie.errors import (
    EngineClosedError,
    RequestCancelledError,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from orion_oie.pool.closing import close_all
from orion_oie.schemas.loading import LoadProgress

GO_ON = job("Go on.", max_tokens=1900)


class Watched:
    """A backend whose logs and crashes are kept, and the models that it loaded."""

    def __init__(self, **settings: float) -> None:
        self.logs: list[str] = []
        self.crashes: list[WorkerCrashedError] = []
        self.models: list[LlamaModel] = []
        self.on_log: Callable[[str], object] = lambda _line: None
        self.on_crash: Callable[[], object] = lambda: None
        self.backend = LlamaBackend(
            LoaderSettings(**settings), on_log=self._log, on_crash=self._crash
        )

    def load(self, path: Path, **fields: object) -> LlamaModel:
        spec = LoadSpec(INFO, (path,), **{"context_length": 2048, "slots": 2, **fields})
        self.models.append(self.backend.load(spec, CancelScope(), lambda _progress: None))
        return self.models[-1]

    def _log(self, _level: str, line: str, _model_id: str) -> None:
        self.logs.append(line)
        self.on_log(line)

    def _crash(self, _model_id: str, error: WorkerCrashedError) -> None:
        self.crashes.append(error)
        self.on_crash()


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched(cancel_grace_s=0.3)
    yield watched
    for model in watched.models:
        model.close(0.0)


class Asked:
    """A long answer, asked for on a thread of its own."""

    def __init__(self, model: LlamaModel, on_text: Callable[[], object] = lambda: None) -> None:
        self.scope = CancelScope()
        self.texts: list[str] = []
        self._on_text = on_text
        self.run = Running(model.generate, GO_ON, self.scope, self._text)
        wait_until(lambda: self.texts or not self.run.is_running)

    def _text(self, text: str, _tokens: int) -> None:
        self.texts.append(text)
        self._on_text()

    def error(self) -> BaseException:
        assert self.run.ends_within(BOUND_S)
        assert self.run.error is not None
        return self.run.error


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


def outlive_signals(monkeypatch: pytest.MonkeyPatch, model: LlamaModel, seconds: float) -> None:
    """Have the process of a model ignore SIGKILL, and stay for `seconds`, as one that hangs in the
    kernel does: no test can bring one there."""
    from orion_oie.backends.llama.host import client, process

    monkeypatch.setattr(process, "KILLED_GRACE_S", 0.2)
    monkeypatch.setattr(client, "_DYING_GRACE_S", 0.1)
    stays_until = time.monotonic() + seconds
    look = model._process.has_ended
    monkeypatch.setattr(
        model._process, "has_ended", lambda: time.monotonic() > stays_until and look()
    )


def reader_of(model: LlamaModel) -> threading.Thread:
    """The thread that hears a worker: nothing else shows that it ended."""
    return model._reader


# -- what killed it


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGRTMIN, "SIGRTMIN"),
        (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_every_signal_is_told(watched: Watched, tiny_model: Path, number: int, name: str) -> None:
    """Also a real-time signal, which Python has no name for, ends the request, and is told."""
    model = watched.load(tiny_model)
    asked = Asked(model)
    os.kill(model.pid, number)
    error = asked.error()
    assert isinstance(error, WorkerCrashedError)
    assert error.details["signal"] == name
    assert error.details["exit_code"] == -number
    assert name in error.message
    wait_until(lambda: watched.crashes)
    assert not model.is_alive()


def a_worker(program: str) -> WorkerProcess:
    """A process in place of a worker, which runs a Python program: `fd` is its socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        code = f"import os, time; fd = {theirs.fileno()}; {program}"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code], pass_fds=[theirs.fileno()]
        )
    return WorkerProcess(process, ours, no_output())


def no_output() -> BinaryIO:
    """A file for the output of a process that says nothing; it is closed with the process."""
    return tempfile.TemporaryFile()


@contextmanager
def sleeping_worker() -> Iterator[tuple[LlamaModel, list[WorkerCrashedError]]]:
    """A process that says nothing in place of a worker; a copy of its socket stays open."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(["/bin/sleep", "60"])
        crashes: list[WorkerCrashedError] = []
        worker = WorkerProcess(process, ours, no_output())
        model = LlamaModel(
            LoadSpec(INFO, ()), worker, on_crash=lambda _id, error: crashes.append(error)
        )
        yield model, crashes
        model.close(0.0)


def buried(program: str) -> tuple[LlamaModel, list[WorkerCrashedError]]:
    """The model of a process in place of a worker, once that has ended."""
    crashes: list[WorkerCrashedError] = []
    spec = LoadSpec(INFO, ())
    model = LlamaModel(spec, a_worker(program), on_crash=lambda _id, error: crashes.append(error))
    reader_of(model).join(BOUND_S)
    assert not reader_of(model).is_alive()
    return model, crashes


@pytest.mark.parametrize("code", [0, 3, 134, 255])
def test_an_exit_code_is_no_signal(code: int) -> None:
    """Whatever its number is."""
    model, crashes = buried(f"os._exit({code})")
    assert crashes[0].details["exit_code"] == code
    assert crashes[0].details["signal"] is None
    assert f"exit code {code}" in crashes[0].message
    with pytest.raises(WorkerCrashedError):
        model.completion.result(BOUND_S)


def test_a_worker_that_hangs_up_and_stays_is_ended() -> None:
    """It is not said to have died by the signal that the host sent."""
    model, crashes = buried("os.close(fd); time.sleep(60)")
    assert is_gone(model.pid)
    assert crashes[0].details["signal"] is None
    assert "closed its connection" in crashes[0].message


def test_it_dies_before_it_says_hello() -> None:
    """And in the middle of a message: a load that waits for it ends."""
    model, _crashes = buried("os.write(fd, bytes([0, 0, 0, 64]) + b'{')")
    with pytest.raises(WorkerCrashedError):
        model.device(CancelScope(), BOUND_S)


def test_a_copy_of_the_socket_hides_no_death() -> None:
    """A process that was forked while the worker started, or that the worker has started, holds its
    end of the socket open: there is no end of file."""
    with sleeping_worker() as (model, crashes):
        os.kill(model.pid, signal.SIGKILL)
        wait_until(lambda: crashes)
        assert crashes[0].details["signal"] == "SIGKILL"
        assert Running(model.close).ends_within(BOUND_S)


def test_where_the_system_does_not_notify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors of processes, the host looks from time to time."""
    monkeypatch.delattr(os, "pidfd_open")
    with sleeping_worker() as (model, crashes):
        os.kill(model.pid, signal.SIGKILL)
        wait_until(lambda: crashes)
        assert crashes[0].details["signal"] == "SIGKILL"


# -- it does not end


def test_a_stopped_worker_is_closed_in_time(watched: Watched, tiny_model: Path) -> None:
    """It neither answers nor ends by itself: after the time that it was given, it is killed."""
    model = watched.load(tiny_model)
    os.kill(model.pid, signal.SIGSTOP)
    closing = Running(model.close, 0.1)
    assert closing.ends_within(BOUND_S)
    assert is_gone(model.pid)
    assert watched.crashes == []


def test_a_process_that_outlives_sigkill(
    watched: Watched, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests end, closing it ends, and it is said that its memory is not free."""
    model = watched.load(tiny_model)
    outlive_signals(monkeypatch, model, seconds=2.0)
    asked = Asked(model)
    os.kill(model.pid, signal.SIGSTOP)
    asked.scope.cancel(RequestCancelledError("x"))
    assert isinstance(asked.error(), WorkerTimeoutError)
    assert Running(model.close, 0.0).ends_within(BOUND_S)
    wait_until(lambda: watched.logs)
    assert "memory is not free" in watched.logs[0]
    assert str(model.pid) in watched.logs[0]


def test_it_reads_nothing_while_much_is_sent(watched: Watched, tiny_model: Path) -> None:
    """A message that waits for room in the socket delays neither a cancel nor a close."""
    model = watched.load(tiny_model, context_length=256)
    os.kill(model.pid, signal.SIGSTOP)
    scope = CancelScope()
    running = Running(model.generate, job("x" * 2_000_000), scope, lambda _t, _n: None)
    wait_until(lambda: pending_of(model))
    scope.cancel(RequestCancelledError("x"))
    assert running.ends_within(BOUND_S)
    assert isinstance(running.error, WorkerTimeoutError)
    assert Running(model.close, 0.0).ends_within(BOUND_S)


def test_stopped_workers_are_closed_side_by_side(watched: Watched, tiny_model: Path) -> None:
    """None takes the time of another, and each is gone."""
    models = [watched.load(tiny_model, context_length=256) for _ in range(3)]
    for model in models:
        os.kill(model.pid, signal.SIGSTOP)
    assert Running(close_all, models, 0.2).ends_within(BOUND_S)
    assert all(is_gone(model.pid) for model in models)


# -- who ends what waits


def test_no_text_comes_after_the_end(watched: Watched, tiny_model: Path) -> None:
    """A request that ends because another one made the worker stop gets nothing more, although its
    text was on the way."""
    model = watched.load(tiny_model)
    late: list[bool] = []
    over = threading.Event()
    asked = Asked(model, lambda: late.append(over.is_set()))
    model.fail(EngineClosedError("stop"))
    assert isinstance(asked.error(), EngineClosedError)
    over.set()
    model.close()
    assert not any(late)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_request_whose_text_nobody_takes(
    watched: Watched, tiny_model: Path, kind: type[BaseException]
) -> None:
    """Whatever its callback raises ends this request, with that, and no other."""
    model = watched.load(tiny_model)
    other = Asked(model)

    def refuse(_text: str, _tokens: int) -> None:
        raise kind("no")

    with pytest.raises(kind):
        model.generate(GO_ON, CancelScope(), refuse)
    count = len(other.texts)
    wait_until(lambda: len(other.texts) > count)
    other.scope.cancel(RequestCancelledError("x"))
    assert isinstance(other.error(), RequestCancelledError)
    assert model.is_alive()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt("a callback")


def test_callbacks_that_raise(watched: Watched, tiny_model: Path) -> None:
    """Neither a log nor the report of a crash keeps a request waiting, or a close."""
    watched.on_log, watched.on_crash = interrupt, interrupt
    model = watched.load(tiny_model)
    model.on_exit(interrupt)
    asked = Asked(model)
    os.kill(model.pid, signal.SIGKILL)
    assert isinstance(asked.error(), WorkerCrashedError)
    wait_until(lambda: watched.crashes)
    assert Running(model.close).ends_within(BOUND_S)
    reader_of(model).join(BOUND_S)
    assert not reader_of(model).is_alive()


def test_a_log_that_raises_too(
    watched: Watched, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a callback raises is logged, by a handler that is code of the application as well."""
    monkeypatch.setattr(logging.getLogger("orion_oie"), "exception", interrupt)
    test_callbacks_that_raise(watched, tiny_model)


def test_a_callback_closes_its_own_model(watched: Watched, tiny_model: Path) -> None:
    """And does not wait for itself."""
    model = watched.load(tiny_model)
    asked = Asked(model, model.close)
    assert isinstance(asked.error(), EngineClosedError)
    wait_until(lambda: is_gone(model.pid))


def test_callbacks_close_one_anothers_models(watched: Watched, tiny_model: Path) -> None:
    """Two readers do not wait for each other."""
    first, second = watched.load(tiny_model), watched.load(tiny_model)
    both = threading.Barrier(2)

    def close_after_both(model: LlamaModel) -> Callable[[], object]:
        def close() -> None:
            if model.is_alive():
                both.wait(BOUND_S)
                model.close()

        return close

    runs = run_all(
        [
            lambda: first.generate(GO_ON, CancelScope(), lambda _t, _n: close_after_both(second)()),
            lambda: second.generate(GO_ON, CancelScope(), lambda _t, _n: close_after_both(first)()),
        ]
    )
    assert all(isinstance(run.error, EngineClosedError) for run in runs)


def test_a_callback_asks_its_own_model(watched: Watched, tiny_model: Path) -> None:
    """It is told that no answer could come."""
    model = watched.load(tiny_model)
    asked = Asked(model, lambda: model.generate(job("x"), CancelScope(), lambda _t, _n: None))
    error = asked.error()
    assert isinstance(error, WorkerError)
    assert "another thread" in error.message
    assert model.is_alive()


def test_several_threads_close(watched: Watched, tiny_model: Path) -> None:
    """In the middle of an answer, and while the worker dies by itself."""
    model = watched.load(tiny_model)
    asked = Asked(model)
    runs = run_all([model.close, lambda: model.close(0.0), model.kill, model.close])
    assert [run.error for run in runs] == [None] * 4
    assert isinstance(asked.error(), EngineClosedError)
    assert is_gone(model.pid)


# -- no more threads


def test_a_worker_dies_when_there_are_no_more_threads(watched: Watched, tiny_model: Path) -> None:
    """Its requests end, and so does the wait for its load."""
    model = watched.load(tiny_model)
    asked = Asked(model)
    with no_more_threads():
        os.kill(model.pid, signal.SIGKILL)
        assert isinstance(asked.error(), WorkerCrashedError)
        model.close()
    with sleeping_worker() as (other, crashes), no_more_threads():
        os.kill(other.pid, signal.SIGKILL)
        wait_until(lambda: crashes)
        with pytest.raises(WorkerCrashedError):
            other.completion.result(BOUND_S)


def test_no_worker_without_its_threads(watched: Watched, tiny_model: Path) -> None:
    """A load that cannot watch its worker says so, and leaves no process."""
    with no_more_threads(), pytest.raises(WorkerError, match="no more threads"):
        watched.load(tiny_model)
    assert worker_processes() == []


@pytest.mark.parametrize("phase", ["loading_shard", "ready", "complete"])
def test_a_load_whose_progress_cannot_be_told(
    watched: Watched, tiny_model: Path, phase: str
) -> None:
    """At whatever step the callback raises, no process is left."""

    def refuse(progress: LoadProgress) -> None:
        if progress.phase == phase:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        watched.backend.load(LoadSpec(INFO, (tiny_model,), slots=1), CancelScope(), refuse)
    wait_until(lambda: worker_processes() == [])


# -- what a host may do

HOST = """
import os, signal, socket, subprocess, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import worker_processes
from contracts import INFO, job
from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.errors import OrionError

def load():
    backend = LlamaBackend()
    return backend, backend.load(
        LoadSpec(INFO, (Path({model!r}),), slots=1, context_length=2048), CancelScope(),
        lambda _progress: None,
    )

def killed_answer(model):
    "The error of an answer whose worker is killed."
    def on_text(_text, _tokens):
        if not seen:
            seen.append(1)
            os.kill(model.pid, signal.SIGKILL)
    seen = []
    try:
        model.generate(job("Go on.", max_tokens=1900), CancelScope(), on_text)
    except OrionError as error:
        return error

def answer(model):
    pieces = []
    model.generate(job("Go on.", max_tokens=4), CancelScope(), lambda t, _n: pieces.append(t))
    return bool(pieces)
"""


def host_says(model: Path, then: str) -> list[str]:
    """The lines that a host prints, which runs `then`."""
    script = HOST.format(tests=str(Path(__file__).parents[3]), model=str(model))
    done = subprocess.run(
        [sys.executable, "-c", script + textwrap.dedent(then)],
        capture_output=True,
        text=True,
        timeout=3 * BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_host_that_forks_while_a_worker_starts(tiny_model: Path) -> None:
    """The fork keeps the worker's socket; the death of the worker is noticed all the same."""
    said = host_says(
        tiny_model,
        """
        real, forks = subprocess.Popen, []
        def start(*args, **options):
            process = real(*args, **options)
            forks.append(os.fork())
            if not forks[-1]:
                time.sleep(60)
                os._exit(0)
            return process
        subprocess.Popen = start
        backend, model = load()
        print(killed_answer(model).details["signal"])
        model.close()
        for fork in forks:
            os.kill(fork, signal.SIGKILL)
        """,
    )
    assert said == ["SIGKILL"]


@pytest.mark.parametrize("habit", ["ignores", "takes"])
def test_a_host_that_takes_exit_codes(tiny_model: Path, habit: str) -> None:
    """The end is noticed, and its cause is not made up. A close works, too."""
    handler = {
        "ignores": "signal.SIG_IGN",
        "takes": "lambda *_: [None for _ in iter(reaped, None)]",
    }
    said = host_says(
        tiny_model,
        f"""
        def reaped():
            try:
                return os.waitpid(-1, os.WNOHANG)[0] or None
            except ChildProcessError:
                return None
        signal.signal(signal.SIGCHLD, {handler[habit]})
        backend, model = load()
        killer = threading.Thread(target=lambda: print(killed_answer(model)), daemon=True)
        killer.start()
        while killer.is_alive():  # signals are handled on this thread
            time.sleep(0.01)
        backend, model = load()
        model.close()
        print(model.is_alive())
        """,
    )
    assert "exit code" not in said[0]
    assert "not known" in said[0] or (habit == "takes" and "SIGKILL" in said[0])
    assert said[1:] == ["False"]


def test_a_fork_of_the_host_ends_by_itself(tiny_model: Path) -> None:
    """With its finalizers and exit handlers: the workers of its parent go on."""
    said = host_says(
        tiny_model,
        """
        import atexit, gc, weakref
        backend, model = load()
        backend.warm_up()
        weakref.finalize(model, print, "model is collected")
        atexit.register(backend.kill_all)
        fork = os.fork()
        if not fork:
            model.kill()
            model.close(0.0)
            backend.kill_all()
            os.close(1)
            sys.exit(0)
        print(os.waitpid(fork, 0)[1])
        print(answer(model), model.is_alive())
        """,
    )
    assert said[:2] == ["0", "True True"]


def test_children_of_the_host_inherit_no_socket(tiny_model: Path) -> None:
    """Even with `close_fds=False`: none but the standard ones is open in them."""
    said = host_says(
        tiny_model,
        """
        backend, model = load()
        subprocess.run(
            [sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"], close_fds=False
        )
        backend.kill_all()
        """,
    )
    assert len(eval(said[0])) == 4  # the folder is open, too


def test_a_host_with_the_systems_own_sigpipe(tiny_model: Path) -> None:
    """A message to a worker that is gone does not end it."""
    said = host_says(
        tiny_model,
        """
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        backend, model = load()
        os.kill(model.pid, signal.SIGSTOP)
        asked = [
            threading.Thread(target=lambda: print(killed_answer(model)), daemon=True)
            for _ in range(2)
        ]
        [one.start() for one in asked]
        model.use_threads(1)
        while not model._pending: time.sleep(0.01)
        os.kill(model.pid, signal.SIGKILL)
        for _ in range(100): model.use_threads(1)
        [one.join() for one in asked]
        print("still here")
        """,
    )
    assert said[-1] == "still here"


def test_a_worker_whose_host_died_before_it_looked() -> None:
    """It was started by a process that is gone, and a fork of that holds the socket: it ends."""
    gone = subprocess.Popen(["/bin/true"])
    gone.wait(BOUND_S)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "orion_oie.backends.llama.worker.main"]
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(gone.pid), "0", ""], pass_fds=[theirs.fileno()]
        )
        assert process.wait(3 * BOUND_S) == 0
