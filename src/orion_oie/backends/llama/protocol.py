"""The words that a worker and its client exchange: JSON objects, one per message.

To the worker:   {"op": "load" | "complete" | "generate" | "embed" | "threads" | "occupancy" |
                  "cancel" | "close", ...}
From the worker: {"ev": "hello" | "loading" | "loaded" | "failed" | "completed" | "step" |
                  "embedded" | "occupancy" | "log", ...}

A worker says "hello" when it is ready for its "load". That may name the maps of files that are
still arriving; "complete" then tells where they lie once they are here, and "completed" that the
worker has left what was arriving. "threads" says with how many to compute from the next step on;
nothing answers it. A "step" carries everything that one batch step produced: `text`
holds [id, text, tokens] for each sequence that grew, `done` and `error` hold the sequences that
ended.
"""

import json
from multiprocessing.connection import Connection
from typing import Any

from orion_oie import errors
from orion_oie.errors import OrionError, WorkerError

Packet = dict[str, Any]


def send(connection: "Connection[Any, Any]", message: Packet) -> None:
    """Write one message; raises OSError when the other side is gone."""
    connection.send_bytes(json.dumps(message, separators=(",", ":")).encode())


def receive(connection: "Connection[Any, Any]") -> Packet:
    """Read one message; raises EOFError or OSError when the other side is gone."""
    message: Packet = json.loads(connection.recv_bytes())
    return message


def error_to_wire(error: OrionError) -> Packet:
    """An error as JSON."""
    return {"name": type(error).__name__, "message": error.message, "details": error.details}


def error_from_wire(wire: Packet) -> OrionError:
    """The error that `error_to_wire` was given; a `WorkerError` if its type is unknown here."""
    kind = getattr(errors, wire["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, OrionError)):
        kind = WorkerError
    error: OrionError = kind(wire["message"], **wire["details"])
    return error
