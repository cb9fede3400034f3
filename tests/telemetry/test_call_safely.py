"""Code of others that fails, and the log that tells it, hold nobody up."""

import logging
import threading
from collections.abc import Iterator

import pytest
from helpers import BOUND_S, Running

from orion_oie.callbacks import host_log
from orion_oie.telemetry.callbacks import call_safely


class Blocking(logging.Handler):
    """A handler of the application that waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.let_go.wait(BOUND_S)
        self.seen.append(record.getMessage())


@pytest.fixture
def handler() -> Iterator[Blocking]:
    handler = Blocking()
    logger = logging.getLogger("orion_oie")
    logger.addHandler(handler)
    yield handler
    handler.let_go.set()
    host_log.flush(BOUND_S)
    logger.removeHandler(handler)


def test_a_log_that_blocks_holds_up_no_caller(handler: Blocking) -> None:
    """What a callback raises is logged on another thread, and after it nothing is lost."""

    def fail() -> None:
        raise ZeroDivisionError

    assert Running(call_safely, fail).join() is False
    assert not handler.seen
    handler.let_go.set()
    assert host_log.flush(BOUND_S)
    assert handler.seen == ["a callback failed"]
