"""The devices of llama.cpp, queried in a separate process: a driver that crashes or hangs when it
is initialized takes only that process down.

    python -m orion_oie.backends.llama.host.devices [SECONDS]

is that process: it prints one line of JSON, and ends itself after that many seconds.
`probe_devices` starts it and reads the answer. This module chooses no device.
"""

import contextlib
import ctypes
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from orion_oie.backends.llama.host.process import environment
from orion_oie.hardware.machine import LlamaDevices
from orion_oie.schemas.stats import (
    Device,
    DeviceKind,
)

_END_S = 2.0
_SHOWN_CHARS = 500

_seen: LlamaDevices | None = None


def probe_devices(timeout_s: float = 30.0, *, is_fresh: bool = False) -> LlamaDevices:
    """The devices that llama.cpp sees on this machine. Queried once per process, unless `is_fresh`.

    Never raises for a child that cannot be started, crashes, hangs or answers nonsense: `problem`
    then gives the reason, and this result is kept, too.
    """
    global _seen
    if is_fresh or _seen is None:
        _seen = _asked(timeout_s)
    return _seen


def _asked(timeout_s: float) -> LlamaDevices:
    if os.name != "posix":
        return LlamaDevices(problem="needs a POSIX system; on Windows use WSL")
    if not sys.executable:
        return LlamaDevices(problem="sys.executable is empty: no interpreter to start")
    try:
        # Files, not pipes: a process that a driver starts may hold a pipe open for ever.
        with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as output:
            process = _start(timeout_s, answer, output)
            try:
                status = process.wait(timeout_s)
            finally:
                _end(process)
            text, said = _text(answer), _text(output)
    except subprocess.TimeoutExpired:
        return LlamaDevices(problem=f"llama.cpp did not name its devices in {timeout_s:g} s")
    except OSError as error:
        return LlamaDevices(problem=f"no process can be started to ask llama.cpp: {error}")
    if status != 0:
        return LlamaDevices(problem=_why(status, said))
    try:
        return LlamaDevices.model_validate_json(text)
    except ValidationError:
        shown = text[:_SHOWN_CHARS]
        return LlamaDevices(problem=f"the process that asked llama.cpp answered {shown!r}")


def _start(timeout_s: float, answer: BinaryIO, output: BinaryIO) -> "subprocess.Popen[bytes]":
    # -P and an explicit path, a session of its own, no backtraces: as for a worker, so that it sees
    # the same devices as a worker.
    command = [sys.executable, "-P", "-m", __name__, str(math.ceil(timeout_s) + 1)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=answer,
        stderr=output,
        start_new_session=True,
        env=environment(),
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    # A process that hangs in the kernel cannot be waited for: the system reaps it later.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace").strip()


def _why(status: int, output: str) -> str:
    said = output.rpartition("\n")[2][:_SHOWN_CHARS] or "it said nothing"
    if status > 0:
        return f"llama.cpp cannot be used: {said}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", an instruction that this CPU does not have" if -status == signal.SIGILL else ""
    return f"llama.cpp was ended by {name}{hint}: {said}"


# -- in the child

_BY_REGISTRY: dict[str, DeviceKind] = {
    "cpu": "cpu",
    "cuda": "cuda",
    "rocm": "rocm",
    "hip": "rocm",
    "metal": "metal",
    "mtl": "metal",
    "vulkan": "vulkan",
}


def kind_of(registry: str) -> DeviceKind:
    """The kind of the devices of a ggml backend, by the backend's name."""
    return _BY_REGISTRY.get(registry.lower(), "other")


def look() -> LlamaDevices:
    """The devices of llama.cpp in this process. Initializes every driver it was built for."""
    import llama_cpp as lc  # only in the child

    lc.llama_backend_init()
    devices: list[Device] = []
    built_for: list[DeviceKind] = []
    problem = ""
    try:
        ggml = _ggml(Path(lc.__file__).parent / "lib")
        devices, built_for = _devices(ggml), _kinds(ggml)
    except (OSError, AttributeError) as error:
        problem = f"this build of llama.cpp does not name its devices: {error}"
    return LlamaDevices(
        version=lc.__version__,
        built_for=built_for,
        devices=devices,
        can_offload=lc.llama_supports_gpu_offload(),
        system_info=_decoded(lc.llama_print_system_info()),
        problem=problem,
    )


def _kinds(ggml: Any) -> list[DeviceKind]:
    registries = [ggml.ggml_backend_reg_get(n) for n in range(ggml.ggml_backend_reg_count())]
    return [kind_of(_decoded(ggml.ggml_backend_reg_name(one))) for one in registries]


def _devices(ggml: Any) -> list[Device]:
    found = []
    for number in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(number)
        free_bytes, total_bytes = ctypes.c_size_t(), ctypes.c_size_t()
        ggml.ggml_backend_dev_memory(device, ctypes.byref(free_bytes), ctypes.byref(total_bytes))
        is_known = total_bytes.value > 0
        registry = ggml.ggml_backend_dev_backend_reg(device)
        found.append(
            Device(
                name=_decoded(ggml.ggml_backend_dev_name(device)),
                kind=kind_of(_decoded(ggml.ggml_backend_reg_name(registry))),
                description=_decoded(ggml.ggml_backend_dev_description(device)),
                total_bytes=total_bytes.value if is_known else None,
                free_bytes=free_bytes.value if is_known else None,
            )
        )
    return found


def _decoded(text: bytes | None) -> str:
    return (text or b"").decode("utf-8", "replace")


def _ggml(folder: Path) -> Any:
    """The ggml library, which llama.cpp has loaded already: beside llama.cpp's own, or part of it.
    Raises `OSError` or `AttributeError` for a build with another layout."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    functions: dict[str, tuple[Any, list[Any]]] = {
        "ggml_backend_dev_count": (size, []),
        "ggml_backend_dev_get": (pointer, [size]),
        "ggml_backend_dev_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_dev_description": (ctypes.c_char_p, [pointer]),
        "ggml_backend_dev_memory": (None, [pointer, pointer, pointer]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_reg_count": (size, []),
        "ggml_backend_reg_get": (pointer, [size]),
        "ggml_backend_reg_name": (ctypes.c_char_p, [pointer]),
    }
    files = [*sorted(folder.glob("*ggml.*")), *sorted(folder.glob("*llama.*"))]
    if not files:
        raise OSError(f"there is no library of ggml in {folder}")
    library = ctypes.CDLL(str(files[0]))
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def main() -> None:
    """Entry point of the process."""
    if len(sys.argv) > 1:
        signal.alarm(int(sys.argv[1]))  # the parent may be gone by then
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = os.dup(1)
    os.dup2(2, 1)  # drivers print to stdout
    os.write(answer, look().model_dump_json().encode() + b"\n")
    os._exit(0)  # no driver can crash during its shutdown


if __name__ == "__main__":
    main()
