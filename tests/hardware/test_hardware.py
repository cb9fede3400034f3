"""The machine: cores and memory that may be used, devices, and GPUs that the system shows."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from orion_oie.hardware import (
    cgroup,
    cpu,
    machine,
)
from orion_oie.hardware.cpu import Cpu
from orion_oie.hardware.machine import (
    Device,
    GpuTrace,
    LlamaDevices,
    detect,
    find_gpus,
    slots_for,
)

FOUR_CORES = tuple(frozenset({n, n + 4}) for n in range(4))
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="the system has no affinity"
)


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Four cores of two threads each, all of them usable."""
    processor = Cpu("A CPU", ("AVX",), 4, FOUR_CORES)
    monkeypatch.setattr(cpu, "this_cpu", lambda: processor)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cgroup, "cpu_quota_cores", lambda _proc=None: None)
    monkeypatch.setattr(cgroup, "memory_limit", lambda _proc=None: None)
    return monkeypatch


# -- cores


@pytest.mark.parametrize(
    ("affinity", "quota", "logical", "physical"),
    [
        (range(8), None, 8, 4),
        (range(4), None, 4, 4),
        ((0, 4), None, 2, 1),
        ((0, 4, 1), None, 3, 2),
        (range(8), 6.5, 6, 4),
        (range(8), 2.9, 2, 2),
        (range(8), 0.25, 1, 1),
        (range(8), 64.0, 8, 4),
    ],
)
def test_usable_cores(
    computer: pytest.MonkeyPatch,
    affinity: range,
    quota: float | None,
    logical: int,
    physical: int,
) -> None:
    """Affinity and the container's quota both count; never fewer than one."""
    computer.setattr(os, "sched_getaffinity", lambda _pid: set(affinity))
    computer.setattr(cgroup, "cpu_quota_cores", lambda _proc=None: quota)
    assert machine.usable_cores() == logical
    assert machine.usable_physical_cores() == physical


def test_usable_cores_where_little_is_told(computer: pytest.MonkeyPatch) -> None:
    """Without lists of siblings, what is known of the whole machine bounds them; without affinity,
    all logical processors may be used."""
    computer.setattr(cpu, "this_cpu", lambda: Cpu(physical_cores=4))
    assert machine.usable_physical_cores() == 4
    computer.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    assert machine.usable_physical_cores() == 2
    computer.setattr(cpu, "this_cpu", Cpu)
    assert machine.usable_physical_cores() == 2
    computer.delattr(os, "sched_getaffinity")
    assert machine.usable_cores() == 8


@needs_affinity
def test_affinity_is_seen_at_once() -> None:
    """A real process that may run on one processor only has one core."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cores() == machine.usable_physical_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("cores", "gib", "slots"), [(1, 64, 4), (2, 64, 8), (8, 64, 16), (8, 1, 4), (8, 0, 1)]
)
def test_slots(cores: int, gib: int, slots: int) -> None:
    """Four for each core, from 4 to 16, as far as the memory goes."""
    assert slots_for(cores, gib * 2**30) == slots
    assert 1 <= machine.default_slots() <= 16


# -- the whole


def test_this_machine() -> None:
    """Each figure fits to the others, and the memory to what the system says."""
    found = detect()
    assert 1 <= found.usable_physical_cores <= found.usable_cores <= found.logical_cores
    assert found.usable_physical_cores <= found.physical_cores <= found.logical_cores
    assert 0 < found.memory_available_bytes <= found.memory_total_bytes
    assert found.memory_total_bytes <= psutil.virtual_memory().total
    assert found.machine == os.uname().machine
    assert found.cpu
    assert [device.kind for device in found.devices] == ["cpu"]
    assert machine.Hardware.model_validate_json(found.model_dump_json()) == found


def test_limits_of_a_container(computer: pytest.MonkeyPatch) -> None:
    """Quota and memory limit are named, and the memory is what the limit leaves."""
    computer.setattr(cgroup, "cpu_quota_cores", lambda _proc=None: 1.5)
    limit = cgroup.MemoryLimit(limit_bytes=2_000, used_bytes=500, available_bytes=1_500)
    computer.setattr(cgroup, "memory_limit", lambda _proc=None: limit)
    found = detect()
    assert (found.core_quota, found.usable_cores, found.logical_cores) == (1.5, 1, 8)
    assert found.memory_limit_bytes == found.memory_total_bytes == 2_000
    assert found.memory_available_bytes == 1_500
    own = Device(name="CPU", kind="cpu", description="A CPU", total_bytes=2_000, free_bytes=1_500)
    assert found.devices == [own]


def test_devices_are_llamas_and_there_is_always_a_cpu(computer: pytest.MonkeyPatch) -> None:
    """Devices from llama.cpp stay unchanged; a name alone becomes a device without details."""
    gpu = Device(name="CUDA0", kind="cuda", description="A GPU", total_bytes=9, free_bytes=8)
    its_cpu = Device(name="CPU", kind="cpu", total_bytes=7, free_bytes=7)
    assert detect([gpu, its_cpu]).devices == [gpu, its_cpu]
    assert [one.name for one in detect([gpu]).devices] == ["CUDA0", "CPU"]
    named = detect(["cpu", "gpu", "gpu"]).devices
    assert [(one.name, one.kind) for one in named] == [("gpu", "other"), ("CPU", "cpu")]
    assert named[0].total_bytes is None


# -- what llama.cpp says


@pytest.mark.parametrize(
    ("system_info", "features"),
    [
        ("CPU : SSE3 = 1 | AVX = 1 | AVX2 = 0 | OPENMP = 1 | ", ("SSE3", "AVX", "OPENMP")),
        (
            "CUDA : ARCHS = 500, 890 | USE_GRAPHS = 1 | CPU : NEON = 1 | SVE_CNT = 32 | ",
            ("NEON", "SVE_CNT"),
        ),
        ("", ()),
        ("something else", ()),
    ],
)
def test_the_build_tells_its_features(system_info: str, features: tuple[str, ...]) -> None:
    """Those of the CPU, and not those of other devices."""
    assert LlamaDevices(system_info=system_info).cpu_features == features


# -- GPUs


def write(root: Path, **files: str) -> Path:
    """A tree of small files; `__` in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def gpus(root: Path) -> list[tuple[str, str, str]]:
    found = find_gpus(root, "linux")
    return [(one.kind, one.description, os.path.relpath(one.where, root)) for one in found]


def test_no_gpu(tmp_path: Path) -> None:
    """An empty machine, and one whose cards only show pictures or are not to be opened here."""
    assert gpus(tmp_path) == []
    write(tmp_path, dev__dri__renderD128="", sys__class__drm__renderD128__device__vendor="0x1234")
    write(tmp_path, sys__class__drm__renderD129__device__vendor="0x8086\n")
    assert gpus(tmp_path) == []


def test_nvidia(tmp_path: Path) -> None:
    """The driver names its cards; where it does not, its devices count; each card counts once."""
    write(tmp_path, dev__nvidia0="", dev__nvidiactl="", dev__dri__renderD128="")
    write(tmp_path, sys__class__drm__renderD128__device__vendor="0x10de\n")
    assert gpus(tmp_path) == [("cuda", "NVIDIA", "dev/nvidia0")]
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H100 \nIRQ:   \t\t 17\n")
    where = "proc/driver/nvidia/gpus/0000:01:00.0"
    assert gpus(tmp_path) == [("cuda", "NVIDIA H100", where)]


def test_nvidia_without_its_driver(tmp_path: Path) -> None:
    """A GPU that only the system's own driver knows can be used through Vulkan."""
    write(tmp_path, dev__dri__renderD128="")
    write(tmp_path, sys__class__drm__renderD128__device__vendor="0x10de\n")
    assert gpus(tmp_path) == [("vulkan", "NVIDIA", "dev/dri/renderD128")]


def test_amd(tmp_path: Path) -> None:
    """A node of the compute driver with an id is a GPU, one without is a CPU."""
    nodes = "sys__class__kfd__kfd__topology__nodes__"
    write(tmp_path, **{f"{nodes}0__gpu_id": "0\n", f"{nodes}1__gpu_id": "4711\n"})
    write(tmp_path, dev__dri__renderD128="")
    write(tmp_path, sys__class__drm__renderD128__device__vendor="0x1002\n")
    assert gpus(tmp_path) == [("vulkan", "AMD", "dev/dri/renderD128")]
    write(tmp_path, dev__kfd="")
    assert gpus(tmp_path) == [("rocm", "AMD", "sys/class/kfd/kfd/topology/nodes/1")]


def test_intel(tmp_path: Path) -> None:
    """An integrated GPU, beside a card of NVIDIA's."""
    write(tmp_path, dev__nvidia0="", dev__dri__renderD128="", dev__dri__renderD129="")
    write(tmp_path, sys__class__drm__renderD128__device__vendor="0x8086\n")
    write(tmp_path, sys__class__drm__renderD129__device__vendor="0x10de\n")
    assert [kind for kind, *_ in gpus(tmp_path)] == ["cuda", "vulkan"]


def test_apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Apple computer with a chip of Apple's has a GPU for Metal."""
    names = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*names[:4], "arm64")))
    assert find_gpus(platform="darwin") == [
        GpuTrace(kind="metal", where="macOS", description="Apple")
    ]
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*names[:4], "x86_64")))
    assert find_gpus(platform="darwin") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux shows")
def test_gpus_of_this_machine_can_be_looked_at() -> None:
    """Whatever is found here exists."""
    assert all(Path(trace.where).exists() for trace in find_gpus())
