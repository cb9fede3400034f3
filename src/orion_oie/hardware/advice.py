"""Advice on memory pressure, in plain sentences with numbers. Pure: it takes no action."""

from collections.abc import Iterable

from orion_oie.hardware.pressure import PressureLevel
from orion_oie.hardware.probe import ProcessMemory
from orion_oie.hardware.sample import MemorySample
from orion_oie.schemas.units import in_gib

_NAMED = 3  # a longer list of models would not help anybody


def advise(sample: MemorySample, idle: Iterable[str] = ()) -> list[str]:
    """Sentences for people, the most important first; none if pressure is low.

    idle: the keys of models that are not in use; keys without a worker are ignored.
    """
    level, system = sample.level, sample.system
    if level is PressureLevel.LOW:
        return []
    share = system.available_bytes / system.total_bytes
    lines = [
        f"Memory pressure is {level}: {in_gib(system.available_bytes)} of "
        f"{in_gib(system.total_bytes)} are available ({share:.0%})."
    ]
    if system.limited_by == "cgroup":
        lines.append(
            f"The container's limit of {in_gib(system.total_bytes)} is what runs short, not the "
            "machine: raise the limit, or keep fewer models in memory."
        )
    if level is PressureLevel.CRITICAL:
        lines.append("Load nothing now: the system may end processes to make room.")
    if level >= PressureLevel.HIGH:
        lines.extend(_about_models(sample, set(idle)))
    return lines


def _about_models(sample: MemorySample, idle: set[str]) -> list[str]:
    sizes = {key: _given_back(memory) for key, memory in sample.workers.items()}
    largest = sorted(sizes, key=lambda key: (-sizes[key], key))
    unused = [key for key in largest if key in idle][:_NAMED]
    lines = []
    if unused:
        names = ", ".join(f"{key} ({in_gib(sizes[key])})" for key in unused)
        total = in_gib(sum(sizes[key] for key in unused))
        lines.append(f"Unload what nobody uses: {names}. That gives {total} back.")
    elif largest:
        lines.append(
            f"No loaded model is known to be idle. The largest of {len(largest)} is {largest[0]} "
            f"({in_gib(sizes[largest[0]])}): a smaller variant of it takes less."
        )
    else:
        lines.append("No model is loaded: what is short is used elsewhere.")
    host_bytes, workers_bytes = _given_back(sample.host), sum(sizes.values())
    if host_bytes > workers_bytes:
        lines.append(
            f"This process itself holds {in_gib(host_bytes)}, more than all of its workers "
            f"({in_gib(workers_bytes)})."
        )
    return lines


def _given_back(memory: ProcessMemory) -> int:
    """The bytes that become available when the process ends; file pages are available already."""
    return memory.private_bytes + memory.shared_bytes
