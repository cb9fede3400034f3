"""The machine: cores, memory, devices, and the part of them that this process may use.

Reads what the operating system reports and does not call llama.cpp: the devices that llama.cpp can
use are found out in a process of their own and passed in as `LlamaDevices`.
"""

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from orion_oie.errors import InvalidRequestError
from orion_oie.hardware import (
    cgroup,
    cpu,
    probe,
)
from orion_oie.schemas.base import Schema
from orion_oie.schemas.stats import (
    Device,
    DeviceKind,
    Hardware,
)

_BYTES_PER_SLOT = 256 * 2**20


class LlamaDevices(Schema):
    """The build of llama.cpp and the devices that it can compute with on this machine.

    built_for: the kinds of devices that the build supports, present or not. can_offload: layers
    can be put on a GPU. system_info: llama.cpp's own description of its build. problem: what could
    not be found out, and why; empty if everything could.
    """

    version: str = ""
    built_for: list[DeviceKind] = []
    devices: list[Device] = []
    can_offload: bool = False
    system_info: str = ""
    problem: str = ""

    @property
    def is_working(self) -> bool:
        """False if llama.cpp could not be loaded or crashed its process."""
        return bool(self.version)

    @property
    def cpu_features(self) -> tuple[str, ...]:
        """The instructions and other options that its kernels for the CPU were built with."""
        section, names = "", []
        for part in self.system_info.split("|"):
            found = re.fullmatch(r"\s*(?:(\w+) : )?(\w+) = (.*?)\s*", part)
            if found is not None:
                section = found[1] or section
                if section == "CPU" and found[3] != "0":
                    names.append(found[2])
        return tuple(names)


class GpuTrace(Schema):
    """A GPU that the system shows at the path `where`, whether llama.cpp can use it or not. `kind`
    is the backend that would use it."""

    kind: DeviceKind
    where: str
    description: str = ""


def detect(devices: Sequence[Device | str] | None = None) -> Hardware:
    """Describe the machine. devices: those that llama.cpp reports, or only their names, as in
    `ModelInfo.device`. The CPU is always among the devices of the result."""
    uname = os.uname()
    processor = cpu.this_cpu()
    system, group = probe.system_memory(), cgroup.read()
    logical_cores = os.cpu_count() or 1
    return Hardware(
        machine=uname.machine,
        system=f"{uname.sysname} {uname.release}",
        cpu=processor.name or uname.machine,
        cpu_features=list(processor.features),
        logical_cores=logical_cores,
        physical_cores=processor.physical_cores or logical_cores,
        usable_cores=usable_cores(),
        usable_physical_cores=usable_physical_cores(),
        core_quota=group.cpu_quota_cores,
        memory_total_bytes=system.total_bytes,
        memory_available_bytes=system.available_bytes,
        memory_limit_bytes=group.memory_limit_bytes,
        devices=_with_cpu(devices or [], processor.name, system),
    )


def _with_cpu(
    given: Sequence[Device | str], cpu_name: str, system: probe.SystemMemory
) -> list[Device]:
    named = [
        Device(name=one, kind="other") if isinstance(one, str) else one
        for one in given
        if one != "cpu"
    ]
    devices = list({one.name: one for one in named}.values())
    if any(one.kind == "cpu" for one in devices):
        return devices
    own = Device(
        name="CPU",
        kind="cpu",
        description=cpu_name,
        total_bytes=system.total_bytes,
        free_bytes=system.available_bytes,
    )
    return [*devices, own]


def usable_cores(chosen: Collection[int] | None = None) -> int:
    """The logical cores that this process may use at once: its affinity, or the `chosen` part of
    it, capped by the quota of its control groups.

    Raises `InvalidRequestError` for cores that it may not use, or on a system that cannot choose.
    """
    usable = _affinity()
    if chosen is None:
        return _within_quota(len(usable))
    if not hasattr(os, "sched_setaffinity"):
        raise InvalidRequestError("cpu_affinity: this system does not let programs choose cores")
    if unknown := sorted(set(chosen) - usable):
        raise InvalidRequestError(
            f"cpu_affinity: this process may not use cores {unknown}; it may use {sorted(usable)}"
        )
    return _within_quota(len(set(chosen)))


def usable_physical_cores() -> int:
    """The physical cores that this process may use at once: two threads of one count once."""
    processor, affinity = cpu.this_cpu(), _affinity()
    if processor.cores:
        return _within_quota(cpu.count_cores(processor.cores, affinity))
    return _within_quota(min(processor.physical_cores or len(affinity), len(affinity)))


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _within_quota(cores: int) -> int:
    quota = cgroup.cpu_quota_cores()
    return max(1, cores if quota is None else min(cores, int(quota)))


def default_slots(cores: Collection[int] | None = None) -> int:
    """The number of requests that one model should answer at the same time on this machine, or on
    these of its cores. Raises like `usable_cores`."""
    return slots_for(usable_cores(cores), probe.available_bytes())


def slots_for(cores: int, available_bytes: int) -> int:
    """The slots for a machine, between 1 and 16: 4 for each core, and 256 MiB of memory for each.

    Total throughput grows up to about 4 slots for each core, while each slot gets slower.
    """
    return max(1, min(16, max(4, 4 * cores), available_bytes // _BYTES_PER_SLOT))


# -- GPUs that the system shows

_OF_VENDOR = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


def find_gpus(root: Path = Path("/"), platform: str = sys.platform) -> list[GpuTrace]:
    """The GPUs that Linux shows below `root`, or the GPU of an Apple computer."""
    if platform == "darwin":
        is_apple = os.uname().machine == "arm64"
        return [GpuTrace(kind="metal", where="macOS", description="Apple")] if is_apple else []
    found = [*_nvidia(root), *_amd(root)]
    drivers = {trace.kind for trace in found}
    for node in sorted((root / "dev/dri").glob("renderD*")):
        vendor = _OF_VENDOR.get(_line(root / "sys/class/drm" / node.name / "device/vendor"))
        driver = {"NVIDIA": "cuda", "AMD": "rocm"}.get(vendor or "")
        if vendor is not None and driver not in drivers:  # other cards only drive a display
            found.append(GpuTrace(kind="vulkan", where=str(node), description=vendor))
    return found


def _nvidia(root: Path) -> Iterator[GpuTrace]:
    driver = root / "proc/driver/nvidia"
    cards = sorted((driver / "gpus").glob("*/information"))
    for card in cards:
        model = re.search(r"^Model:\s*(.+?)\s*$", _text(card), re.MULTILINE)
        yield GpuTrace(
            kind="cuda", where=str(card.parent), description=model[1] if model else "NVIDIA"
        )
    if not cards:
        for node in sorted((root / "dev").glob("nvidia[0-9]*")):
            yield GpuTrace(kind="cuda", where=str(node), description="NVIDIA")


def _amd(root: Path) -> Iterator[GpuTrace]:
    if not (root / "dev/kfd").exists():
        return
    # The driver lists each CPU as a node as well, with the id 0.
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")):
        if _line(node) not in ("", "0"):
            yield GpuTrace(kind="rocm", where=str(node.parent), description="AMD")


def _line(path: Path) -> str:
    return _text(path).strip()


def _text(path: Path) -> str:
    """The text of a file; empty if it does not exist or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
