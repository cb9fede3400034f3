"""The messages of the library at the command line: options in place of settings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import orion_oie
from orion_oie import EngineConfig, InvalidRequestError, ModelNotFoundError, RequestOptions
from orion_oie.cli.hints import ARGUMENTS, SETTINGS, in_options, message_of
from orion_oie.cli.main import commands
from orion_oie.errors import UnknownAgentError

PACKAGE = Path(orion_oie.__file__).parent
NOT_ON_THE_COMMAND_LINE = {
    "EngineConfig.router.feedback",  # result.feedback is for programs
    "EngineConfig.logs.include_content",  # a constant's description
    "EngineConfig.loading.sharding",
    "EngineConfig",
}


def messages() -> Iterator[tuple[str, str]]:
    """(file, text) of each text in the library that names a setting and is no docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "cli" or path.name == "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        docs |= {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.keyword) and node.arg == "description"
        }
        inside = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if id(node) in docs or id(node) in inside:
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "X"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if path.name == "stand_ins.py":  # a warning, which the commands do not let come
                continue
            if "EngineConfig" in text or "OrionInferenceEngine(" in text:
                yield path.name, text


def options_of_commands() -> set[str]:
    found: set[str] = set()
    waiting = [commands]
    while waiting:
        command = waiting.pop()
        found |= {name for parameter in command.params for name in parameter.opts}
        waiting += getattr(command, "commands", {}).values()
    return found


def test_no_message_of_the_library_names_a_setting_of_python() -> None:
    """Each is rewritten, whoever adds one: what has no option is left out."""
    found = list(messages())
    assert len(found) > 5
    for file, text in found:
        named = set(re.findall(r"EngineConfig[\w.]*\b|OrionInferenceEngine\(", in_options(text)))
        assert named <= NOT_ON_THE_COMMAND_LINE, f"{file}: {text}"


def test_the_tables_are_right() -> None:
    """Settings, arguments and options exist."""
    for setting, option in SETTINGS.items():
        section, name = setting.split(".")
        assert name in getattr(EngineConfig(), section).model_fields_set | set(
            type(getattr(EngineConfig(), section)).model_fields
        )
        assert option in options_of_commands()
    others = {"cache_dir", "context_length"}
    assert set(ARGUMENTS) - others <= set(RequestOptions.model_fields)
    assert set(ARGUMENTS.values()) <= options_of_commands()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "fetch one with 'orion-oie pull code', set EngineConfig.download.auto, install",
            "fetch one with 'orion-oie pull code', add --auto-download, install",
        ),
        (
            "context holds 64; shorten the question or the history, lower max_tokens, pass "
            'on_overflow="drop_oldest", or raise EngineConfig.serving.context_length',
            "context holds 64; shorten the text, lower --max-tokens, or raise --context-length",
        ),
        (
            "the limit is 9; shorten it or raise EngineConfig.guardrails.max_query_chars",
            "the limit is 9; shorten it",
        ),
        ("not loaded within 9 s; raise EngineConfig.loading.timeout_s", "not loaded within 9 s"),
        ("make room, or choose another cache_dir", "make room, or choose another --cache-dir"),
        (
            "it is a model: OrionInferenceEngine(model='a.gguf') answers",
            "it is a model: -m a.gguf answers",
        ),
        (
            "passed as OrionInferenceEngine('a.json'); model= is for a GGUF file",
            "passed as --registry a.json; -m is for a GGUF file",
        ),
        ("images[0]: there is no file 'x'", "--image: there is no file 'x'"),
        ("grammar, line 1: no", "--grammar, line 1: no"),
        ("a grammar is no problem", "a grammar is no problem"),
        ("json_schema at /a: 'type' is wrong", "--json-schema at /a: 'type' is wrong"),
        ("cannot read /data/cache_dir/m", "cannot read /data/cache_dir/m"),
        ("there is no file 'max_tokens'", "there is no file 'max_tokens'"),
    ],
)
def test_options_stand_in_place_of_settings(said: str, shown: str) -> None:
    """Names in paths and in quotes are what somebody else called something."""
    assert in_options(said) == shown


def test_wrong_values_are_named_by_their_option() -> None:
    """Of a request, and of the configuration; what has no option keeps its name."""
    problems = ["temperature: too much", "download.connections: too few", "stop.0: empty", "a.b: x"]
    error = InvalidRequestError("; ".join(problems), problems=problems)
    assert message_of(error) == (
        "--temperature: too much; --connections: too few; --stop: empty; a.b: x"
    )


def test_unknown_names_say_where_the_right_ones_are() -> None:
    """An agent by its option, a model by the lists."""
    agent = UnknownAgentError("there is no agent 'x'; known are a", agent_id="x")
    assert message_of(agent) == "--agent: there is no agent 'x'; known are a"
    model = ModelNotFoundError("there is no agent and no model 'x'", name="x")
    assert message_of(model) == (
        "there is no agent and no model 'x'; 'orion-oie models' and 'orion-oie agents' list them"
    )
