"""`orion-oie agents`, and the lists of models: what is here, and what to do about the rest."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from shops import Shop

from orion_oie import ModelRegistry
from orion_oie.cli.main import main

Capture = pytest.CaptureFixture[str]


def test_agents_says_what_each_is_for(smollm2: Path, capsys: Capture) -> None:
    """Each agent has a line with its model; a note says what answers in its place."""
    assert main(["agents"]) == 0
    shown = capsys.readouterr()
    registry = ModelRegistry.packaged()
    lines = shown.out.splitlines()
    assert len(lines) == 1 + len(registry.agents)
    for line, (name, agent) in zip(lines[1:], registry.agents.items(), strict=True):
        assert line.startswith(name)
        assert agent.description in line
        assert line.endswith(f"{agent.models.primary}  no".rstrip()) or " no" in line
    assert "smollm2-135m-instruct answers; 'orion-oie pull AGENT' fetches" in shown.err


def test_agents_as_json(shop: Shop, capsys: Capture) -> None:
    """What is here, what answers now, and the command that fetches the model."""
    assert main(["agents", "--json", *shop.options]) == 0
    found = {one["agent"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["conversation"]["is_here"]
    assert found["conversation"]["to_do"] is None
    assert found["writer"] == {
        "agent": "writer",
        "name": "A",
        "description": "",
        "model": "tiny",
        "is_here": False,
        "answers_now": "local",
        "to_do": "orion-oie pull writer",
        "why_not": found["writer"]["why_not"],
    }
    assert "not downloaded" in found["writer"]["why_not"]
    main(["pull", "writer", *shop.options])
    capsys.readouterr()
    assert main(["agents", "--json", *shop.options]) == 0
    found = {one["agent"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["writer"]["is_here"]
    assert found["writer"]["answers_now"] == "tiny"


def test_agents_that_nobody_answers_for(shop: Shop, capsys: Capture) -> None:
    """It says how to get a model; with all models here it says nothing."""
    raw = json.loads(shop.registry.read_text(encoding="utf-8"))
    raw["agents"] = {"reader": raw["agents"]["reader"] | {"fallback_agent": None}}
    shop.registry.write_text(json.dumps(raw), encoding="utf-8")
    assert main(["agents", *shop.options]) == 0
    assert "no model is here for reader: 'orion-oie pull reader'" in capsys.readouterr().err
    main(["pull", "reader", *shop.options])
    capsys.readouterr()
    assert main(["agents", *shop.options]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_models_list_is_models(options: list[str], shop: Shop, capsys: Capture) -> None:
    """The explicit spelling says the same, and places may be named before it."""
    assert main(["models", *options, *shop.options]) == 0
    plain = capsys.readouterr().out
    assert main(["models", "list", *options, *shop.options]) == 0
    assert capsys.readouterr().out == plain
    assert main(["models", *shop.options, "list", *options]) == 0
    assert capsys.readouterr().out == plain


def test_last_use_is_shown_once_something_was_used(shop: Shop, capsys: Capture) -> None:
    """A column of dashes would tell nothing."""
    main(["models", *shop.options])
    assert capsys.readouterr().out.splitlines()[0].split() == ["model", "size", "state", "where"]
    main(["pull", "tiny@f16", *shop.options])
    capsys.readouterr()
    main(["models", *shop.options])
    assert "last used" in capsys.readouterr().out.splitlines()[0]


# -- models of other programs


@dataclass(frozen=True)
class _Found:
    """What `local_models` finds."""

    source: str
    paths: tuple[Path, ...]
    size_bytes: int
    where: str
    quantization: str | None
    name: str


FOUND = [
    _Found("ollama:llama3.2:1b", (Path("/o/b"),), 1_300_000_000, "Ollama", "Q8_0", "llama3.2:1b"),
    _Found("/lm/q.gguf", (Path("/lm/q.gguf"),), 400_000_000, "LM Studio", None, "q"),
]


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> list[_Found]:
    """The models that are found in this test."""
    found = list(FOUND)
    monkeypatch.setattr("orion_oie.models.local.survey.local_models", lambda: list(found))
    return found


@pytest.mark.parametrize("command", [["models"], ["models", "list"]], ids=str)
def test_models_of_other_programs(command: list[str], local: list[_Found], capsys: Capture) -> None:
    """With what names each to `-m`."""
    assert main([*command, "--local"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "model            size  type  of         -m",
        "llama3.2:1b   1.30 GB  Q8_0  Ollama     ollama:llama3.2:1b",
        "q            400.0 MB  -     LM Studio  /lm/q.gguf",
    ]
    assert "note: 'orion-oie run -m ollama:llama3.2:1b \"...\"' asks one of them" in shown.err
    assert main([*command, "--local", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["source"], first["paths"]) == ("ollama:llama3.2:1b", ["/o/b"])


def test_no_models_of_other_programs(local: list[_Found], capsys: Capture) -> None:
    """That is said, and is no error."""
    local.clear()
    assert main(["models", "--local"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no models of Ollama" in shown.err


def test_the_library_finds_models(capsys: Capture) -> None:
    """The real search, whatever is on this machine."""
    assert main(["models", "--local", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), list)
