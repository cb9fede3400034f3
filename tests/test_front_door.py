"""The front door: what `import orion_oie` offers, and what it does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import orion_oie
from orion_oie import errors

EXPORTED = [
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


def homes_of_names() -> dict[str, tuple[str, ...]]:
    """The names of each module in the table of the front door: programs read it by `getattr`."""
    return orion_oie._HOMES


HEAVY = ["llama_cpp", "numpy", "psutil", "sentence_transformers", "structlog", "torch"]


def test_the_exported_names_are_frozen() -> None:
    """A name comes or goes only together with this list."""
    assert orion_oie.__all__ == EXPORTED
    assert sorted(EXPORTED) == EXPORTED


def test_every_exported_name_resolves() -> None:
    """`from orion_oie import *` works, and each public class knows where it is at home."""
    namespace: dict[str, object] = {}
    exec("from orion_oie import *", namespace)
    assert set(EXPORTED) <= set(namespace)
    for name in EXPORTED:
        value = namespace[name]
        assert not isinstance(value, type) or value.__name__ == name


def test_every_error_is_exported() -> None:
    """Whoever wants to catch an error finds it at the front door."""
    raised = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.OrionError)
    }
    assert raised <= set(EXPORTED)


def test_editors_see_what_programs_get() -> None:
    """The imports for type checkers and the table for programs name the same."""
    tree = ast.parse(Path(orion_oie.__file__).read_text(encoding="utf-8"))
    checking = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        (node.module, alias.name)
        for node in checking.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {(module, name) for module, names in homes_of_names().items() for name in names}
    assert shown == homes
    assert {name for _module, name in homes} == {*EXPORTED} - {"__version__"}
    assert dir(orion_oie) == EXPORTED


def test_modules_are_attributes() -> None:
    """`import orion_oie` is enough to write `orion_oie.errors`."""
    program = "import orion_oie; print(orion_oie.errors.OrionError.__name__, orion_oie.config)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("OrionError <module"), done.stderr


def test_an_unknown_name_is_an_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="has no attribute 'Engine'"):
        orion_oie.Engine  # noqa: B018 (the access is the test)
    with pytest.raises(ImportError):
        exec("from orion_oie import Engine")


def test_importing_the_library_loads_nothing_heavy() -> None:
    """`import orion_oie` loads no model library and nothing that only a running engine needs."""
    program = f"import sys, orion_oie; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
