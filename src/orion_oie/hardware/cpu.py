"""The processor: its name, the instructions that llama.cpp has kernels for, its physical cores.

Describes the hardware only: `machine` knows the part that this process may use, and llama.cpp
itself reports the instructions that its build uses.
"""

import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")
_SYSCTL = "/usr/sbin/sysctl"
_SYSCTL_TIMEOUT_S = 5.0

# llama.cpp's name of a feature -> the flags that it needs, all of them, as Linux writes them.
_X86 = {
    "SSE3": {"pni"},
    "SSSE3": {"ssse3"},
    "AVX": {"avx"},
    "AVX_VNNI": {"avx_vnni"},
    "AVX2": {"avx2"},
    "F16C": {"f16c"},
    "FMA": {"fma"},
    "BMI2": {"bmi2"},
    "AVX512": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "AVX512_VBMI": {"avx512vbmi"},
    "AVX512_VNNI": {"avx512_vnni"},
    "AVX512_BF16": {"avx512_bf16"},
    "AMX_INT8": {"amx_tile", "amx_int8"},
}
_ARM = {
    "NEON": {"asimd"},
    "ARM_FMA": {"asimd"},
    "FP16_VA": {"asimdhp"},
    "DOTPROD": {"asimddp"},
    "MATMUL_INT8": {"i8mm"},
    "SVE": {"sve"},
}

KNOWN_FEATURES = frozenset(_X86 | _ARM)
"""All features that a `Cpu` can have, by llama.cpp's names."""

# macOS's name of a flag -> Linux's name.
_OF_MACOS = {
    "sse3": "pni",
    "avx1.0": "avx",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "advsimd": "asimd",
    "neon": "asimd",
    "feat_fp16": "asimdhp",
    "neon_fp16": "asimdhp",
    "feat_dotprod": "asimddp",
    "feat_i8mm": "i8mm",
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor.

    name: may be empty. features: by llama.cpp's names; empty for a processor that is neither x86
    nor 64-bit ARM. physical_cores: None if the system does not report them. cores: the numbers of
    the logical processors of each physical core; empty if the system does not report them.
    """

    name: str = ""
    features: tuple[str, ...] = ()
    physical_cores: int | None = None
    cores: tuple[frozenset[int], ...] = ()


@cache
def this_cpu() -> Cpu:
    """The processor of this machine."""
    if sys.platform == "darwin":
        return parse_sysctl(_sysctl())
    cores = read_cores()
    try:
        found = parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = Cpu()
    return Cpu(found.name, found.features, len(cores) or None, cores)


def parse_cpuinfo(text: str) -> Cpu:
    """Parse /proc/cpuinfo. If processors differ, only the features that all of them have count."""
    facts: dict[str, str] = {}
    flags: set[str] | None = None
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        facts.setdefault(key, value)
        if key in ("flags", "Features"):
            flags = set(value.split()) if flags is None else flags & set(value.split())
    name = facts.get("model name", "")
    if not name and "CPU part" in facts:
        name = f"ARM, implementer {facts.get('CPU implementer', '?')}, part {facts['CPU part']}"
    return Cpu(name, _features(flags or ()))


def parse_sysctl(text: str) -> Cpu:
    """Parse the lines that macOS prints for `sysctl machdep.cpu hw`."""
    facts = dict(re.findall(r"^([\w.]+): (.*)$", text, re.MULTILINE))
    flags = " ".join(
        [facts.get("machdep.cpu.features", ""), facts.get("machdep.cpu.leaf7_features", "")]
    ).split()
    flags += [k.rpartition(".")[2] for k, v in facts.items() if "optional" in k and v == "1"]
    small = {flag.lower() for flag in flags}
    cores = facts.get("hw.physicalcpu", "")
    return Cpu(
        name=facts.get("machdep.cpu.brand_string", ""),
        features=_features({_OF_MACOS.get(flag, flag) for flag in small}),
        physical_cores=int(cores) if cores.isdecimal() else None,
    )


def read_cores(root: Path = _TOPOLOGY) -> tuple[frozenset[int], ...]:
    """The numbers of the logical processors of each physical core; empty if Linux reports none."""
    cores = set()
    for file in root.glob("cpu[0-9]*/topology/thread_siblings_list"):
        try:
            cores.add(frozenset(_numbers(file.read_text(encoding="ascii"))))
        except (OSError, ValueError):
            return ()  # a partial list would give a wrong number of cores
    return tuple(sorted(cores, key=min))


def count_cores(cores: Iterable[frozenset[int]], usable: Collection[int]) -> int:
    """The number of physical cores with a logical processor among the usable ones."""
    return sum(not core.isdisjoint(usable) for core in cores)


def _features(flags: Collection[str]) -> tuple[str, ...]:
    has = set(flags)
    return tuple(name for name, needed in (_X86 | _ARM).items() if needed <= has)


def _numbers(text: str) -> list[int]:
    """The numbers in a list as Linux writes it: "0-1,64". Raises `ValueError`."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _sysctl() -> str:
    """The output of macOS's `sysctl` about the processor; empty if it cannot be run."""
    import subprocess  # not needed on other systems

    command = [_SYSCTL, "machdep.cpu", "hw.physicalcpu", "hw.optional"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SYSCTL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
