"""Orion Inference Engine: answers from local language models, embedded in an application.

from orion_oie import OrionInferenceEngine

with OrionInferenceEngine() as engine:
    print(engine.infer("Write a Python function that adds two numbers").content)
"""

from orion_oie.backends.base import LoadProgress
from orion_oie.breaker import BreakerState, BreakerStats
from orion_oie.config import BreakerConfig, DownloadConfig, EngineConfig, ShardingConfig
from orion_oie.engine import OrionInferenceEngine
from orion_oie.errors import (
    BudgetExceededError,
    CircuitOpenError,
    ContextOverflowError,
    DeadlineExceededError,
    DigestMismatchError,
    DownloadError,
    EngineClosedError,
    GuardrailError,
    InsufficientMemoryError,
    InvalidRequestError,
    ModelCorruptError,
    ModelError,
    ModelNotFoundError,
    OrionError,
    ProviderAuthError,
    ProviderError,
    ProviderRateLimitError,
    QueueFullError,
    RecipeError,
    RegistryError,
    RequestCancelledError,
    UnknownAgentError,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from orion_oie.health import EngineStats, Health, MemoryStats, ModelStats
from orion_oie.lifecycle import RequestState
from orion_oie.logs import Event
from orion_oie.memory.pressure import PressureLevel
from orion_oie.planning import Plan, PlannedModel
from orion_oie.prediction import PredictionStats
from orion_oie.quantization import VariantChoice
from orion_oie.registry import ModelRegistry
from orion_oie.request import RequestHandle
from orion_oie.schemas import (
    Consideration,
    GenerationOptions,
    InferenceResult,
    LoadReport,
    Message,
    ModelInfo,
    Receipt,
    RequestOptions,
    Route,
    RouteCandidate,
    SamplingDefaults,
    StreamStats,
    Timings,
    TokenEvent,
    Usage,
    VariantReport,
)
from orion_oie.specs import (
    AgentModels,
    AgentSpec,
    ModelSpec,
    PromptFormat,
    RoutingHints,
    SourceSpec,
    VariantSpec,
)

__version__ = "0.1.0"

__all__ = [
    "AgentModels",
    "AgentSpec",
    "BreakerConfig",
    "BreakerState",
    "BreakerStats",
    "BudgetExceededError",
    "CircuitOpenError",
    "Consideration",
    "ContextOverflowError",
    "DeadlineExceededError",
    "DigestMismatchError",
    "DownloadConfig",
    "DownloadError",
    "EngineClosedError",
    "EngineConfig",
    "EngineStats",
    "Event",
    "GenerationOptions",
    "GuardrailError",
    "Health",
    "InferenceResult",
    "InsufficientMemoryError",
    "InvalidRequestError",
    "LoadProgress",
    "LoadReport",
    "MemoryStats",
    "Message",
    "ModelCorruptError",
    "ModelError",
    "ModelInfo",
    "ModelNotFoundError",
    "ModelRegistry",
    "ModelSpec",
    "ModelStats",
    "OrionError",
    "OrionInferenceEngine",
    "Plan",
    "PlannedModel",
    "PredictionStats",
    "PressureLevel",
    "PromptFormat",
    "ProviderAuthError",
    "ProviderError",
    "ProviderRateLimitError",
    "QueueFullError",
    "Receipt",
    "RecipeError",
    "RegistryError",
    "RequestCancelledError",
    "RequestHandle",
    "RequestOptions",
    "RequestState",
    "Route",
    "RouteCandidate",
    "RoutingHints",
    "SamplingDefaults",
    "ShardingConfig",
    "SourceSpec",
    "StreamStats",
    "Timings",
    "TokenEvent",
    "UnknownAgentError",
    "Usage",
    "VariantChoice",
    "VariantReport",
    "VariantSpec",
    "WorkerCrashedError",
    "WorkerError",
    "WorkerTimeoutError",
    "__version__",
]
