"""The options of a request, as a type checker and an editor see them."""

import inspect
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import orion_oie
from orion_oie import Message, OrionInferenceEngine, RequestOptions
from orion_oie.schemas.requests import RequestOptionsDict

TURN = {"role": "user", "content": "Hello"}
# Options that accept more than they store: the type, and a value of each kind.
WIDER: dict[str, tuple[Any, list[Any]]] = {
    "model": (str | os.PathLike[str] | None, ["m.gguf", Path("m.gguf"), None]),
    "images": (Sequence[str | Path | bytes], [["a.png"], (Path("a.png"), b"x")]),
    "conversation_history": (
        Sequence[Message | Mapping[str, str]],
        [[TURN], (Message(role="user", content="Hello"), TURN)],
    ),
    "stop": (str | Sequence[str] | None, ["END", ["END"], ("END", "."), None]),
    "logit_bias": (
        Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float],
        [{1: 2.0}, {"yes": 1}, {1: -100, "no": 0.5}],
    ),
}
CALLS = ["infer", "submit", "stream", "plan", "ainfer", "astream"]
# Only the modules that declare the options are read: the others take mypy half a minute.
MYPY = """
[mypy]
strict = true
follow_imports = skip
[mypy-orion_oie,orion_oie.engine.engine,orion_oie.schemas.requests]
follow_imports = silent
"""
SNIPPET = """
from orion_oie import OrionInferenceEngine

engine = OrionInferenceEngine()
history = [{"role": "user", "content": "Hello"}]
engine.infer("x", agent="code", stop=["."], conversation_history=history, logit_bias={"no": -100})
engine.stream("x", chunk_by="word", max_tokens=3, deadline=2)
"""


def test_the_typed_options_are_the_checked_ones() -> None:
    """The names and types of `RequestOptionsDict` are those of `RequestOptions`, constraints left
    out; where an option accepts more than it stores, all of that is accepted."""
    checked = get_type_hints(RequestOptions)
    expected = {
        name: WIDER[name][0] if name in WIDER else checked[name]
        for name in RequestOptions.model_fields
    }
    assert get_type_hints(RequestOptionsDict) == expected
    assert not RequestOptionsDict.__required_keys__
    for name, (_, values) in WIDER.items():
        for value in values:
            RequestOptions.model_validate({name: value})


def test_every_option_is_described() -> None:
    """The description stands at the field, a sentence or more."""
    for name, field in RequestOptions.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("name", CALLS)
def test_every_call_shows_its_options(name: str) -> None:
    """An editor completes the options of each public call."""
    parameters = inspect.signature(getattr(OrionInferenceEngine, name)).parameters
    (options,) = (p for p in parameters.values() if p.kind is p.VAR_KEYWORD)
    assert "RequestOptionsDict" in str(options.annotation)


def test_a_type_checker_reports_wrong_options(tmp_path: Path) -> None:
    """A misspelt name and a wrong type are errors in each call; what is right is none."""
    options = ["temperatur=0.1", 'max_tokens="3"']
    wrong = [f'_ = engine.{call}("x", {option})' for call in CALLS for option in options]
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "calls.py").write_text(SNIPPET + "\n".join(wrong) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "calls.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(Path(orion_oie.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    *errors, _summary = done.stdout.splitlines()
    errors = [line for line in errors if ": error: " in line]
    assert len(errors) == len(wrong), done.stdout + done.stderr
    first = SNIPPET.count("\n") + 1
    for number, (call, line) in enumerate(zip(wrong, errors, strict=True), first):
        assert line.startswith(f"calls.py:{number}: error: ")
        hint = 'did you mean "temperature"?' if "temperatur=" in call else '"max_tokens"'
        assert hint in line
