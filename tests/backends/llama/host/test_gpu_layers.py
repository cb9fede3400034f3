"""Layers go to a GPU as far as they fit, and what fails there goes on on the CPU. Without a GPU."""

from pathlib import Path
from typing import Any

import pytest
from contracts import INFO, job, said

from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.backends.llama.host import loader
from orion_oie.backends.llama.host.client import LlamaModel
from orion_oie.backends.llama.host.gpu_layers import layers_for
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.backends.llama.protocol import LoadCommand
from orion_oie.cancellation import CancelScope
from orion_oie.errors import ModelCorruptError, WorkerCrashedError
from orion_oie.hardware.machine import (
    Device,
    LlamaDevices,
)
from orion_oie.models.formats.gguf import read_header

GIB = 1 << 30
FOOTPRINT = Footprint(weights_bytes=0, kv_bytes=2 << 20, compute_bytes=1 << 20, process_bytes=0)


def devices(*free_bytes: int | None) -> LlamaDevices:
    gpus = [
        Device(name=f"CUDA{n}", kind="cuda", total_bytes=8 * GIB, free_bytes=free)
        for n, free in enumerate(free_bytes)
    ]
    cpu = Device(name="CPU", kind="cpu", total_bytes=64 * GIB, free_bytes=64 * GIB)
    return LlamaDevices(version="1", devices=[cpu, *gpus], can_offload=bool(gpus))


def test_all_layers_fit_on_a_large_gpu(tiny_model: Path) -> None:
    """Two blocks and the output are three layers."""
    plan = layers_for([read_header(tiny_model)], FOOTPRINT, devices(7 * GIB))
    assert plan.layers == 3
    assert plan.needed_bytes > 0


def test_nothing_goes_where_nothing_is_free(tiny_model: Path) -> None:
    """A full GPU gets no layer, and the reason says so; nor does one that says nothing."""
    headers = [read_header(tiny_model)]
    assert layers_for(headers, FOOTPRINT, devices(GIB // 4)).layers == 0
    silent = layers_for(headers, FOOTPRINT, devices(None))
    assert silent.layers == 0
    assert "CUDA0 does not say" in silent.reason
    assert "no GPU" in layers_for(headers, FOOTPRINT, devices()).reason


def test_a_twentieth_of_each_gpu_stays_free(tiny_model: Path) -> None:
    """What is kept is kept on each."""
    headers = [read_header(tiny_model)]
    needed = layers_for(headers, FOOTPRINT, devices(7 * GIB)).needed_bytes
    kept = int(0.05 * 8 * GIB)
    assert layers_for(headers, FOOTPRINT, devices(kept + needed)).layers == 3
    assert layers_for(headers, FOOTPRINT, devices(kept + needed - 1)).layers == 2


@pytest.mark.parametrize(
    "failure", [ModelCorruptError("no memory on the device"), WorkerCrashedError("died by SIGSEGV")]
)
def test_a_gpu_that_fails_is_left_for_the_cpu(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """A load that fails with layers on the GPU is done again on the CPU, with a warning that says
    why; the model answers."""
    load, asked = LlamaModel.load, []

    def failing(model: LlamaModel, headers: Any, command: LoadCommand, *rest: Any) -> None:
        asked.append(command.gpu_layers)
        if command.gpu_layers:
            model.close(0.0)
            raise failure
        load(model, headers, command, *rest)

    monkeypatch.setattr(LlamaModel, "device", lambda *_: "gpu")
    monkeypatch.setattr(LlamaModel, "load", failing)
    monkeypatch.setattr(loader, "probe_devices", lambda **_: devices(7 * GIB))
    told: list[tuple[str, str]] = []
    backend = LlamaBackend(on_log=lambda level, line, _model: told.append((level, line)))
    model = backend.load(LoadSpec(INFO, (tiny_model,)), CancelScope(), lambda _progress: None)
    try:
        assert asked == [3, 0]
        assert [level for level, _ in told] == ["warning"]
        assert "the GPU could not be used" in told[0][1]
        assert str(failure) in model.load_progress.note
        assert model.info.device == "cpu"
        assert said(model, job("Hello?", max_tokens=4))
    finally:
        model.close()


def test_who_wants_no_gpu_gets_none(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `gpu_layers=0` nobody is asked for devices, and an error of the load is final."""
    monkeypatch.setattr(LlamaModel, "device", lambda *_: "gpu")
    monkeypatch.setattr(loader, "probe_devices", lambda **_: pytest.fail("asked for devices"))
    spec = LoadSpec(INFO, (tiny_model,), gpu_layers=0)
    model = LlamaBackend().load(spec, CancelScope(), lambda _progress: None)
    assert model.info.device == "cpu"
    model.close()
