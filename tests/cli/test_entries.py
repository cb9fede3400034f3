"""What `inspect --entry` and `convert` print is a registry, as it stands."""

import json
from pathlib import Path

import pytest
from minilm import minilm_folder
from tiny import write_tiny_llama

from orion_oie import ModelRegistry
from orion_oie.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("is_split", [False, True])
def test_an_entry_is_a_registry(
    is_split: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inspect FILE --entry > models.json`, and the file answers by its name, from anywhere."""
    monkeypatch.chdir(tmp_path)
    file = write_tiny_llama(tmp_path / "My model (v2).gguf", tensors_per_file=4 if is_split else 0)
    assert main(["inspect", file.name, "--entry"]) == 0
    (tmp_path / "elsewhere").mkdir()
    registry = tmp_path / "elsewhere" / "models.json"
    registry.write_text(capsys.readouterr().out, encoding="utf-8")
    (name,) = set(ModelRegistry.load(registry).models) - set(ModelRegistry.packaged().models)
    assert name == "My-model-v2"
    asked = ["run", "Hello?", "-m", name, "--registry", str(registry), "--max-tokens", "2", "-q"]
    assert main(asked) == 0


def test_what_was_converted_fits(tmp_path: Path, capsys: Capture) -> None:
    """`convert` prints a registry that has the embedding model."""
    out = tmp_path / "minilm.gguf"
    assert main(["convert", str(minilm_folder()), str(out), "--type", "q8_0"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (tmp_path / "models.json").write_text(json.dumps(shown))
    model = ModelRegistry.load(tmp_path / "models.json").model("minilm")
    assert model.type == "embedding"


def test_what_is_no_model_has_no_entry(tmp_path: Path, capsys: Capture) -> None:
    """The error says what it is."""
    (tmp_path / "page.gguf").write_text("<html>")
    assert main(["inspect", str(tmp_path / "page.gguf"), "--entry"]) == 1
    assert "web page" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "chat", "route", "pull"])
def test_an_empty_name_is_no_model(command: str, capsys: Capture) -> None:
    """An unset variable of a shell is not the agent's own model."""
    assert main([command, "-m", "", "Hello?"]) == 2
    assert "it is empty" in capsys.readouterr().err


def test_agents_say_why_a_file_cannot_be_used(tmp_path: Path, capsys: Capture) -> None:
    """A typo in a path is shown, and nothing is advised that cannot help."""
    registry = ModelRegistry.packaged()
    registry.add_model("mine", {"source": {"path": str(tmp_path / "mien.gguf")}})
    registry.update_agent("code", models={"primary": "mine"})
    registry.save(tmp_path / "models.json")
    assert main(["agents", "--registry", str(tmp_path / "models.json")]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "the model of code cannot be used" in err
    assert "mien.gguf" in err.replace(" ", "")
    assert "pull code" not in err
