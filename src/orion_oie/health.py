"""What an engine says of itself: statistics and health. Shapes only."""

from typing import Literal

from orion_oie.breaker import BreakerStats
from orion_oie.hardware import Hardware
from orion_oie.pool import ResidentModel
from orion_oie.schemas import Schema
from orion_oie.telemetry import RequestCounts


class ModelStats(ResidentModel):
    """One model in memory. `memory_bytes` is the resident size of its process."""

    memory_bytes: int | None


class EngineStats(Schema):
    """What an engine did and what it holds."""

    requests: RequestCounts
    waiting: int
    running: int
    models: dict[str, ModelStats]
    breakers: dict[str, BreakerStats]
    hardware: Hardware


class Health(Schema):
    """Whether an engine can answer, and what is wrong if not fully."""

    status: Literal["healthy", "degraded", "down"]
    reasons: list[str] = []
