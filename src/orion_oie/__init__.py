"""Orion Inference Engine: answers from local language models, embedded in an application.

from orion_oie import OrionInferenceEngine

with OrionInferenceEngine() as engine:
    print(engine.infer("Write a Python function that adds two numbers").content)
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from orion_oie.schemas.version import __version__

if TYPE_CHECKING:
    from orion_oie.config import (
        BreakerConfig,
        DownloadConfig,
        EmbeddingConfig,
        EngineConfig,
        GuardrailConfig,
        LoadingConfig,
        LogConfig,
        MemoryConfig,
        RouterConfig,
        RouteStage,
        ServingConfig,
        ShardingConfig,
    )
    from orion_oie.engine.answer_stream import (
        AnswerStream,
    )
    from orion_oie.engine.chat import (
        Chat,
    )
    from orion_oie.engine.engine import (
        OrionInferenceEngine,
    )
    from orion_oie.engine.handle import (
        RequestHandle,
    )
    from orion_oie.engine.lifecycle import (
        RequestState,
    )
    from orion_oie.engine.text_streamer import (
        TextStats,
        TextStreamer,
        stream_text,
    )
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
        OrionWarning,
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
    from orion_oie.schemas.loading import (
        LoadProgress,
    )
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
    from orion_oie.telemetry.events import (
        Event,
    )

# Each name is imported when it is first used: all of them together, with their pydantic models,
# take three times as long as pydantic itself.
_HOMES = {
    "orion_oie.config": (
        "BreakerConfig",
        "DownloadConfig",
        "EmbeddingConfig",
        "EngineConfig",
        "GuardrailConfig",
        "LoadingConfig",
        "LogConfig",
        "MemoryConfig",
        "RouterConfig",
        "RouteStage",
        "ServingConfig",
        "ShardingConfig",
    ),
    "orion_oie.engine.answer_stream": ("AnswerStream",),
    "orion_oie.engine.chat": ("Chat",),
    "orion_oie.engine.engine": ("OrionInferenceEngine",),
    "orion_oie.engine.handle": ("RequestHandle",),
    "orion_oie.engine.lifecycle": ("RequestState",),
    "orion_oie.engine.text_streamer": (
        "TextStats",
        "TextStreamer",
        "stream_text",
    ),
    "orion_oie.errors": (
        "BudgetExceededError",
        "CircuitOpenError",
        "ContextOverflowError",
        "DeadlineExceededError",
        "DigestMismatchError",
        "DownloadError",
        "EngineClosedError",
        "GuardrailError",
        "InsufficientMemoryError",
        "InvalidRequestError",
        "ModelCorruptError",
        "ModelError",
        "ModelNotFoundError",
        "OrionError",
        "OrionWarning",
        "ProviderAuthError",
        "ProviderError",
        "ProviderRateLimitError",
        "QueueFullError",
        "RecipeError",
        "RegistryError",
        "RequestCancelledError",
        "UnknownAgentError",
        "WorkerCrashedError",
        "WorkerError",
        "WorkerTimeoutError",
    ),
    "orion_oie.models.registry": ("ModelRegistry",),
    "orion_oie.models.specs": (
        "AgentModels",
        "AgentSpec",
        "ModelSpec",
        "PromptFormat",
        "RoutingHints",
        "SourceSpec",
        "VariantSpec",
    ),
    "orion_oie.schemas.loading": ("LoadProgress",),
    "orion_oie.schemas.plans": (
        "Plan",
        "PlannedModel",
        "VariantChoice",
    ),
    "orion_oie.schemas.requests": (
        "GenerationOptions",
        "Message",
        "RequestOptions",
        "SamplingDefaults",
    ),
    "orion_oie.schemas.results": (
        "Consideration",
        "InferenceResult",
        "LoadReport",
        "ModelInfo",
        "Receipt",
        "Route",
        "RouteCandidate",
        "StreamStats",
        "Timings",
        "TokenEvent",
        "Usage",
        "VariantReport",
    ),
    "orion_oie.schemas.stats": (
        "BreakerState",
        "BreakerStats",
        "Device",
        "EngineStats",
        "Hardware",
        "Health",
        "MemoryStats",
        "ModelStats",
        "PredictionStats",
    ),
    "orion_oie.telemetry.events": ("Event",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    module = _HOME_OF.get(name)
    if module is not None:
        value: object = getattr(import_module(module), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")  # as in `orion_oie.errors`
    raise AttributeError(f"module '{__name__}' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "AgentModels",
    "AgentSpec",
    "AnswerStream",
    "BreakerConfig",
    "BreakerState",
    "BreakerStats",
    "BudgetExceededError",
    "Chat",
    "CircuitOpenError",
    "Consideration",
    "ContextOverflowError",
    "DeadlineExceededError",
    "Device",
    "DigestMismatchError",
    "DownloadConfig",
    "DownloadError",
    "EmbeddingConfig",
    "EngineClosedError",
    "EngineConfig",
    "EngineStats",
    "Event",
    "GenerationOptions",
    "GuardrailConfig",
    "GuardrailError",
    "Hardware",
    "Health",
    "InferenceResult",
    "InsufficientMemoryError",
    "InvalidRequestError",
    "LoadProgress",
    "LoadReport",
    "LoadingConfig",
    "LogConfig",
    "MemoryConfig",
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
    "OrionWarning",
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
    "RouteStage",
    "RouterConfig",
    "RoutingHints",
    "SamplingDefaults",
    "ServingConfig",
    "ShardingConfig",
    "SourceSpec",
    "StreamStats",
    "TextStats",
    "TextStreamer",
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
    "stream_text",
]
