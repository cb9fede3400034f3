"""`python -m orion_oie`: what it prints is what the library says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orion_oie import ModelRegistry, __version__, lifecycle
from orion_oie.cli import main


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`schema` prints the JSON Schema of models.json."""
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == ModelRegistry.json_schema()


def test_schema_is_written(tmp_path: Path) -> None:
    """`schema FILE` writes it."""
    assert main(["schema", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == ModelRegistry.json_schema()


def test_lifecycle_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`lifecycle` prints docs/lifecycle.md."""
    assert main(["lifecycle"]) == 0
    assert capsys.readouterr().out == lifecycle.document()


def test_it_runs_as_a_module() -> None:
    """The module can be run, and an unknown command is refused with status 2."""
    run = [sys.executable, "-m", "orion_oie"]
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == __version__
    assert subprocess.run([*run, "nonsense"], capture_output=True, check=False).returncode == 2
