"""Computing while weights arrive: nothing is computed with what is not here."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import Running, wait_until
from tiny import write_tiny_llama

from orion_oie.backends.llama.worker import gate as gate_module
from orion_oie.backends.llama.worker.gate import Gate
from orion_oie.backends.llama.worker.native import (
    DECODE_ABORTED,
    DECODE_OK,
    AbortFlag,
    NativeModel,
    Row,
    capture_logs,
)
from orion_oie.errors import ModelError
from orion_oie.models.downloads.arrival import (
    ArrivalMap,
    ArrivalState,
)
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    read_header,
)

ROWS: list[Row] = [(token, index, 0, index == 19) for index, token in enumerate(range(20, 40))]


class Arrival:
    """A model's file that arrives piece by piece, as a test says."""

    def __init__(self, whole: Path, folder: Path) -> None:
        self.path = folder / "arriving.gguf"
        self.header: GGUFHeader = read_header(whole)
        self._content = whole.read_bytes()
        self.map = ArrivalMap.create(folder / "map", len(self._content), {}, block_bytes=4096)
        self.path.write_bytes(bytes(len(self._content)))
        self.bring(0, self.header.data_offset)

    def bring(self, start: int, end: int) -> None:
        """Let bytes arrive, and the rest of their blocks."""
        with self.path.open("r+b") as file:
            for block in range(start // 4096, -(-end // 4096)):
                first, last = self.map.bounds(block)
                file.seek(first)
                file.write(self._content[first:last])
                file.flush()
                self.map.mark(block)

    def bring_all(self) -> None:
        self.bring(0, len(self._content))

    def place(self, name: str) -> tuple[int, int]:
        (tensor,) = (tensor for tensor in self.header.tensors if tensor.name == name)
        return tensor.offset, tensor.offset + tensor.n_bytes


@pytest.fixture(scope="module", autouse=True)
def silence() -> None:
    capture_logs(lambda _level, _line: None)


@pytest.fixture(scope="module", params=["F16", "Q4_0", "Q8_0"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose weights llama.cpp uses as they lie in the file, and that it rearranges."""
    path = tmp_path_factory.mktemp("gate") / f"{request.param}.gguf"
    return write_tiny_llama(
        path, weights=request.param, layers=3, width=256, ffn=512, context_length=512
    )


@pytest.fixture
def arrival(whole: Path, tmp_path: Path) -> Arrival:
    return Arrival(whole, tmp_path)


@pytest.fixture
def abort() -> AbortFlag:
    return AbortFlag()


@pytest.fixture
def model(arrival: Arrival, abort: AbortFlag) -> Iterator[NativeModel]:
    """The model, loaded before any of its weights is here."""
    gate = Gate([arrival.path], [arrival.map], abort)
    model = loaded(arrival.path, abort, gate)
    yield model
    arrival.map.state = ArrivalState.FAILED  # lets everything that still waits go
    wait_until(lambda: not any(t.name == "weights" for t in threading.enumerate()))


def loaded(path: Path, abort: AbortFlag, gate: Gate | None = None) -> NativeModel:
    return NativeModel(
        [path],
        slots=2,
        context_length=256,
        threads=2,
        abort=abort,
        on_progress=lambda _fraction: None,
        gate=gate,
    )


def logits_of(model: NativeModel) -> np.ndarray:
    assert model.decode(ROWS) == DECODE_OK
    return model.logits(1)[0].copy()


def test_the_layout_of_tensors_is_known() -> None:
    """This build of llama.cpp keeps sources and names where the gate looks for them."""
    assert Gate.is_supported()


def test_it_computes_what_the_whole_model_computes(
    whole: Path, arrival: Arrival, model: NativeModel
) -> None:
    """Tensors that arrive in any order, while it computes, give the logits of a loaded model."""
    running = Running(logits_of, model)
    for tensor in sorted(arrival.header.tensors, key=lambda t: hash(t.name)):
        arrival.bring(tensor.offset, tensor.offset + tensor.n_bytes)
    arrival.bring_all()
    arrival.map.state = ArrivalState.COMPLETE
    expected = logits_of(loaded(whole, AbortFlag()))
    assert np.array_equal(running.join(), expected)
    assert not model.is_arriving


@pytest.mark.parametrize(
    "last", ["token_embd.weight", "blk.1.attn_v.weight", "blk.2.ffn_down.weight", "output.weight"]
)
def test_one_missing_weight_holds_it_up(
    last: str, whole: Path, arrival: Arrival, model: NativeModel
) -> None:
    """Whichever weight comes last, nothing comes out before it is here."""
    start, end = arrival.place(last)
    first_block, last_block = start // 4096, (end - 1) // 4096
    arrival.bring(0, first_block * 4096)
    arrival.bring((last_block + 1) * 4096, arrival.map.size)
    running = Running(logits_of, model)
    assert not running.ends_within(0.2)
    arrival.bring(start, end)
    arrival.map.state = ArrivalState.COMPLETE
    assert np.array_equal(running.join(), logits_of(loaded(whole, AbortFlag())))


def test_nothing_comes_out_before_it_is_checked(arrival: Arrival, model: NativeModel) -> None:
    """Although all bytes are here, the result waits for the word that they are right."""
    arrival.bring_all()
    running = Running(model.decode, ROWS)
    assert not running.ends_within(0.2)
    arrival.map.state = ArrivalState.COMPLETE
    assert running.join() == DECODE_OK


def test_an_abort_ends_the_wait(arrival: Arrival, model: NativeModel, abort: AbortFlag) -> None:
    """A computation that waits can be aborted, and begun again."""
    running = Running(model.decode, ROWS)
    assert not running.ends_within(0.05)
    abort.raise_()
    assert running.join() == DECODE_ABORTED
    abort.lower()
    model.clear()
    arrival.bring_all()
    arrival.map.state = ArrivalState.COMPLETE
    assert model.decode(ROWS) == DECODE_OK


def test_a_failed_download_ends_the_wait(arrival: Arrival, model: NativeModel) -> None:
    """When nobody goes on fetching, the computation does not wait for ever."""
    running = Running(model.decode, ROWS)
    running.ends_within(0.05)
    arrival.map.state = ArrivalState.FAILED
    assert running.join() == DECODE_ABORTED


def test_the_context_after_it_says_the_same(
    whole: Path, arrival: Arrival, model: NativeModel
) -> None:
    """The weights stay; a context without a gate computes with them what a loaded model does."""
    arrival.bring_all()
    arrival.map.state = ArrivalState.COMPLETE
    assert model.decode(ROWS) == DECODE_OK
    after = model.without_gate()
    model.close_context()
    assert after.context_length == 256
    assert np.array_equal(logits_of(after), logits_of(loaded(whole, AbortFlag())))


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have each weight take `seconds` to be set: only ggml's own functions, as the gate calls them,
    lie between the bytes and the tensor."""
    ggml = gate_module._ggml()

    class Slow:
        ggml_backend_buffer_name = ggml.ggml_backend_buffer_name

        @staticmethod
        def ggml_backend_tensor_set(*arguments: object) -> None:
            time.sleep(seconds)
            ggml.ggml_backend_tensor_set(*arguments)

    monkeypatch.setattr(gate_module, "_ggml", Slow)


def test_the_context_after_it_waits_for_every_weight(
    whole: Path, arrival: Arrival, model: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when nobody has computed anything before: weights that are still being set are awaited,
    however slow that is."""
    slow_down(monkeypatch, 0.02)
    arrival.bring_all()
    arrival.map.state = ArrivalState.COMPLETE
    after = model.without_gate()
    assert not model.is_arriving
    assert np.array_equal(logits_of(after), logits_of(loaded(whole, AbortFlag())))


def test_what_failed_once_is_not_believed(arrival: Arrival, model: NativeModel) -> None:
    """A download that goes on after its failure does not bring back what was computed meanwhile."""
    running = Running(model.decode, ROWS)
    running.ends_within(0.05)
    arrival.map.state = ArrivalState.FAILED
    assert running.join() == DECODE_ABORTED
    model.clear()
    arrival.bring_all()
    arrival.map.state = ArrivalState.COMPLETE
    assert model.decode(ROWS) == DECODE_ABORTED
    with pytest.raises(ModelError, match="ended before"):
        model.without_gate()
