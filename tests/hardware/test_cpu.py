"""The processor: what Linux and macOS say of it is understood, and cores are counted once."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orion_oie.hardware.cpu import (
    KNOWN_FEATURES,
    Cpu,
    count_cores,
    parse_cpuinfo,
    parse_sysctl,
    read_cores,
    this_cpu,
)

X86 = """\
processor\t: 0
model name\t: Some CPU @ 3.00GHz
flags\t\t: fpu sse sse2 pni ssse3 fma avx f16c avx2 bmi2 avx512f avx512cd {more}

processor\t: 1
model name\t: Some CPU @ 3.00GHz
flags\t\t: fpu sse sse2 pni ssse3 fma avx f16c avx2 bmi2 avx512f avx512cd {more}
"""
PLAIN = ("SSE3", "SSSE3", "AVX", "AVX2", "F16C", "FMA", "BMI2")

# Two big cores and a small one, which lacks SVE.
ARM = """\
processor\t: 0
Features\t: fp asimd aes asimdhp asimddp sve i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd4f

processor\t: 1
Features\t: fp asimd aes asimdhp asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05
"""

INTEL_MAC = """\
machdep.cpu.brand_string: Intel(R) Core(TM) i5
machdep.cpu.features: FPU SSE SSE2 SSE3 SSSE3 FMA AVX1.0 F16C
machdep.cpu.leaf7_features: BMI1 AVX2 BMI2
hw.physicalcpu: 4
hw.optional.avx512f: 0
"""
APPLE = """\
machdep.cpu.brand_string: Apple M2
hw.physicalcpu: 8
hw.optional.arm.AdvSIMD: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""


def write_cores(root: Path, *siblings: str) -> Path:
    """A tree like /sys/devices/system/cpu, with the list of siblings of each logical processor."""
    for number, text in enumerate(siblings):
        folder = root / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    (root / "cpufreq").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("more", "features"),
    [
        ("", PLAIN),
        ("avx512bw avx512dq", PLAIN),  # not all that llama.cpp's kernels need
        ("avx512bw avx512dq avx512vl", (*PLAIN, "AVX512")),
        (
            "avx512bw avx512dq avx512vl avx512vbmi avx512_vnni avx512_bf16 amx_tile amx_int8",
            (*PLAIN, "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8"),
        ),
        ("amx_int8", PLAIN),
        ("avx_vnni", ("SSE3", "SSSE3", "AVX", "AVX_VNNI", "AVX2", "F16C", "FMA", "BMI2")),
    ],
)
def test_linux_on_x86(more: str, features: tuple[str, ...]) -> None:
    """Features come under llama.cpp's names, and only with all the flags that they need."""
    assert parse_cpuinfo(X86.format(more=more)) == Cpu("Some CPU @ 3.00GHz", features)


def test_linux_on_arm() -> None:
    """Of different cores, what all have counts; a processor without a name gets its numbers."""
    found = parse_cpuinfo(ARM)
    assert found.name == "ARM, implementer 0x41, part 0xd4f"
    assert found.features == ("NEON", "ARM_FMA", "FP16_VA", "DOTPROD")
    assert parse_cpuinfo(ARM.partition("\n\n")[0]).features[-2:] == ("MATMUL_INT8", "SVE")


def test_macos() -> None:
    """Both kinds of Apple computers."""
    assert parse_sysctl(INTEL_MAC) == Cpu("Intel(R) Core(TM) i5", PLAIN, 4)
    features = ("NEON", "ARM_FMA", "FP16_VA", "DOTPROD", "MATMUL_INT8")
    assert parse_sysctl(APPLE) == Cpu("Apple M2", features, 8)


@given(text=st.text())
def test_any_other_text_says_nothing(text: str) -> None:
    """No text is an error, and no feature comes from nowhere."""
    for parse in (parse_cpuinfo, parse_sysctl):
        assert set(parse(text).features) <= KNOWN_FEATURES
    assert parse_cpuinfo("") == parse_sysctl("") == Cpu()


@pytest.mark.parametrize(
    ("siblings", "cores"),
    [
        (["0", "1"], [{0}, {1}]),
        (["0,2", "1,3", "0,2", "1,3"], [{0, 2}, {1, 3}]),
        (["0-1", "0-1", "2"], [{0, 1}, {2}]),
        (["0-1,4-5", "0-1,4-5"], [{0, 1, 4, 5}]),
        (["0", "nonsense"], []),
        ([], []),
    ],
)
def test_threads_of_one_core(tmp_path: Path, siblings: list[str], cores: list[set[int]]) -> None:
    """Logical processors are grouped by core; what cannot be read makes all unknown."""
    found = read_cores(write_cores(tmp_path, *siblings))
    assert found == tuple(frozenset(core) for core in cores)


def test_only_cores_that_may_be_used_count() -> None:
    """One thread of a core is enough for it to count, and two count once."""
    cores = [frozenset({0, 4}), frozenset({1, 5}), frozenset({2, 6})]
    assert count_cores(cores, {0, 1, 2, 4, 5, 6}) == 3
    assert count_cores(cores, {0, 4}) == 1
    assert count_cores(cores, {0, 5}) == 2
    assert count_cores(cores, {7}) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
def test_this_machine() -> None:
    """The description of this machine agrees with what the system reports elsewhere."""
    found = this_cpu()
    assert this_cpu() is found
    online = os.cpu_count() or 1
    if found.cores:
        assert found.physical_cores == len(found.cores)
        assert sum(map(len, found.cores)) == online
    assert set(found.features) <= KNOWN_FEATURES
