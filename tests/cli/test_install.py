"""scripts/install.py, which `make` calls: what it says while pip works, and when pip fails."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from terminals import Terminal

SCRIPT = Path(__file__).parents[2] / "scripts" / "install.py"
CACHED = "  Using cached llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
BUILDING = "Building wheel for llama-cpp-python (pyproject.toml): started"
BUILT = "Building wheel for llama-cpp-python (pyproject.toml): finished with status 'done'"
OTHERS = "Building editable for orion-oie (pyproject.toml): started"


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_pip(folder: Path, body: str) -> list[str]:
    """A virtual environment whose pip does what a shell script says; the command that uses it."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    python.chmod(0o755)
    return [sys.executable, str(SCRIPT), "--venv", str(folder), "smollm2"]


def said(*lines: str) -> str:
    return "\n".join(f"echo {shlex.quote(line)}" for line in lines)


def done(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_steps_are_said(tmp_path: Path) -> None:
    """One line for each, in the order of pip's own; the whole output is kept."""
    lines = ["Collecting pydantic>=2", BUILDING, "Installing collected packages: a, b"]
    ran = done(fake_pip(tmp_path / "v", said(*lines)))
    assert (ran.returncode, ran.stderr) == (0, "")
    steps = ["fetching packages", "compiling llama.cpp", "copying the packages into"]
    assert ran.stdout.startswith(f"Installing orion-oie[smollm2] into {tmp_path / 'v'}\n")
    places = [ran.stdout.index(f"\n  {step}") for step in steps]
    assert places == sorted(places)
    assert "usually 4 to 16 minutes on 2 cores, once; pip keeps" in ran.stdout
    assert "https://abetlen.github.io/llama-cpp-python/whl/cpu make" in ran.stdout
    assert re.search(r"^Installed in \d+ s$", ran.stdout, re.MULTILINE)
    assert (tmp_path / "v" / "pip.log").read_text("utf-8").splitlines() == lines


def test_nothing_is_promised_where_a_wheel_is_kept(tmp_path: Path) -> None:
    """Minutes of compiling are named only when pip begins to compile."""
    ran = done(fake_pip(tmp_path / "v", said(CACHED, OTHERS)))
    assert ran.returncode == 0
    assert "llama.cpp is compiled already: nothing to compile" in ran.stdout
    assert "minutes" not in ran.stdout
    assert "building orion-oie" in ran.stdout


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("CMake Error: CMAKE_CXX_COMPILER not set, after EnableLanguage", "build-essential"),
        ("error: command 'gcc' failed: No such file or directory", "xcode-select --install"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "PARALLEL_LEVEL=1"),
        ("OSError: [Errno 28] No space left on device", "The disk is full."),
        ("Temporary failure in name resolution", "Check the network"),
        ("ERROR: Could not find a version that satisfies the requirement x", "Check the network"),
    ],
)
def test_a_failure_is_shown_with_what_helps(line: str, advice: str, tmp_path: Path) -> None:
    """The last lines of pip, the advice, the file with the rest, and pip's status."""
    body = f"for i in $(seq 100); do echo line $i; done; echo {shlex.quote(line)}; exit 3"
    ran = done(fake_pip(tmp_path / "v", body))
    assert ran.returncode == 3
    assert f"  | {line}" in ran.stderr
    assert "| line 99" in ran.stderr
    assert "| line 9\n" not in ran.stderr
    assert advice in ran.stderr
    assert f"All that it said: {tmp_path / 'v' / 'pip.log'}" in ran.stderr
    assert "Installed" not in ran.stdout


def test_a_failure_of_another_kind_has_no_advice(tmp_path: Path, install: ModuleType) -> None:
    """A guess would mislead."""
    assert install.advice_on("error: something else") is None
    ran = done(fake_pip(tmp_path / "v", "echo odd; exit 1"))
    assert ran.returncode == 1
    assert "  | odd" in ran.stderr
    assert "compiler" not in ran.stderr


def test_a_python_without_venv(tmp_path: Path) -> None:
    """What Debian leaves out is named."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ensurepip is not available'\nexit 1\n", encoding="utf-8")
    python.chmod(0o755)
    ran = done([sys.executable, str(SCRIPT), "--venv", str(tmp_path / "v"), "--python",
                str(python), "smollm2"])  # fmt: skip
    assert ran.returncode == 1
    assert "sudo apt install python3-venv" in ran.stderr


def test_seconds_are_shown_in_a_terminal(tmp_path: Path) -> None:
    """The line is drawn again each second, and is never wider than the terminal."""
    body = f"echo {shlex.quote(BUILDING)}; sleep 2.5; echo {shlex.quote(BUILT)}"
    command = fake_pip(tmp_path / "v", body)
    with Terminal([], columns=40, command=command) as terminal:
        status, shown = terminal.end()
    assert status == 0
    drawn_s = set(re.findall(r"compiling llama.cpp: (\d+) s", shown))
    assert len(drawn_s) > 1  # a busy machine may leave out a second
    drawn = [part.replace("\x1b[K", "") for part in re.split(r"\r", shown)]
    assert all(len(part) < 40 for part in drawn if "\n" not in part)


def test_a_log_gets_a_line_now_and_then(install: ModuleType, tmp_path: Path) -> None:
    """Where there is no terminal, a long step says that it goes on."""
    fake = fake_pip(tmp_path / "v", f"echo {shlex.quote(BUILDING)}; sleep 1")
    code = (
        f"import runpy, sys; sys.argv = {fake[1:]!r}; m = runpy.run_path({str(SCRIPT)!r}); "
        "g = m['main'].__globals__; g['EVERY_S'] = 0.2; g['TICK_S'] = 0.1; sys.exit(m['main']())"
    )
    ran = done([sys.executable, "-c", code])
    assert ran.returncode == 0
    assert re.search(r"  compiling llama.cpp: \d s so far\n", ran.stdout)


def test_ctrl_c_ends_pip_too(tmp_path: Path) -> None:
    """With status 130, and without a traceback."""
    body = f'echo $$ > "{tmp_path}/pid"; echo {shlex.quote(BUILDING)}; sleep 60'
    with subprocess.Popen(
        fake_pip(tmp_path / "v", body),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while "compiling llama.cpp\n" not in process.stdout.readline():
            pass
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped." in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text("utf-8")), 0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (192, "3 min 12 s")]
)
def test_durations_as_text(seconds: float, text: str, install: ModuleType) -> None:
    """Minutes from sixty seconds on."""
    assert install.time_text(seconds) == text
