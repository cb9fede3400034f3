"""Statistics and health of an engine: shapes only."""

from typing import Literal

from orion_oie.breaker import BreakerStats
from orion_oie.embeddings.stats import EmbeddingStats
from orion_oie.reports import Hardware, MemoryStats, ModelStats, PredictionStats
from orion_oie.schemas import Schema
from orion_oie.telemetry import RequestCounts


class EngineStats(Schema):
    """What an engine did and what it holds. `embeddings` is None until something was
    embedded."""

    requests: RequestCounts
    waiting: int
    running: int
    models: dict[str, ModelStats]
    memory: MemoryStats
    prediction: PredictionStats
    breakers: dict[str, BreakerStats]
    hardware: Hardware
    embeddings: EmbeddingStats | None = None


class Health(Schema):
    """Whether an engine can answer, and what is wrong if not fully."""

    status: Literal["healthy", "degraded", "down"]
    reasons: list[str] = []
