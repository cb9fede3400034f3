"""The report of `orion-oie hardware`: this machine, this build of llama.cpp, and advice.

Pure: the findings are arguments, and nothing is printed.
"""

from collections.abc import Iterator, Mapping, Sequence

from orion_oie.hardware.cpu import KNOWN_FEATURES
from orion_oie.hardware.machine import (
    GpuTrace,
    LlamaDevices,
)
from orion_oie.models.specs import Recommendation
from orion_oie.schemas.base import Schema
from orion_oie.schemas.stats import (
    Device,
    DeviceKind,
    Hardware,
)
from orion_oie.schemas.units import size_text

_REINSTALL = (
    'CMAKE_ARGS="{arguments}" python -m pip install --force-reinstall --no-deps --no-cache-dir '
    "--no-binary llama-cpp-python llama-cpp-python"
)

# By the kind of a GPU: its name in llama.cpp's build, the build argument, and the requirement.
_BUILDS: dict[DeviceKind, tuple[str, str, str]] = {
    "cuda": ("CUDA", "-DGGML_CUDA=on", "NVIDIA's CUDA toolkit"),
    "rocm": ("ROCm", "-DGGML_HIP=on", "AMD's ROCm"),
    "vulkan": ("Vulkan", "-DGGML_VULKAN=on", "the Vulkan SDK and a Vulkan driver"),
    "metal": ("Metal", "-DGGML_METAL=on", "Xcode's command line tools"),
}


class Suitability(Schema):
    """A recommendation of the registry; `is_suitable` when this machine has enough memory."""

    name: str
    description: str
    min_ram_gb: float
    models: list[str]
    is_suitable: bool


class CompatibilityReport(Schema):
    """The findings and the advice.

    unused_features: features of the CPU that llama.cpp was built without. missing_features:
    features that llama.cpp was built with and the CPU does not have. advice: sentences, or nothing
    when there is nothing to do.
    """

    hardware: Hardware
    llama: LlamaDevices
    gpus: list[GpuTrace]
    unused_features: list[str]
    missing_features: list[str]
    recommendations: list[Suitability]
    advice: list[str]


def compatibility(
    hardware: Hardware,
    llama: LlamaDevices,
    gpus: Sequence[GpuTrace],
    recommendations: Mapping[str, Recommendation],
) -> CompatibilityReport:
    """The report on a machine, the installed llama.cpp, and the GPUs that the system shows."""
    has, uses = hardware.cpu_features, llama.cpu_features
    unused = [name for name in has if uses and name not in uses]
    missing = [name for name in uses if has and name in KNOWN_FEATURES and name not in has]
    return CompatibilityReport(
        hardware=hardware,
        llama=llama,
        gpus=list(gpus),
        unused_features=unused,
        missing_features=missing,
        recommendations=[
            Suitability(
                **recommended.model_dump(),
                name=name,
                is_suitable=hardware.memory_total_bytes >= recommended.min_ram_gb * 1e9,
            )
            for name, recommended in recommendations.items()
        ],
        advice=[
            *_advice_on_llama(llama),
            *_advice_on_cpu(hardware, unused, missing),
            *_advice_on_gpus(llama, gpus),
        ],
    )


def _advice_on_llama(llama: LlamaDevices) -> Iterator[str]:
    if not llama.is_working:
        yield f"No model can be loaded before llama.cpp works. {_reinstall('-DGGML_NATIVE=on')}"


def _advice_on_cpu(hardware: Hardware, unused: list[str], missing: list[str]) -> Iterator[str]:
    native = _reinstall("-DGGML_NATIVE=on")
    if missing:
        yield (
            f"This llama.cpp was built for another CPU, with {_listed(missing)}: workers will end "
            f"with an illegal instruction. {native}"
        )
    elif unused:
        yield (
            f"The CPU offers {_listed(unused)}, but this llama.cpp is built without: it computes "
            f"slower than it could. {native}"
        )
    if hardware.core_quota is not None and hardware.core_quota < 1:
        yield (
            f"The container may use {hardware.core_quota:g} of a core: answers will come slowly "
            "and in bursts. Raise its CPU limit to at least 1."
        )


def _advice_on_gpus(llama: LlamaDevices, gpus: Sequence[GpuTrace]) -> Iterator[str]:
    if llama.can_offload or not llama.is_working:
        return
    for kind in dict.fromkeys(gpu.kind for gpu in gpus):
        name, argument, needs = _BUILDS[kind]
        found = next(gpu for gpu in gpus if gpu.kind == kind)
        here = f"A GPU is here ({found.description or name}, {found.where})"
        if kind not in llama.built_for:
            how = _reinstall(argument, needs)
            yield f"{here}, but this llama.cpp is built without {name}. {how}"
            continue
        hidden = ", and that CUDA_VISIBLE_DEVICES does not hide it" if kind == "cuda" else ""
        yield (
            f"{here}, and this llama.cpp is built with {name}, but does not see it. Check that its "
            f"driver works and that this user may open it{hidden}."
        )


def _reinstall(arguments: str, needs: str = "a C++ compiler") -> str:
    return f"Reinstall it (needs {needs}): {_REINSTALL.format(arguments=arguments)}"


# -- as text


def report_lines(report: CompatibilityReport) -> list[str]:
    """The report for people, as lines of plain text."""
    rows = [*_machine_rows(report.hardware), *_llama_rows(report)]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:{width}}{text}".rstrip() for name, text in rows]
    if report.recommendations:
        lines += ["", "models for this memory", *_recommended(report.recommendations)]
    lines += ["", "what to do"] if report.advice else ["", "nothing to do"]
    return lines + [f"  {number}. {text}" for number, text in enumerate(report.advice, 1)]


def _machine_rows(hardware: Hardware) -> Iterator[tuple[str, str]]:
    yield "system", f"{hardware.system}, {hardware.machine}"
    yield "CPU", hardware.cpu
    yield "cores", f"{hardware.physical_cores} physical, {hardware.logical_cores} logical"
    usable = f"{hardware.usable_physical_cores} physical, {hardware.usable_cores} logical"
    if hardware.core_quota is not None:
        usable += f" (the container's quota is {hardware.core_quota:g})"
    yield "usable cores", usable
    yield "features", " ".join(hardware.cpu_features) or "unknown"
    available = size_text(hardware.memory_available_bytes)
    yield "memory", f"{size_text(hardware.memory_total_bytes)}, {available} available"
    limit = hardware.memory_limit_bytes
    yield "container limit", "none" if limit is None else size_text(limit)


def _llama_rows(report: CompatibilityReport) -> Iterator[tuple[str, str]]:
    llama = report.llama
    if llama.problem:
        yield "llama.cpp", f"PROBLEM: {llama.problem}"
    if not llama.is_working:
        return
    yield "llama.cpp", f"llama-cpp-python {llama.version}"
    yield "built with", " ".join(llama.cpu_features) or "unknown"
    for label, names in (("unused", report.unused_features), ("missing", report.missing_features)):
        if names:
            yield label, " ".join(names)
    for device in llama.devices:
        yield "device", _device_text(device)
    yield "GPU offload", "yes" if llama.can_offload else "no"
    for gpu in report.gpus if not llama.can_offload else ():
        yield "GPU not used", f"{gpu.description} ({gpu.where})"


def _device_text(device: Device) -> str:
    parts = [f"{device.name} ({device.kind})", device.description]
    if device.kind != "cpu" and device.total_bytes is not None:  # the CPU's memory has its own row
        free = "" if device.free_bytes is None else f", {size_text(device.free_bytes)} free"
        parts.append(f"{size_text(device.total_bytes)}{free}")
    return ", ".join(part for part in parts if part)


def _recommended(recommendations: Sequence[Suitability]) -> Iterator[str]:
    width = max(len(one.name) for one in recommendations) + 2
    for one in recommendations:
        verdict = "yes" if one.is_suitable else f"no, needs {one.min_ram_gb:g} GB"
        yield f"  {one.name:{width}}{verdict:18}{', '.join(one.models)}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
