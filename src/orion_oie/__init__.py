"""Orion Inference Engine: answers from local language models, embedded in an application.

from orion_oie import OrionInferenceEngine

with OrionInferenceEngine() as engine:
    print(engine.infer("Write a Python function that adds two numbers").content)
"""

from orion_oie.config import BreakerConfig, DownloadConfig, EngineConfig, ShardingConfig
from orion_oie.engine.engine import OrionInferenceEngine
from orion_oie.engine.lifecycle import RequestState
from orion_oie.engine.request import RequestHandle
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
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import (
    AgentModels,
    AgentSpec,
    ModelSpec,
    PromptFormat,
    RoutingHints,
    SourceSpec,
    VariantSpec,
)
from orion_oie.schemas.loading import LoadProgress
from orion_oie.schemas.plans import (
    Plan,
    PlannedModel,
    VariantChoice,
)
from orion_oie.schemas.requests import (
    GenerationOptions,
    Message,
    RequestOptions,
    SamplingDefaults,
)
from orion_oie.schemas.results import (
    Consideration,
    InferenceResult,
    LoadReport,
    ModelInfo,
    Receipt,
    Route,
    RouteCandidate,
    StreamStats,
    Timings,
    TokenEvent,
    Usage,
    VariantReport,
)
from orion_oie.schemas.stats import (
    BreakerState,
    BreakerStats,
    Device,
    EngineStats,
    Hardware,
    Health,
    MemoryStats,
    ModelStats,
    PredictionStats,
)
from orion_oie.telemetry.events import Event

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
    "Device",
    "DigestMismatchError",
    "DownloadConfig",
    "DownloadError",
    "EngineClosedError",
    "EngineConfig",
    "EngineStats",
    "Event",
    "GenerationOptions",
    "GuardrailError",
    "Hardware",
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
