"""The report on a machine: what follows from what was found, and how it reads."""

from typing import Any

import pytest

from orion_oie.cli.compatibility import (
    CompatibilityReport,
    compatibility,
    report_lines,
)
from orion_oie.hardware.machine import (
    Device,
    GpuTrace,
    Hardware,
    LlamaDevices,
)
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import Recommendation

GB = 10**9
CPU = Device(name="CPU", kind="cpu", description="A CPU", total_bytes=8 * GB, free_bytes=8 * GB)
CUDA = Device(
    name="CUDA0", kind="cuda", description="A GPU", total_bytes=80 * GB, free_bytes=79 * GB
)
H100 = GpuTrace(kind="cuda", where="/proc/driver/nvidia/gpus/0", description="NVIDIA H100")
RECOMMENDATIONS = {
    "small": Recommendation(description="Any.", min_ram_gb=0, models=["a"]),
    "large": Recommendation(description="Workstations.", min_ram_gb=16, models=["b", "c"]),
}


def hardware(**facts: Any) -> Hardware:
    found: dict[str, Any] = {
        "machine": "x86_64",
        "system": "Linux 6",
        "cpu": "A CPU",
        "cpu_features": ["AVX", "AVX2"],
        "logical_cores": 8,
        "physical_cores": 4,
        "usable_cores": 8,
        "usable_physical_cores": 4,
        "memory_total_bytes": 8 * GB,
        "memory_available_bytes": 6 * GB,
        "devices": [CPU],
    }
    return Hardware(**{**found, **facts})


def llama(**facts: Any) -> LlamaDevices:
    found: dict[str, Any] = {
        "version": "0.3.36",
        "built_for": ["cpu"],
        "devices": [CPU],
        "system_info": "CPU : AVX = 1 | AVX2 = 1 | OPENMP = 1 | ",
    }
    return LlamaDevices(**{**found, **facts})


def report(
    machine: Hardware | None = None, build: LlamaDevices | None = None, *gpus: GpuTrace
) -> CompatibilityReport:
    return compatibility(machine or hardware(), build or llama(), gpus, RECOMMENDATIONS)


def row(found: CompatibilityReport, name: str) -> str:
    """What stands behind a name in the text; the names are as wide as the widest."""
    (line,) = (line for line in report_lines(found) if line.startswith(f"{name}  "))
    return line[len(name) :].strip()


def test_a_machine_where_all_is_well() -> None:
    """There is nothing to do, and every row stands in its place."""
    found = report()
    assert found.advice == []
    assert (found.unused_features, found.missing_features) == ([], [])
    assert report_lines(found) == [
        "system           Linux 6, x86_64",
        "CPU              A CPU",
        "cores            4 physical, 8 logical",
        "usable cores     4 physical, 8 logical",
        "features         AVX AVX2",
        "memory           8.00 GB, 6.00 GB available",
        "container limit  none",
        "llama.cpp        llama-cpp-python 0.3.36",
        "built with       AVX AVX2 OPENMP",
        "device           CPU (cpu), A CPU",
        "GPU offload      no",
        "",
        "models for this memory",
        "  small  yes               a",
        "  large  no, needs 16 GB   b, c",
        "",
        "nothing to do",
    ]


def test_it_goes_through_json() -> None:
    """The report is data: written and read again it is the same."""
    found = report(hardware(core_quota=1.5), llama(), H100)
    assert CompatibilityReport.model_validate_json(found.model_dump_json()) == found


def test_the_limits_of_a_container() -> None:
    """Quota and limit are named; less than a core is worth a word."""
    found = report(hardware(core_quota=1.5, usable_cores=1, memory_limit_bytes=2 * GB))
    assert row(found, "usable cores") == "4 physical, 1 logical (the container's quota is 1.5)"
    assert row(found, "container limit") == "2.00 GB"
    assert found.advice == []
    (advice,) = report(hardware(core_quota=0.5)).advice
    assert advice.startswith("The container may use 0.5 of a core: ")


# -- instructions


def test_what_the_build_does_not_use() -> None:
    """The CPU's features that llama.cpp was built without are named, with the command."""
    found = report(hardware(cpu_features=["AVX", "AVX2", "FMA", "AVX512"]))
    assert found.unused_features == ["FMA", "AVX512"]
    assert found.missing_features == []
    assert row(found, "unused") == "FMA AVX512"
    (advice,) = found.advice
    assert advice.startswith("The CPU offers FMA and AVX512, but this llama.cpp is built without")
    assert 'CMAKE_ARGS="-DGGML_NATIVE=on" python -m pip install' in advice


def test_what_the_cpu_does_not_have() -> None:
    """A build for another CPU will crash; what is no instruction is not missed."""
    found = report(hardware(cpu_features=["AVX", "FMA"]))
    assert found.missing_features == ["AVX2"]
    assert row(found, "missing") == "AVX2"
    (advice,) = found.advice
    assert advice.startswith("This llama.cpp was built for another CPU, with AVX2: ")


@pytest.mark.parametrize(
    ("machine", "build"),
    [
        (hardware(cpu_features=[]), llama()),
        (hardware(), llama(system_info="")),
    ],
    ids=["of the CPU", "of the build"],
)
def test_where_features_are_unknown(machine: Hardware, build: LlamaDevices) -> None:
    """Nothing is concluded from what is not known."""
    found = report(machine, build)
    assert (found.unused_features, found.missing_features, found.advice) == ([], [], [])
    assert "unknown" in (row(found, "features"), row(found, "built with"))


# -- GPUs


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (H100, "without CUDA. Reinstall it (needs NVIDIA's CUDA toolkit): "),
        (GpuTrace(kind="rocm", where="/sys"), "without ROCm. Reinstall it (needs AMD's ROCm): "),
        (GpuTrace(kind="vulkan", where="/dev"), "without Vulkan. Reinstall it (needs the Vulkan"),
        (GpuTrace(kind="metal", where="macOS"), "without Metal. Reinstall it (needs Xcode's"),
    ],
)
def test_a_gpu_that_the_build_cannot_use(gpu: GpuTrace, words: str) -> None:
    """It says how to build llama.cpp for it, once for each kind."""
    found = report(None, None, gpu, gpu)
    (advice,) = found.advice
    assert advice.startswith("A GPU is here (")
    assert words in advice
    argument = {"cuda": "CUDA", "rocm": "HIP", "vulkan": "VULKAN", "metal": "METAL"}[gpu.kind]
    assert f'CMAKE_ARGS="-DGGML_{argument}=on" python -m pip install' in advice
    lines = report_lines(found)
    assert sum(line.startswith("GPU not used") for line in lines) == 2
    assert lines[-2:] == ["what to do", f"  1. {advice}"]


def test_a_gpu_that_is_hidden() -> None:
    """A build that could use it does not have to be replaced."""
    found = report(None, llama(built_for=["cuda", "cpu"]), H100)
    (advice,) = found.advice
    assert "is built with CUDA, but does not see it" in advice
    assert "CUDA_VISIBLE_DEVICES" in advice
    assert "pip" not in advice


def test_a_gpu_that_is_used() -> None:
    """With offload there is nothing to do, and the device shows its memory."""
    build = llama(built_for=["cuda", "cpu"], devices=[CUDA, CPU], can_offload=True)
    found = report(None, build, H100)
    assert found.advice == []
    assert row(found, "GPU offload") == "yes"
    lines = [line for line in report_lines(found) if line.startswith("device")]
    assert lines[0].endswith("CUDA0 (cuda), A GPU, 80.00 GB, 79.00 GB free")
    assert not any(line.startswith("GPU not used") for line in report_lines(found))


# -- a llama.cpp that does not work


def test_llama_that_does_not_work() -> None:
    """Its problem is shown, nothing is said of devices, and it comes first of what to do."""
    broken = LlamaDevices(problem="llama.cpp was ended by SIGILL: it said nothing")
    found = report(hardware(core_quota=0.5), broken, H100)
    assert row(found, "llama.cpp") == "PROBLEM: llama.cpp was ended by SIGILL: it said nothing"
    assert not any(line.startswith(("device", "GPU")) for line in report_lines(found))
    assert len(found.advice) == 2
    assert found.advice[0].startswith("No model can be loaded before llama.cpp works. Reinstall")
    assert [line[:5] for line in report_lines(found)[-2:]] == ["  1. ", "  2. "]


def test_a_problem_on_the_way() -> None:
    """A llama.cpp that works but does not name its devices has both: a problem and a version."""
    found = report(None, llama(problem="it does not name its devices", devices=[]))
    lines = [line for line in report_lines(found) if line.startswith("llama.cpp")]
    assert [line.split()[1] for line in lines] == ["PROBLEM:", "llama-cpp-python"]
    assert found.advice == []


# -- recommendations


def test_recommendations_follow_the_memory() -> None:
    """Those of the packaged registry: the more memory, the more suit, the smallest always."""
    of_registry = ModelRegistry.packaged().data.recommendations
    assert of_registry

    def suitable(memory_gb: int) -> set[str]:
        machine = hardware(memory_total_bytes=memory_gb * GB)
        found = compatibility(machine, llama(), [], of_registry)
        assert [one.name for one in found.recommendations] == list(of_registry)
        return {one.name for one in found.recommendations if one.is_suitable}

    assert suitable(1) < suitable(8) < suitable(16) < suitable(64) == set(of_registry)
    assert suitable(1) == {"minimal"}


def test_a_registry_without_recommendations() -> None:
    """Then there is no list of models."""
    found = compatibility(hardware(), llama(), [], {})
    assert "models for this memory" not in report_lines(found)
