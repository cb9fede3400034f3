"""What this machine offers: the cores that may be used. What llama.cpp itself can use is
reported by each worker in `ModelInfo.device`.
"""

import os
from pathlib import Path

from orion_oie import memory
from orion_oie.schemas import Schema

_BYTES_PER_SLOT = 256 * 2**20
_CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class Hardware(Schema):
    """The machine as the engine sees it. `usable_cores` honours affinity and cgroup quota."""

    machine: str
    system: str
    logical_cores: int
    usable_cores: int
    devices: list[str] = ["cpu"]


def detect(devices: list[str] | None = None) -> Hardware:
    """The machine, with the devices that loaded models run on."""
    uname = os.uname()
    return Hardware(
        machine=uname.machine,
        system=f"{uname.sysname} {uname.release}",
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        devices=sorted({"cpu", *(devices or [])}),
    )


def usable_cores() -> int:
    """Cores that this process may use at once: its affinity, capped by a cgroup v2 quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, int(quota) if quota else cores))


def default_slots() -> int:
    """How many requests one loaded model should answer at the same time here."""
    return slots_for(usable_cores(), memory.available_bytes())


def slots_for(cores: int, available_bytes: int) -> int:
    """Slots for a machine: what all of them say in a second grows up to about 4 for each core,
    and what each of them says shrinks with every one. Between 1 and 16, with 256 MiB for each."""
    return max(1, min(16, max(4, 4 * cores), available_bytes // _BYTES_PER_SLOT))


def _cgroup_quota() -> float | None:
    try:
        limit, period = _CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)
