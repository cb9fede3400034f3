"""Install this library with some of its extras into a virtual environment, and say what happens.

    python scripts/install.py --venv .venv --python python3 smollm2

For `make`. Shows each step with the time it takes: a line that counts the seconds in a terminal,
elsewhere a line at each step and every 30 seconds. What pip says goes to pip.log in the virtual
environment; when pip fails, its last lines are shown, and what usually helps. Needs nothing but
Python.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time

COMPILER = """There is no C++ compiler, which llama.cpp needs. Install one, then do the same again:
  Debian, Ubuntu   sudo apt install build-essential
  Fedora, RHEL     sudo dnf install gcc-c++ make
  Alpine           sudo apk add build-base
  macOS            xcode-select --install
Or take llama-cpp-python as it was compiled by others (basic CPU support), where its index has the
version for this Python and machine:
  PIP_EXTRA_INDEX_URL={index} make ..."""

WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/cpu"

# What pip says when it fails, and what helps; the first that is found is shown.
ADVICE = [
    (
        r"CMAKE_C(XX)?_COMPILER|could not find.* compiler|command '?(gcc|g\+\+|cc|c\+\+|clang)\b.*"
        r"(failed|not found|No such file)|No CMAKE_CXX",
        COMPILER.format(index=WHEELS),
    ),
    (
        r"Killed signal|fatal error: Killed|out of memory|Cannot allocate memory",
        "The compiler ran out of memory. Compile with one process at a time:\n"
        "  CMAKE_BUILD_PARALLEL_LEVEL=1 make ...",
    ),
    (r"No space left on device", "The disk is full. Make room, then do the same again."),
    (
        r"Temporary failure in name resolution|ConnectionError|NewConnectionError|ReadTimeout|"
        r"Network is unreachable|Could not find a version that satisfies",
        "pip could not fetch something. Check the network and pip's settings (an index, a proxy),\n"
        "then do the same again: what was fetched is kept.",
    ),
    (
        r"ensurepip is not available|No module named '?(venv|ensurepip)",
        "This Python cannot make virtual environments. On Debian and Ubuntu:\n"
        "  sudo apt install python3-venv",
    ),
]

BUILDS = "Building wheel for llama-cpp-python"
COMPILING = "compiling llama.cpp"
FETCHING = "fetching packages"
EVERY_S = 30
TICK_S = 1.0
LAST_LINES = 25


def time_text(seconds):
    """A duration such as "42 s" or "3 min 12 s"."""
    whole = int(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


class Steps:
    """Shows the step that is being done, and for how long."""

    def __init__(self, stream):
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._lock = threading.Lock()
        self._step = self._detail = ""
        self._began_at = self._said_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self._close()

    def begin(self, step, detail=""):
        """Go on to a step, and to a detail of it that only a terminal shows. The time of the step
        before stays on the screen."""
        with self._lock:
            self._detail = detail
            if step == self._step:
                return
            self._close()
            self._step, self._began_at = step, time.monotonic()
            self._said_at = self._began_at
            if not self._is_terminal:
                self._write(f"  {step}\n")
            else:
                self._draw()

    def say(self, text):
        """Print something that stays."""
        with self._lock:
            self._clear()
            self._write(f"{text}\n")

    def _tick(self):
        while not self._ended.wait(TICK_S):
            with self._lock:
                if not self._step:
                    continue
                if self._is_terminal:
                    self._draw()
                elif time.monotonic() - self._said_at >= EVERY_S:
                    self._said_at = time.monotonic()
                    self._write(f"  {self._step}: {self._elapsed()} so far\n")

    def _close(self):
        took_s = time.monotonic() - self._began_at
        self._clear()
        if self._step and (self._is_terminal or took_s >= TICK_S):
            self._write(f"  {self._step}: {self._elapsed()}\n")
        self._step = ""

    def _elapsed(self):
        return time_text(time.monotonic() - self._began_at)

    def _draw(self):
        self._clear()
        most = shutil.get_terminal_size().columns - 1
        detail = f" ({self._detail})" if self._detail else ""
        self._write(f"  {self._step}{detail}: {self._elapsed()}"[:most])

    def _clear(self):
        if self._is_terminal:
            self._write("\r\033[K")

    def _write(self, text):
        self._stream.write(text)
        self._stream.flush()


def step_of(line):
    """The step, and a detail of it, that a line of pip is about; None if it says neither."""
    line = line.strip()
    if line.startswith(BUILDS):
        return None if "finished" in line else (COMPILING, "")
    if line.startswith(("Building wheel for ", "Building editable for ")):
        return None if "finished" in line else (f"building {line.split()[3]}", "")
    if line.startswith("Downloading "):
        name, _, size = line.removeprefix("Downloading ").rpartition("/")[2].partition(" ")
        return FETCHING, f"{name.partition('-')[0]} {size.strip('()')}".strip()
    if line.startswith(("Collecting ", "Processing ", "Obtaining ")):
        return FETCHING, re.split(r"[<>=;(\[ ]", line.split(maxsplit=1)[1].rpartition("/")[2])[0]
    if line.startswith("Installing collected packages"):
        return "copying the packages into the virtual environment", ""
    return None


def is_kept_wheel(line):
    """True if pip says that it has llama.cpp compiled already."""
    kept = line.lstrip().startswith(("Using cached", "Processing", "Downloading"))
    return kept and re.search(r"llama_cpp_python-\S+\.whl", line) is not None


def install(pip, log_path, steps):
    """Run pip. Returns its status; all that it said is in the log."""
    with open(log_path, "w", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            pip,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            bufsize=1,
        )
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                report(line, steps)
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def report(line, steps):
    """Show what a line of pip is about."""
    if is_kept_wheel(line):
        steps.say("  llama.cpp is compiled already: nothing to compile")
    step = step_of(line)
    if step is not None and step[0] == COMPILING:
        steps.say(
            "  llama.cpp has to be compiled: usually 4 to 16 minutes on 2 cores, once; pip keeps\n"
            "  the result. To take one that others have compiled: Ctrl-C, then\n"
            f"    PIP_EXTRA_INDEX_URL={WHEELS} make ...\n"
            "  which helps where that index has this version for this Python and machine."
        )
    if step is not None:
        steps.begin(*step)


def advice_on(text):
    """What helps against a failure, from what pip or venv said."""
    for pattern, advice in ADVICE:
        if re.search(pattern, text, re.IGNORECASE):
            return advice
    return None


def explain(what, text, log_path=None):
    """Say why it failed: the last lines, what helps, and where the rest is."""
    print(f"\n{what} failed. It ended with:\n", file=sys.stderr)
    for line in text.rstrip().splitlines()[-LAST_LINES:]:
        print(f"  | {line}", file=sys.stderr)
    advice = advice_on(text)
    if advice is not None:
        print(f"\n{advice}", file=sys.stderr)
    if log_path is not None:
        print(f"\nAll that it said: {log_path}", file=sys.stderr)


def make_environment(python, folder, steps):
    """Make the virtual environment, unless it is there. Returns the status."""
    if os.path.exists(os.path.join(folder, "bin", "python")):
        return 0
    steps.begin(f"making the virtual environment {folder}")
    made = subprocess.run(
        [python, "-m", "venv", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if made.returncode:
        steps.begin("")
        explain(f"{python} -m venv", made.stdout)
    return made.returncode


def main():
    """Install; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", help="names of extras, with commas between them")
    parser.add_argument("--venv", default=".venv", help="folder of the virtual environment")
    parser.add_argument("--python", default=sys.executable, help="makes the virtual environment")
    options = parser.parse_args()
    began_at = time.monotonic()
    print(f"Installing orion-oie[{options.extras}] into {options.venv}", flush=True)
    log_path = os.path.join(options.venv, "pip.log")
    pip = [os.path.join(options.venv, "bin", "python"), "-m", "pip", "install"]
    pip += ["--disable-pip-version-check", "--progress-bar", "off", "-c", "constraints.txt"]
    pip += ["-e", f".[{options.extras}]"]
    try:
        with Steps(sys.stdout) as steps:
            status = make_environment(options.python, options.venv, steps)
            if status:
                return status
            steps.begin(FETCHING)
            status = install(pip, log_path, steps)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on: what was fetched is kept.", file=sys.stderr)
        return 130
    if status:
        with open(log_path, encoding="utf-8", errors="replace") as log:
            explain("pip", log.read(), log_path)
        return status
    print(f"Installed in {time_text(time.monotonic() - began_at)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
