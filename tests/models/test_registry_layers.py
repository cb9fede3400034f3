"""Registry files that build on another one, and a registry that is changed while it runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_llama

from orion_oie import (
    AgentModels,
    EngineConfig,
    LoadingConfig,
    ModelRegistry,
    OrionInferenceEngine,
    RegistryError,
    ServingConfig,
    UnknownAgentError,
)
from orion_oie.models.layers import changes_between, merged
from orion_oie.models.registry import registry_of
from orion_oie.models.user_folders import registry_file

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str = "models.json", **content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    return write_file


MINE = {"mine": {"source": {"path": "mine.gguf"}}}


# Merging


@pytest.mark.parametrize(
    ("base", "changes", "after"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": 1}, {"a": {"b": None}}, {"a": {}}),
        # What belongs together is replaced as a whole:
        (
            {"agents": {"x": {"models": {"primary": "p", "lite": "l"}, "name": "X"}}},
            {"agents": {"x": {"models": {"primary": "q"}}}},
            {"agents": {"x": {"models": {"primary": "q"}, "name": "X"}}},
        ),
        (
            {"models": {"m": {"variants": {"a": {"source": {"hub": "o/r"}, "size_mb": 1}}}}},
            {"models": {"m": {"variants": {"a": {"source": {"path": "p"}}}}}},
            {"models": {"m": {"variants": {"a": {"source": {"path": "p"}, "size_mb": 1}}}}},
        ),
        # The models of the file itself are many, and merged:
        ({"models": {"m": 1}}, {"models": {"n": 2}}, {"models": {"m": 1, "n": 2}}),
        # One source takes the place of several variants:
        (
            {"models": {"m": {"name": "M", "variants": {"a": {"source": {"path": "a"}}}}}},
            {"models": {"m": {"source": {"path": "p"}}}},
            {"models": {"m": {"name": "M", "source": {"path": "p"}}}},
        ),
    ],
)
def test_changes_are_merged(base: Any, changes: Any, after: Any) -> None:
    """By the rules of JSON Merge Patch, except for what belongs together."""
    assert merged(base, changes) == after


keys = st.sampled_from(["models", "source", "variants", "agents", "a", "b"])
values = st.recursive(
    st.integers(0, 3) | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)
objects = st.dictionaries(keys.filter(lambda key: key != "source"), values, max_size=3)


def without_shorthand(value: Any) -> bool:
    """A saved registry has `variants`, and never `source` beside them."""
    if not isinstance(value, dict):
        return True
    return not {"source", "variants"} <= value.keys() and all(
        map(without_shorthand, value.values())
    )


@settings(max_examples=300)
@given(base=objects.filter(without_shorthand), after=objects.filter(without_shorthand))
def test_what_changed_is_what_has_to_be_merged(base: dict[str, Any], after: dict[str, Any]) -> None:
    """The differences of two registries make the one of the other."""
    assert merged(base, changes_between(base, after)) == after


# Files


def test_a_file_adds_to_the_packaged_registry(write: Write) -> None:
    """One model and one field of an agent; all else is as the library has it."""
    path = write(
        extends="packaged",
        models=MINE,
        agents={"code": {"models": {"primary": "mine"}, "defaults": {"temperature": 0.1}}},
    )
    registry, packaged = ModelRegistry.load(path), ModelRegistry.packaged()
    assert set(registry.agents) == set(packaged.agents)
    assert set(registry.models) == {*packaged.models, "mine"}
    code, before = registry.agent("code"), packaged.agent("code")
    assert code.models == AgentModels(primary="mine")
    assert code.system_prompt == before.system_prompt
    assert code.defaults == before.defaults.model_copy(update={"temperature": 0.1})
    assert [link.model_id for link in registry.chain("code")] == ["mine"]
    assert registry.chain("creative") == packaged.chain("creative")


def test_a_file_extends_another_one(write: Write, tmp_path: Path) -> None:
    """Each file's relative paths start at its own folder; the last word counts."""
    write("base/models.json", extends="packaged", models=MINE)
    write("team/models.json", extends="../base/models.json", models={"mine": {"license": "mit"}})
    path = write("own.json", extends="team/models.json", agents={"vision": None})
    registry = ModelRegistry.load(path)
    mine = registry.model("mine")
    assert mine.license == "mit"
    assert mine.variants["default"].source.path == str(tmp_path / "base" / "mine.gguf")
    assert "vision" not in registry.agents
    assert len(registry.agents) == len(ModelRegistry.packaged().agents) - 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"extends": "nowhere.json"}, "extends 'nowhere.json'.*nowhere.json"),
        ({"extends": "models.json"}, "circle"),
        ({"extends": 3}, "extends: Input should be a valid string"),
        ({"extends": "packaged", "agents": {"cod": {"system_prompt": "x"}}}, "agents.cod.models"),
        ({"extends": "packaged", "agents": {"code": {"modls": {}}}}, "did you mean 'models'"),
        ({"extends": "packaged", "models": {"m": {"sorce": {}}}}, "models.m"),
        ({"extends": "packaged", "models": {"smollm2-135m-instruct": None}}, "there is no model"),
        (
            {"extends": "packaged", "models": {"m": {"source": {"path": "m"}, "variants": {}}}},
            "'source' is for a model without 'variants'",
        ),
    ],
)
def test_what_is_wrong_with_a_file(write: Write, content: dict[str, Any], complaint: str) -> None:
    """The file and the place are named."""
    with pytest.raises(RegistryError, match=complaint):
        ModelRegistry.load(write(**content))


def test_only_the_differences_are_written(write: Write, tmp_path: Path) -> None:
    """A later library brings its new models; what was removed stays removed."""
    registry = ModelRegistry.load(write(extends="packaged", models=MINE))
    registry.update_agent("code", system_prompt="Be brief.", defaults={"temperature": 0.0})
    registry.remove_agent("vision")
    registry.save(tmp_path / "models.json")
    written = json.loads((tmp_path / "models.json").read_text())
    assert written["extends"] == "packaged"
    assert set(written["models"]) == {"mine"}
    assert written["agents"] == {
        "vision": None,
        "code": {"system_prompt": "Be brief.", "defaults": {"temperature": 0.0}},
    }
    again = ModelRegistry.load(tmp_path / "models.json")
    assert again.data == registry.data
    assert again.chain("creative") == registry.chain("creative")


def test_a_registry_is_saved_elsewhere(write: Write, tmp_path: Path) -> None:
    """Its files are found from there, too."""
    registry = ModelRegistry.load(write(extends="packaged", models=MINE))
    (tmp_path / "elsewhere").mkdir()
    registry.save(tmp_path / "elsewhere" / "models.json")
    again = ModelRegistry.load(tmp_path / "elsewhere" / "models.json")
    path = again.model("mine").variants["default"].source.path
    assert path == str(tmp_path / "mine.gguf")


# The registry of a program that names none


def test_the_user_has_a_registry(write: Write, tmp_path: Path, monkeypatch: Any) -> None:
    """`ORION_REGISTRY` comes first, then the file in the configuration folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry_of(None).data == ModelRegistry.packaged().data
    own = registry_file()
    assert tmp_path in own.parents
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"extends": "packaged", "models": MINE}))
    assert registry_of(None).model("mine").variants["default"].source.path == "mine.gguf"
    assert registry_of(None).variants("mine")[0].why_not_here.startswith(str(own.parent))
    named = write("named.json", extends="packaged", models={"other": MINE["mine"]})
    monkeypatch.setenv("ORION_REGISTRY", str(named))
    assert "other" in registry_of(None).models
    assert "mine" not in registry_of(None).models
    with OrionInferenceEngine() as engine:
        assert "other" in engine.registry.models


@pytest.mark.parametrize("content", [None, "{", '{"agents": {}}'])
def test_a_wrong_user_registry_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """Nothing falls back to the packaged one."""
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("ORION_REGISTRY", str(path))
    with pytest.raises(RegistryError, match=r"ORION_REGISTRY: .*r\.json"):
        OrionInferenceEngine()


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ({"sorce": {"path": "m.gguf"}}, "did you mean 'source'"),
        ({"path": "m.gguf"}, "known are .*source"),
        ({"source": "m.gguf"}, 'a source is an object, such as {"path"'),
        ({"source": {"pth": "m.gguf"}}, "did you mean 'path'"),
    ],
)
def test_what_is_wrong_with_a_source(write: Write, model: dict[str, Any], complaint: str) -> None:
    """The right key is suggested, or shown."""
    with pytest.raises(RegistryError, match=complaint):
        ModelRegistry.load(write(extends="packaged", models={"m": model}))


def test_a_registry_that_is_not_there(write: Write) -> None:
    """Its absolute path, and the one that was meant."""
    path = write("models.json")
    with pytest.raises(RegistryError, match=r"no registry /.*modls\.json .*'models\.json'"):
        ModelRegistry.load(path.with_name("modls.json"))


# Changes while it runs


def test_single_fields_of_an_agent() -> None:
    """A text, an object merged by key, a list replaced, a key removed; the rest stays."""
    registry = ModelRegistry.packaged()
    before = registry.agent("code")
    registry.update_agent(
        "code",
        system_prompt="Be brief.",
        defaults={"temperature": 0.0, "top_p": None},
        capabilities=["x"],
        routing={"keywords": {"zig": 2, "python": None}},
    )
    after = registry.agent("code")
    assert (after.system_prompt, after.capabilities) == ("Be brief.", ["x"])
    assert (after.defaults.temperature, after.defaults.top_p) == (0.0, None)
    assert after.defaults.max_tokens == before.defaults.max_tokens
    assert after.routing.keywords["zig"] == 2
    assert "python" not in after.routing.keywords
    assert len(after.routing.keywords) == len(before.routing.keywords)
    assert after.models == before.models
    assert registry.agent("creative") is ModelRegistry.agent(registry, "creative")


def test_specs_are_fields_too() -> None:
    """What the library's classes make is taken as well as dictionaries."""
    registry = ModelRegistry.packaged()
    registry.update_agent("code", models=AgentModels(primary="qwen2.5-7b-instruct"))
    assert registry.agent("code").models.lite is None


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"sytem_prompt": "x"}, "did you mean 'system_prompt'"),
        ({"models": {"primary": "nope"}}, "there is no model 'nope'"),
        ({"models": {"lite": "smollm2-135m-instruct"}}, "models.primary: missing"),
        ({"models": None}, "models: missing"),
        ({"fallback_agent": "code"}, "circle"),
        ({"defaults": {"temperature": -1}}, "temperature"),
        ({"system_prompt": 3}, "system_prompt"),
    ],
)
def test_a_wrong_change_changes_nothing(fields: dict[str, Any], complaint: str) -> None:
    """The registry stays as it was, to the object."""
    registry = ModelRegistry.packaged()
    before = registry.data
    with pytest.raises(RegistryError, match=complaint):
        registry.update_agent("code", **fields)
    assert registry.data is before
    with pytest.raises(UnknownAgentError, match="did you mean 'code'"):
        registry.update_agent("cod", **fields)


def test_agents_are_removed() -> None:
    """Unless others fall back to them, or none would be left."""
    registry = ModelRegistry.packaged()
    registry.add_agent("a", {"models": {"primary": "qwen2.5-7b-instruct"}})
    registry.add_agent("b", {"models": {"primary": "qwen2.5-7b-instruct"}, "fallback_agent": "a"})
    with pytest.raises(RegistryError, match=r"agent 'a' cannot be removed: agents\.b"):
        registry.remove_agent("a")
    registry.remove_agent("b")
    registry.remove_agent("a")
    with pytest.raises(UnknownAgentError):
        registry.remove_agent("a")
    for agent_id in list(registry.agents)[1:]:
        registry.remove_agent(agent_id)
    with pytest.raises(RegistryError, match="there is none"):
        registry.remove_agent(next(iter(registry.agents)))
    assert len(registry.agents) == 1


def test_the_next_request_sees_a_change(tmp_path: Path) -> None:
    """An agent that was updated answers with its new prompt and its new model at once."""
    one, two = (write_tiny_llama(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    config = EngineConfig(
        serving=ServingConfig(slots=1, threads=1), loading=LoadingConfig(keep_spare_worker=False)
    )
    with OrionInferenceEngine(model=one, config=config) as engine:
        first = engine.infer("Hi", agent="code", max_tokens=2)
        engine.registry.update_agent("code", system_prompt="x")
        short = engine.infer("Hi", agent="code", max_tokens=2)
        assert short.usage.prompt_tokens < first.usage.prompt_tokens
        engine.registry.add_gguf(two, agent="code")
        assert engine.infer("Hi", agent="code", max_tokens=2).model_id == "two"
        engine.registry.remove_agent("code")
        with pytest.raises(UnknownAgentError):
            engine.infer("Hi", agent="code")
