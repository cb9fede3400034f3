"""Feedback by users on routes, stored in a JSON Lines file for training.

A line is an example in the format of `fitting.read_examples`: {"text", "label", "routed",
"confidence", "time"}, time in seconds since the epoch. It holds the question as it was asked, so
nothing is stored unless the configuration names a file; only the owner of the file may read it.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.results import Route

if TYPE_CHECKING:
    from orion_oie.routing.linear.fitting import Example

_DECIMALS = 3


class FeedbackStore:
    """One feedback file. Threads and processes may append to it concurrently."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()

    def add(self, text: str, label: str, *, routed: str, confidence: float) -> None:
        """Append a line atomically. Raises `InvalidRequestError` if it cannot be written.

        text: the question. label: the agent that should have answered; routed: the one that did.
        """
        row = {
            "text": text,
            "label": label,
            "routed": routed,
            "confidence": confidence,
            "time": round(time.time(), _DECIMALS),
        }
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, line)
        except OSError as error:
            raise InvalidRequestError(f"the feedback cannot be kept: {error}") from error

    def examples(self) -> "list[Example]":
        """All examples, for training; an empty list if there is no file.

        Raises `InvalidRequestError` for a line that is no example.
        """
        # Loads numpy, which `add` does not need.
        from orion_oie.routing.linear.fitting import read_examples

        return read_examples(self.path) if self.path.exists() else []


@dataclass(frozen=True)
class RouteFeedback:
    """Stores feedback on one route. `check` raises for an agent that does not exist."""

    store: FeedbackStore
    check: Callable[[str], object]
    text: str
    routed: str
    confidence: float

    @classmethod
    def on(
        cls, store: FeedbackStore, check: Callable[[str], object], text: str, route: Route
    ) -> "RouteFeedback":
        """The feedback object of a route."""
        return cls(store, check, text, route.agent_id, route.confidence)

    def __call__(self, correct_agent: str) -> None:
        self.check(correct_agent)
        self.store.add(self.text, correct_agent, routed=self.routed, confidence=self.confidence)


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held by this open file: threads wait, too
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            # A process killed while it wrote a line must not spoil the next one.
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written to {path}")
        except OSError:
            file.truncate(size)
            raise
