"""llama.cpp's devices: asked in a child, whose every misfortune is an answer, too."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import psutil
import pytest
from helpers import BOUND_S, wait_until
from internals import set_known_devices

from orion_oie.backends.llama.host import devices
from orion_oie.backends.llama.host.devices import (
    kind_of,
    probe_devices,
)
from orion_oie.hardware.machine import LlamaDevices

COMMAND = [sys.executable, "-P", "-m", "orion_oie.backends.llama.host.devices"]

# What the child imports instead of llama.cpp, and what then is the problem.
MISFORTUNES = {
    "missing library": (
        "raise ImportError('libcudart.so.12: cannot open shared object file')",
        "llama.cpp cannot be used: ImportError: libcudart.so.12: cannot open shared object file",
    ),
    "crash": (
        "os.kill(os.getpid(), signal.SIGSEGV)",
        "llama.cpp was ended by SIGSEGV: it said nothing",
    ),
    "other CPU": (
        "os.kill(os.getpid(), signal.SIGILL)",
        "llama.cpp was ended by SIGILL, an instruction that this CPU does not have: it said "
        "nothing",
    ),
    "assertion": (
        "print('found 1 device', file=sys.stderr)\n"
        "print('ggml.c:7: GGML_ASSERT(x) failed', file=sys.stderr, flush=True)\n"
        "os.abort()",
        "llama.cpp was ended by SIGABRT: ggml.c:7: GGML_ASSERT(x) failed",
    ),
    "silence": ("os._exit(0)", "the process that asked llama.cpp answered ''"),
    "talk": (
        "print('a driver says hello', flush=True)\nos._exit(0)",  # goes where errors go
        "the process that asked llama.cpp answered ''",
    ),
}

# A build that works, but whose libraries lie elsewhere; its drivers talk.
ODD_BUILD = """
print("a driver says hello", flush=True)
__version__ = "9.9"
def llama_backend_init(): print("and again")
def llama_supports_gpu_offload(): return True
def llama_print_system_info(): return b"CPU : AVX = 1 | "
"""

Fake = Callable[[str], None]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had asked yet."""
    set_known_devices(monkeypatch, None)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts another module in the place of llama_cpp, for children."""

    def install(code: str) -> None:
        (tmp_path / "llama_cpp.py").write_text(f"import os, signal, sys, time\n{code}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def children() -> list[psutil.Process]:
    """The children of this process that ask llama.cpp."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and devices.__name__ in child.cmdline()
    ]


def test_what_llama_says_here() -> None:
    """The child says of this machine what llama.cpp says in this process, and what psutil says."""
    found = probe_devices()
    assert found.problem == ""
    assert found.is_working
    assert found.version == llama_cpp.__version__
    assert found.can_offload == llama_cpp.llama_supports_gpu_offload()
    assert found.system_info == llama_cpp.llama_print_system_info().decode()
    assert "cpu" in found.built_for
    (cpu,) = (one for one in found.devices if one.kind == "cpu")
    assert cpu.total_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    is_gpu = any(one.kind != "cpu" for one in found.devices)
    assert is_gpu or not found.can_offload


def test_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is kept, a bad one as well; a fresh one can be had."""
    found = probe_devices()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert probe_devices() is found
    failed = probe_devices(is_fresh=True)
    assert failed.problem.startswith("no process can be started to ask llama.cpp: ")
    monkeypatch.undo()
    set_known_devices(monkeypatch, failed)
    assert probe_devices() is failed
    assert probe_devices(is_fresh=True).version == found.version


def test_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded Python may have no interpreter to start."""
    monkeypatch.setattr(sys, "executable", "")
    assert "no interpreter" in probe_devices().problem


@pytest.mark.parametrize(("code", "problem"), MISFORTUNES.values(), ids=MISFORTUNES)
def test_misfortunes_of_the_child(fake: Fake, code: str, problem: str) -> None:
    """A child that fails, crashes or answers nothing is a problem with a reason, and no error."""
    fake(code)
    found = probe_devices()
    assert found == LlamaDevices(problem=problem)
    assert not found.is_working


def test_a_child_that_hangs_is_ended(fake: Fake, tmp_path: Path) -> None:
    """After the time that it had, nothing is left of it."""
    fake(
        f"open({str(tmp_path / 'here')!r}, 'w').close()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "while True: time.sleep(60)"
    )
    start = time.monotonic()
    problem = probe_devices(2.5).problem
    assert problem == "llama.cpp did not name its devices in 2.5 s"
    assert time.monotonic() - start < BOUND_S
    assert (tmp_path / "here").exists()
    assert children() == []


def test_a_child_whose_parent_is_gone_ends_itself(fake: Fake, tmp_path: Path) -> None:
    """It was told how long it has, and needs nobody to end it."""
    fake("while True: time.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([*COMMAND, "1"], env=environment) as child:
        try:
            assert child.wait(BOUND_S) == -signal.SIGALRM
        finally:
            child.kill()


def test_a_build_that_is_made_otherwise(fake: Fake) -> None:
    """What can be known of it is, and the rest is a problem; what drivers print does not matter."""
    fake(ODD_BUILD)
    found = probe_devices()
    assert found.problem.startswith("this build of llama.cpp does not name its devices: ")
    assert (found.version, found.can_offload, found.devices) == ("9.9", True, [])
    assert found.cpu_features == ("AVX",)
    assert found.is_working


def test_the_asking_process_stays_clean() -> None:
    """It does not import llama.cpp, and has no child afterwards."""
    script = (
        "import sys; from orion_oie.backends.llama.host.devices import probe_devices; "
        "print(probe_devices().is_working, 'llama_cpp' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["True", "False"]
    probe_devices()
    wait_until(lambda: children() == [])


def test_the_child_by_hand() -> None:
    """Without an argument it has all the time it wants; one line of JSON."""
    done = subprocess.run(COMMAND, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("\n") == 1
    assert LlamaDevices.model_validate_json(done.stdout).is_working


@pytest.mark.parametrize(
    ("registry", "kind"),
    [
        ("CPU", "cpu"),
        ("CUDA", "cuda"),
        ("ROCm", "rocm"),
        ("Metal", "metal"),
        ("MTL", "metal"),
        ("Vulkan", "vulkan"),
        ("SYCL", "other"),
        ("BLAS", "other"),
        ("", "other"),
    ],
)
def test_kinds(registry: str, kind: str) -> None:
    """The names that ggml's backends have for themselves."""
    assert kind_of(registry) == kind
