"""semantic-router as a peer of the routing benchmark, in an environment of its own.

It does not share ours, because it and what else we use ask for different versions of `openai`.
torch and transformers it borrows from the running interpreter, so that gigabytes are not installed
twice. Not a benchmark itself.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from minilm import minilm_folder

VERSION = "1.1.1"
FOLDER = Path(__file__).parents[1] / "bench-results" / "peers" / "semantic-router"
RUNNER = Path(__file__).with_name("_semantic_router_run.py")
INSTALL_LIMIT_S = 900.0
RUN_LIMIT_S = 600.0
_BORROWED = ("torch", "transformers")


class PeerError(Exception):
    """The peer could not be installed or did not answer; the message says why."""


@dataclass(frozen=True)
class PeerResult:
    """What the peer said: for each prompt a label, "none" where no route was good enough, and the
    milliseconds it took; the seconds to embed what it was trained on."""

    labels: list[str]
    ms: list[float]
    build_s: float
    version: str


def semantic_router_labels(
    train: Sequence[Mapping[str, Any]], test: Sequence[str], *, aggregation: str | None = None
) -> PeerResult:
    """Route `test` by a route for each label of `train`, whose texts are its utterances.

    Rows have "text" and "label"; what else they have is ignored. MiniLM embeds, and all but the
    aggregation ("mean", "max", "sum") is as the peer has it by default. Raises PeerError.
    """
    request: dict[str, Any] = {
        "train": [{"text": row["text"], "label": row["label"]} for row in train],
        "test": list(test),
        "model": str(_model_folder()),
        "aggregation": aggregation,
    }
    python = ensure_peer()
    with tempfile.TemporaryDirectory(prefix="orion-peer-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        # Isolated (-I): the files beside the runner must not pass for packages of their names.
        command = [str(path) for path in (python, "-I", RUNNER, asked, answered)]
        _run(command, "semantic-router", RUN_LIMIT_S)
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    result = PeerResult(**answer)
    if not len(result.labels) == len(result.ms) == len(test):
        raise PeerError(f"semantic-router: {len(result.labels)} labels for {len(test)} prompts")
    return result


def ensure_peer() -> Path:
    """The interpreter of the peer's environment, which is made when it is not there.

    Raises PeerError.
    """
    python = FOLDER / "bin" / "python"
    borrowed = _borrowed_folders()
    made_for = json.dumps([VERSION, sys.version, sys.prefix, borrowed])
    ready = FOLDER / "ready.json"
    if ready.is_file() and ready.read_text(encoding="utf-8") == made_for:
        return python
    try:
        if FOLDER.exists():
            shutil.rmtree(FOLDER)
        venv.create(FOLDER, symlinks=True)
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(FOLDER)}))
        (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    except OSError as error:
        raise PeerError(f"no environment for semantic-router: {error}") from error
    # Our pip works over there. It sees what is borrowed as installed, and cannot change it.
    wanted = f"semantic-router=={VERSION}"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _run([*pip, "install", "--quiet", wanted], f"pip install {wanted}", INSTALL_LIMIT_S)
    ready.write_text(made_for, encoding="utf-8")
    return python


def _model_folder() -> Path:
    try:
        return minilm_folder()
    except pytest.skip.Exception as skipped:
        raise PeerError(str(skipped)) from None


def _borrowed_folders() -> list[str]:
    """Where the running interpreter has torch and transformers."""
    folders = []
    for name in _BORROWED:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise PeerError(f"semantic-router needs {name}: pip install sentence-transformers")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


def _run(command: Sequence[str], what: str, limit_s: float) -> None:
    """Run a program to its end; if that is not a good one, PeerError has its last words."""
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{what}: not done after {limit_s:.0f} s") from error
    except OSError as error:
        raise PeerError(f"{what}: {error}") from error
    if ended.returncode != 0:
        last = "\n".join(ended.stderr.splitlines()[-3:])
        raise PeerError(f"{what}: ended with {ended.returncode}\n{last}")
