"""Completion in the shell: commands, options, agents and models; never a traceback."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from terminals import COMMAND

from orion_oie import ModelRegistry
from orion_oie.cli.main import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, capsys: Capture):  # type: ignore[no-untyped-def]
    """The function from a line that is being typed to what could follow."""

    def completed(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_ORION_OIE_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert main([]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        return [row.partition(",")[2] for row in shown.out.splitlines() if row]

    return completed


AGENTS = list(ModelRegistry.packaged().agents)
MODELS = list(ModelRegistry.packaged().models)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("orion-oie r", ["run", "route"]),
        ("orion-oie models ve", ["verify"]),
        ("orion-oie run --json", ["--json-schema", "--json"]),
        ("orion-oie run --agent ", AGENTS),
        ("orion-oie run --agent co", ["conversation", "code"]),
        ("orion-oie chat --agent da", ["data"]),
        ("orion-oie pull smol", [m for m in MODELS if m.startswith("smol")]),
        ("orion-oie pull co", ["conversation", "code"]),
        ("orion-oie models rm smollm2-360m-instruct@", ["smollm2-360m-instruct@q4_k_m",
                                                         "smollm2-360m-instruct@q8_0"]),
        ("orion-oie models verify vis", ["vision"]),
        ("orion-oie run -m qwen3", ["qwen3-4b-instruct-2507"]),
        ("orion-oie route question --model qwen3", ["qwen3-4b-instruct-2507"]),
        ("orion-oie run --agent nobody", []),
    ],
)  # fmt: skip
def test_what_could_follow(line: str, words: list[str], complete) -> None:  # type: ignore[no-untyped-def]
    """In the order of the help or of the registry."""
    assert sorted(complete(line)) == sorted(words)


def test_models_of_another_registry(tmp_path: Path, complete) -> None:  # type: ignore[no-untyped-def]
    """`--registry` says whose names are completed; a broken one completes nothing."""
    own = tmp_path / "own.json"
    text = ModelRegistry.packaged()
    text.add_agent("gardener", {**text.agent("code").model_dump(), "name": "G"})
    text.save(own)
    assert complete(f"orion-oie run --registry {own} --agent g") == ["gardener"]
    own.write_text("{", encoding="utf-8")
    assert complete(f"orion-oie run --registry {own} --agent g") == []
    assert complete("orion-oie run --registry /nowhere --agent g") == []
    assert complete("orion-oie pull --registry /nowhere g") == []


def test_models_of_the_default_registry(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete
) -> None:
    """The one that other commands take; a broken one completes nothing."""
    own = ModelRegistry.packaged()
    own.add_agent("gardener", {**own.agent("code").model_dump(), "name": "G"})
    own.save(tmp_path / "own.json")
    monkeypatch.setenv("ORION_REGISTRY", str(tmp_path / "own.json"))
    assert complete("orion-oie run --agent g") == ["gardener"]
    (tmp_path / "own.json").write_text("{", encoding="utf-8")
    assert complete("orion-oie run --agent g") == []


def test_sources_are_models_or_files(complete) -> None:  # type: ignore[no-untyped-def]
    """What begins like no model may be a file."""
    assert complete("orion-oie run -m ./my") == ["./my"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """`_ORION_OIE_COMPLETE=bash_source orion-oie` prints it."""
    monkeypatch.setenv("_ORION_OIE_COMPLETE", f"{shell}_source")
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    assert main([]) == 0
    assert f"_ORION_OIE_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_bash_completes(tmp_path: Path) -> None:
    """A real shell that has read the script."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    shim = tmp_path / "orion-oie"
    shim.write_text(f'#!/bin/sh\nexec {COMMAND[0]} -m orion_oie "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    script = (
        'eval "$(_ORION_OIE_COMPLETE=bash_source orion-oie)"; '
        "COMP_WORDS=(orion-oie run --agent cr); COMP_CWORD=3; COMPREPLY=(); "
        '_orion_oie_completion orion-oie; echo "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "creative"
