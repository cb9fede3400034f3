"""What the tests of the pool share: a world that loads models and counts, and users of them."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from helpers import BOUND_S, Running, wait_until

from orion_oie.backends.base import LoadSpec
from orion_oie.cancellation import CancelScope
from orion_oie.errors import OrionError, RequestCancelledError
from orion_oie.pool.entries import Lease
from orion_oie.pool.pool import ModelPool
from orion_oie.schemas.results import ModelInfo


def spec(name: str) -> LoadSpec:
    return LoadSpec(
        ModelInfo(model_id=name, variant="v", name=name, version="1", license="mit"), files=()
    )


def waiting_for_memory(pool: ModelPool) -> int:
    """The number of requests that wait in a pool for memory: they are blocked, and show nothing."""
    return len(pool._waiting_for_memory)


class Model:
    """A model that knows whether it was closed or crashed."""

    pid = None

    def __init__(self, world: "World", info: ModelInfo) -> None:
        self.info = info
        self.completion: Future[ModelInfo] = Future()
        self.completion.set_result(info)
        self.is_closed = self.is_crashed = False
        self._world = world

    def is_alive(self) -> bool:
        return not self.is_closed and not self.is_crashed

    def crash(self) -> None:
        self.is_crashed = True

    def close(self, timeout_s: float = 10.0) -> None:
        if self._world.closing is not None:
            self._world.close_begun.set()
            assert self._world.closing.wait(BOUND_S)
        self.is_closed = True

    def generate(self, *_: object) -> None:
        raise NotImplementedError


class World:
    """Loads models for a pool and counts. A load waits at its gate, if it has one."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.models: list[Model] = []
        self.most = 0
        self.sizes: dict[str, int] = {}  # in bytes, by name
        self.most_bytes = 0
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, list[BaseException]] = {}
        self.is_deaf = False  # loads do not listen to their scope
        self.closing: threading.Event | None = None
        self.close_begun = threading.Event()
        self._loading = 0
        self._loading_bytes = 0
        self._lock = threading.Lock()

    def load(
        self, spec: LoadSpec, scope: CancelScope, on_progress: Callable[[float], None]
    ) -> Model:
        name = spec.info.model_id
        with self._lock:
            self.loads.append(name)
            self._count(name, 1)
            self.most = max(self.most, self._loading + len(self.alive))
            self.most_bytes = max(self.most_bytes, self._loading_bytes + self.alive_bytes)
        try:
            on_progress(0.5)
            gate = self.gates.get(name)
            if gate is not None:
                with contextlib.ExitStack() as stack:
                    if not self.is_deaf:
                        stack.callback(scope.on_cancel(gate.set))
                    assert gate.wait(BOUND_S)
            if not self.is_deaf:
                scope.check()
            if self.errors.get(name):
                raise self.errors[name].pop(0)
            on_progress(1.0)
            model = Model(self, spec.info)
        except BaseException:
            with self._lock:
                self._count(name, -1)
            raise
        with self._lock:
            self._count(name, -1)
            self.models.append(model)
        return model

    def _count(self, name: str, number: int) -> None:
        self._loading += number
        self._loading_bytes += number * self.sizes.get(name, 0)

    def size_of(self, spec: LoadSpec) -> int:
        """For a pool that asks how large a model will be."""
        return self.sizes[spec.info.model_id]

    @property
    def alive_bytes(self) -> int:
        return sum(self.sizes.get(model.info.model_id, 0) for model in self.alive)

    @property
    def alive(self) -> list[Model]:
        return [model for model in self.models if model.is_alive()]

    def gate(self, name: str) -> threading.Event:
        """Make the loads of `name` wait until the gate is opened."""
        return self.gates.setdefault(name, threading.Event())


class Holder:
    """Holds a lease on a thread of its own until it is let go."""

    def __init__(self, pool: ModelPool, name: str) -> None:
        self.scope = CancelScope()
        self.progress: list[float] = []
        self.lease: Lease | None = None
        self._holds = threading.Event()
        self._let_go = threading.Event()
        self._running = Running(self._hold, pool, name)

    def _hold(self, pool: ModelPool, name: str) -> None:
        with pool.acquire(spec(name), self.scope, self.progress.append) as lease:
            self.lease = lease
            self._holds.set()
            assert self._let_go.wait(3 * BOUND_S)

    def wait(self) -> Lease:
        wait_until(lambda: self._holds.is_set() or not self._running.is_running)
        if not self._holds.is_set():
            self._running.join()
        assert self.lease is not None
        return self.lease

    @property
    def holds(self) -> bool:
        return self._holds.is_set()

    def let_go(self) -> None:
        self._let_go.set()
        self._running.join()

    def fails(self) -> OrionError:
        with pytest.raises(OrionError) as caught:
            self._running.join()
        return caught.value

    def cancel(self) -> None:
        self.scope.cancel(RequestCancelledError("enough"))
        assert isinstance(self.fails(), RequestCancelledError)
