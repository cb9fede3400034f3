"""What must not take the host down: dying workers, dying hosts, forgotten engines, Ctrl-C.

Real workers throughout; the host that dies is a child process of the test.
"""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import worker_processes
from helpers import config_with, one_model_registry, until

from orion_oie import (
    Event,
    OrionInferenceEngine,
    RequestHandle,
    WorkerCrashedError,
)

BOUND_S = 30.0
LONG = "Go on and on."


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[OrionInferenceEngine]:
    with OrionInferenceEngine(one_model_registry(tiny_model)) as engine:
        yield engine


def worker_pid(engine: OrionInferenceEngine) -> int:
    pid = next(iter(engine.stats().models.values())).pid
    assert pid is not None
    return pid


def begun(engine: OrionInferenceEngine, **options: object) -> RequestHandle:
    """A long request whose first text has been seen by its caller."""
    handle = engine.submit(LONG, max_tokens=1800, **options)
    next(iter(handle))
    return handle


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_worker_dies_in_the_middle_of_a_stream(engine, number) -> None:
    """The stream raises WorkerCrashedError with the signal; the next request works."""
    handle = begun(engine)
    pid = worker_pid(engine)
    os.kill(pid, number)
    with pytest.raises(WorkerCrashedError) as caught:
        list(handle)
    assert caught.value.details["signal"] == signal.Signals(number).name
    assert caught.value.details["pid"] == pid
    assert engine.infer("Hello?", max_tokens=4).content
    assert worker_pid(engine) != pid


def test_a_restarted_stream_ends_well(engine) -> None:
    """With on_stream_failure="restart" the stream says so and then gives a whole answer."""
    handle = engine.stream(LONG, max_tokens=1500, on_stream_failure="restart", seed=1)
    events = iter(handle)
    seen = [next(events)]
    os.kill(worker_pid(engine), signal.SIGKILL)
    seen += list(events)
    restart = [event.kind for event in seen].index("restart")
    text = "".join(event.text for event in seen[restart + 1 :])
    result = handle.result()
    assert result.content == text
    assert result.receipt.replays == 1
    assert [c.outcome for c in result.receipt.considered] == ["restarted", "answered"]


def test_a_crash_that_nobody_saw_is_replayed(engine) -> None:
    """A request whose text nobody looked at is replayed once on a fresh worker."""
    engine.preload("conversation")
    handle = engine.submit(LONG, max_tokens=1500)
    until(lambda: handle.progress > 40, "generating")
    os.kill(worker_pid(engine), signal.SIGKILL)
    result = handle.result(BOUND_S)
    assert result.receipt.replays == 1
    assert engine.stats().requests.replays == 1


def test_worker_dies_while_idle(engine) -> None:
    """A worker that dies between requests is noticed, and the next request gets a new one."""
    crashes: list[Event] = []
    engine.subscribe(lambda e: crashes.append(e) if e.name == "worker.crashed" else None)
    engine.infer("Hello?", max_tokens=4)
    pid = worker_pid(engine)
    os.kill(pid, signal.SIGKILL)
    until(lambda: bool(crashes), "the crash is reported")
    assert engine.stats().models == {}
    result = engine.infer("Hello?", max_tokens=4)
    assert result.receipt.cold_load
    assert result.receipt.replays == 0


def test_worker_dies_while_loading(smollm2: Path) -> None:
    """A worker that dies during the load: the load is tried again, or fails as a crash."""
    config = config_with(keep_spare_worker=False)
    with OrionInferenceEngine(one_model_registry(smollm2), config) as engine:
        handle = engine.submit("Hello?", max_tokens=4)
        until(lambda: bool(worker_processes()), "a worker is started")
        for process in worker_processes():
            process.kill()
        result = handle.result(BOUND_S)
        assert result.receipt.replays == 1
        assert "SIGKILL" in str(result.receipt.considered[0].error)


def test_worker_dies_in_prefill(smollm2: Path) -> None:
    """A worker that dies while it reads the prompt: the request is replayed and answered."""
    with OrionInferenceEngine(one_model_registry(smollm2)) as engine:
        engine.preload("conversation")
        handle = engine.submit("word " * 400, max_tokens=4)
        until(lambda: handle.state.value == "inferencing", "reading the prompt")
        os.kill(worker_pid(engine), signal.SIGSEGV)
        result = handle.result(BOUND_S)
        assert result.receipt.replays == 1
        assert "SIGSEGV" in str(result.receipt.considered[0].error)


def test_native_abort_is_an_exception(engine) -> None:
    """A failed assertion in native code ends the worker, not the host, and its text is kept."""
    handle = begun(engine)
    os.kill(worker_pid(engine), signal.SIGABRT)
    with pytest.raises(WorkerCrashedError) as caught:
        handle.result(BOUND_S)
    assert "Aborted" in caught.value.details["output"]


def test_a_collected_engine_ends_its_workers(tiny_model: Path) -> None:
    """An engine that is forgotten without shutdown leaves no process, at once."""
    engine = OrionInferenceEngine(one_model_registry(tiny_model))
    engine.infer("Hello?", max_tokens=4)
    seen = weakref.ref(engine)
    assert worker_processes()
    del engine
    gc.collect()
    assert seen() is None
    until(lambda: not worker_processes(), "the worker is gone")


def test_shutdown_leaves_nothing(tiny_model: Path) -> None:
    """After shutdown there is no worker, no zombie, no reader thread, no open socket."""
    before = (len(threading.enumerate()), len(psutil.Process().net_connections("unix")))
    engine = OrionInferenceEngine(one_model_registry(tiny_model))
    handles = [engine.submit(LONG, max_tokens=1800) for _ in range(3)]
    until(lambda: any(h.progress > 40 for h in handles), "generating")
    engine.shutdown(timeout=0.0)
    engine.shutdown()
    assert all(handle.done() for handle in handles)
    assert not psutil.Process().children()
    until(
        lambda: (
            (len(threading.enumerate()), len(psutil.Process().net_connections("unix"))) <= before
        ),
        "threads and sockets are gone",
    )


HOST = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers import one_model_registry
from orion_oie import OrionInferenceEngine
engine = OrionInferenceEngine(one_model_registry(Path({model!r})))
handle = engine.stream("Go on and on.", max_tokens=1900)
events = iter(handle)
next(events)
pid = next(iter(engine.stats().models.values())).pid
print(pid, flush=True)
"""


def host(model: Path, then: str) -> subprocess.Popen[str]:
    """A process that has an engine in the middle of an answer, then runs `then`."""
    script = HOST.format(tests=str(Path(__file__).parents[2]), model=str(model))
    return subprocess.Popen(
        [sys.executable, "-c", script + textwrap.dedent(then)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # its Ctrl-C is not ours
    )


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_host_that_is_killed_takes_its_workers_along(tiny_model: Path, number: int) -> None:
    """When the host dies without a chance to clean up, the worker ends by itself."""
    process = host(tiny_model, "time.sleep(60)")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert not gone(pid)
    process.send_signal(number)
    process.communicate(timeout=BOUND_S)
    until(lambda: gone(pid), "the worker is gone")


def test_a_host_that_just_ends_takes_its_workers_along(tiny_model: Path) -> None:
    """A script that ends without shutdown, in the middle of an answer, exits at once and clean."""
    process = host(tiny_model, "")
    out, err = process.communicate(timeout=BOUND_S)
    assert process.returncode == 0
    assert err == ""
    until(lambda: gone(int(out)), "the worker is gone")


def test_ctrl_c_ends_the_request_and_the_host_goes_on(tiny_model: Path) -> None:
    """Ctrl-C in infer() is KeyboardInterrupt; the worker survives it and answers again."""
    process = host(
        tiny_model,
        """
        handle.cancel()
        threading.Timer(0.3, lambda: os.kill(0, signal.SIGINT)).start()
        try:
            engine.infer("Go on and on.", max_tokens=1900)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        assert engine.infer("Hello?", max_tokens=4).content
        print("again", next(iter(engine.stats().models.values())).pid == pid, flush=True)
        engine.shutdown()
        """,
    )
    out, err = process.communicate(timeout=BOUND_S)
    assert out.split()[1:] == ["interrupted", "again", "True"], err


def test_a_forked_child_does_not_use_its_parents_engine(tiny_model: Path) -> None:
    """In a fork the engine raises EngineClosedError, and the parent's goes on."""
    process = host(
        tiny_model,
        """
        from orion_oie import EngineClosedError
        child = os.fork()
        if child == 0:
            try:
                engine.infer("Hello?")
            except EngineClosedError as error:
                os._exit(7 if "fork" in str(error) else 8)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        handle.cancel()
        print(bool(engine.infer("Hello?", max_tokens=4).content))
        engine.shutdown()
        """,
    )
    out, err = process.communicate(timeout=BOUND_S)
    assert out.split()[1:] == ["7", "True"], err


def test_the_worker_imports_what_the_host_would(tiny_model: Path, tmp_path: Path) -> None:
    """A file in the working directory that shadows a standard module does not break workers."""
    (tmp_path / "queue.py").write_text("raise SystemExit('shadowed')\n")
    script = HOST.format(tests=str(Path(__file__).parents[2]), model=str(tiny_model))
    process = subprocess.run(
        [sys.executable, "-P", "-c", script + "engine.shutdown(0)\n"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr


def test_config_is_kept(tiny_model: Path) -> None:
    """slots and context_length of the configuration reach the worker."""
    config = config_with(slots=2, context_length=256, threads=1)
    with OrionInferenceEngine(one_model_registry(tiny_model), config) as engine:
        info = engine.preload("conversation")
        assert (info.context_length, info.threads) == (256, 1)
