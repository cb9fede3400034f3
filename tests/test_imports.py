"""The rules of the architecture, read from the import statements of the whole library."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import orion_oie

SOURCE = Path(orion_oie.__file__).parent
ROOT = "orion_oie"
FRONT_DOOR = ""

# From top to bottom: a module imports only modules of lower lines. One that is not here fails
# the tests until it is placed. Packages that hold no code have no line.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["training_cli"],
    ["route_cli"],
    ["console"],
    [FRONT_DOOR],
    ["compatibility"],
    ["engine", "inventory", "progress"],
    # upper rooms
    ["composition"],
    ["embeddings.router_embedder"],
    ["answering", "embeddings.shared", "observer", "planning", "preloading", "wiring"],
    ["embeddings.pooled", "housekeeping", "placement", "standings"],
    ["routing.evaluation", "routing.hybrid"],
    ["routing.meaning"],
    ["routing.work"],
    ["agents", "pool", "request", "routing.keyword", "routing.profiles"],
    ["leases", "routing.feedback", "routing.holdout"],
    ["routing.fitting"],
    ["health", "registry", "routing.linear", "routing.prompt", "sizing"],
    ["routing.signals", "routing.tiebreak"],
    ["routing.features", "routing.mixing", "routing.ngrams", "routing.residency"],
    ["routing.base", "routing.language", "routing.segments", "routing.sessions", "routing.wishes"],
    ["breaker", "costs", "eviction", "guardrails", "lifecycle", "prediction", "routing.excerpt"],
    [
        "routing.compiled",
        "routing.segment_patterns",
        "routing.stopwords",
        "sanitize",
        "scheduling",
        "streaming",
        "telemetry",
    ],
    ["in_flight"],
    ["turns"],
    ["fairness", "watchdog"],
    ["structured.gbnf", "structured.json_schema"],
    ["structured.schema_values"],
    ["embeddings.service"],
    ["embeddings.flights", "embeddings.gguf", "embeddings.sentence_transformer"],
    ["embeddings.bert_gguf", "embeddings.cache", "embeddings.stats", "embeddings.vectors"],
    ["embeddings.bert_folder", "embeddings.safetensors"],
    # backends
    ["backends.llama.loader", "backends.llama.worker"],
    ["backends.llama.arriving", "backends.llama.gpu"],
    ["backends.llama.client", "backends.llama.preparing"],
    ["backends.fake", "backends.llama.batcher", "backends.llama.embedder"],
    ["backends.llama.footprint"],
    ["backends.llama.room"],
    ["backends.llama.kvcache"],
    ["backends.llama.reuse"],
    ["backends.llama.parking", "backends.llama.tasks"],
    ["backends.llama.cells", "backends.llama.pacing", "backends.llama.sampling"],
    ["backends.base", "backends.llama.chat", "backends.llama.native", "backends.llama.snapshots"],
    ["backends.llama.scratch"],
    ["backends.llama.forward", "backends.llama.gate", "backends.llama.shape"],
    ["backends.llama.gguf", "backends.llama.governor"],
    ["backends.llama.grammar", "backends.llama.schema_grammar", "backends.llama.vocabulary"],
    ["backends.llama.number_ranges"],
    ["backends.llama.cursor", "backends.llama.devices", "backends.llama.ggml_types"],
    ["backends.llama.process"],
    ["backends.llama.protocol"],
    ["backends.text"],
    # files from elsewhere
    ["downloads.cache"],
    ["downloads.fetch", "downloads.locks", "downloads.sources"],
    ["downloads.parts"],
    ["downloads.arrival", "downloads.loopback", "downloads.pace", "downloads.ranges"],
    # the ground
    ["cancellation", "config", "logs", "specs"],
    ["hardware", "offload", "quantization"],
    ["reports"],
    ["memory.monitor"],
    ["memory.advice"],
    ["memory.sample"],
    ["memory.budget", "memory.pressure"],
    ["memory.probe"],
    ["cpu", "memory.cgroup", "memory.ledger", "schemas", "units", "validation"],
    ["errors"],
]
LEVEL = {module: level for level, line in enumerate(LAYERS) for module in line}

# Third-party packages that only some modules may import: by module, or by package with a dot.
ONLY_IMPORTERS = {
    "click": ("cli", "console", "route_cli", "training_cli"),
    "gguf": ("embeddings.bert_gguf",),
    "httpx": ("downloads.fetch", "downloads.ranges"),
    "huggingface_hub": ("downloads.sources",),
    "rich": ("progress",),
    "llama_cpp": ("backends.llama.", "foundry."),
    "psutil": ("memory.probe",),
    "sentence_transformers": ("embeddings.sentence_transformer",),
    "torch": (),
    "transitions": ("lifecycle",),
}


class Import(NamedTuple):
    """`importer` imports `target`, at module level or inside a function. Names without root."""

    importer: str
    target: str
    line: int
    is_lazy: bool

    def __str__(self) -> str:
        return f"{self.importer or ROOT}:{self.line} imports {self.target or ROOT}"


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def has_code(path: Path) -> bool:
    return bool(ast.parse(path.read_text(encoding="utf-8")).body)


def targets(node: ast.AST) -> Iterator[str]:
    """What an import statement names: modules of the library without the root, others whole."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        assert node.module is not None
        names = [node.module]
        if node.module == ROOT or node.module.startswith(f"{ROOT}."):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            is_module = [name.removeprefix(f"{ROOT}.") in FILES for name in whole]
            names = [
                n if is_one else node.module for n, is_one in zip(whole, is_module, strict=True)
            ]
    else:
        names = []
    for name in names:
        yield FRONT_DOOR if name == ROOT else name.removeprefix(f"{ROOT}.")


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    inside_functions = {
        inner
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        for target in targets(node):
            yield Import(module, target, node.lineno, node in inside_functions)


IMPORTS = [found for module in FILES for found in imports_of(module)]


def test_every_module_is_placed_once() -> None:
    """Each module that holds code has its line in the table, and the table names no other."""
    placed = [module for line in LAYERS for module in line]
    assert len(placed) == len(set(placed))
    assert {module for module, path in FILES.items() if has_code(path)} == set(placed)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module: str) -> None:
    """No import, lazy ones included, goes up or sideways; so there is no cycle either."""
    wrong = [
        str(found)
        for found in IMPORTS
        if found.importer == module
        and found.target in FILES
        and LEVEL.get(found.target, -1) <= LEVEL.get(module, -1)
    ]
    assert wrong == []


def test_the_reader_of_imports_sees_them_all() -> None:
    """The check itself: known imports of each kind are found, so that no rule holds vacuously."""
    edges = {(found.importer, found.target, found.is_lazy) for found in IMPORTS}
    assert ("cli", "lifecycle", False) in edges
    assert ("cli", FRONT_DOOR, False) in edges
    assert ("engine", "guardrails", False) in edges
    assert ("wiring", "backends.llama.loader", True) in edges
    assert ("lifecycle", "transitions.extensions", True) in edges
    assert ("backends.llama.native", "llama_cpp", False) in edges
    assert ("memory.probe", "psutil", True) in edges


@pytest.mark.parametrize("package", ONLY_IMPORTERS)
def test_some_packages_have_one_importer(package: str) -> None:
    """A third-party package with side effects or weight stays behind the module made for it."""
    allowed = ONLY_IMPORTERS[package]
    wrong = [
        str(found)
        for found in IMPORTS
        if found.target.partition(".")[0] == package
        and not any(
            found.importer == name or (name.endswith(".") and found.importer.startswith(name))
            for name in allowed
        )
    ]
    assert wrong == []


def test_one_module_picks_the_backend() -> None:
    """Upper rooms know the contract of a backend; the wiring alone knows the concrete ones."""
    of_cli = {("cli", "backends.llama.devices"), ("cli", "backends.llama.gguf")}
    wrong = [
        str(found)
        for found in IMPORTS
        if found.target.startswith("backends.")
        and found.target != "backends.base"
        and (found.importer, found.target) not in of_cli
        and not found.importer.startswith(("backends.", "foundry."))
        and found.importer != "wiring"
    ]
    assert wrong == []


def test_engine_and_foundry_do_not_know_each_other() -> None:
    """Answering and making models are two programs with a common ground."""
    wrong = [
        str(found)
        for found in IMPORTS
        if {found.importer.partition(".")[0], found.target.partition(".")[0]}
        == {"engine", "foundry"}
    ]
    assert wrong == []


def test_a_backend_knows_no_upper_room() -> None:
    """What holds a model can be used and tested without the engine around it."""
    below = {"schemas", "reports", "specs", "config", "errors", "logs", "cancellation"}
    wrong = [
        str(found)
        for found in IMPORTS
        if found.importer.startswith("backends.")
        and found.target in FILES
        and not found.target.startswith("backends.")
        and not found.target.startswith("downloads.")
        and found.target not in below | {"cpu", "hardware", "memory.probe", "offload", "validation"}
    ]
    assert wrong == []
