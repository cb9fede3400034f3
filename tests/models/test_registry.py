"""models.json: checked as a whole, resolved to files, changed and saved without half measures."""

import json
import resource
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orion_oie.errors import ModelNotFoundError, RegistryError, UnknownAgentError
from orion_oie.models.choices import Choice
from orion_oie.models.registry import ModelRegistry, registry_of
from orion_oie.models.specs import (
    AgentModels,
    AgentSpec,
    FusionSpec,
    ModelSpec,
    PriceSpec,
    PromptFormat,
    ProviderModel,
    ProviderSpec,
    Recommendation,
    RegistryFile,
    RoutingHints,
    ShardingSpec,
    SourceSpec,
    VariantSpec,
)
from orion_oie.schemas.requests import SamplingDefaults

TOP = Path(__file__).parents[2]
LITE = "smollm2-135m-instruct"
SHA = "0" * 64


def model(**changes: Any) -> dict[str, Any]:
    return {"name": "M", "license": "mit", "context_length": 512, "variants": {"v": variant()}} | (
        changes
    )


def variant(**source: Any) -> dict[str, Any]:
    return {
        "quantization": "Q8_0",
        "size_mb": 1,
        "min_ram_gb": 0.5,
        "source": source or {"path": "m.gguf"},
    }


def agent(primary: str = "m", **changes: Any) -> dict[str, Any]:
    models = {"primary": primary} | changes.pop("models", {})
    return {"name": "A", "description": "", "system_prompt": "", "models": models} | changes


def registry(base: Path = Path(), **changes: Any) -> ModelRegistry:
    raw = {"version": "1.0", "models": {"m": model()}, "agents": {"a": agent()}} | changes
    return ModelRegistry.parse(json.dumps(raw), base=base, name="test.json")


def problems(**changes: Any) -> list[str]:
    with pytest.raises(RegistryError) as caught:
        registry(**changes)
    found = caught.value.problems
    assert all(f"\n  - {problem}" in caught.value.message for problem in found)
    count = f"{len(found)} problem" + ("s" if len(found) > 1 else "")
    assert caught.value.message.startswith(f"test.json has {count}:\n")
    return found


# The packaged registry


def test_the_packaged_registry_is_sound() -> None:
    """The registry of the library loads, and each of its agents runs without a download."""
    packaged = ModelRegistry.packaged()
    assert "conversation" in packaged.agents
    for agent_id, spec in packaged.agents.items():
        assert spec.models.lite == (None if agent_id == "vision" else LITE)
        assert LITE in [choice.model_id for choice in packaged.resolve(agent_id)]
    assert packaged.models[LITE].variants["q4_1"].source.kind == "package"


def test_the_json_schema_is_in_step() -> None:
    """models.schema.json is what the library generates: `python -m orion_oie schema`."""
    written = json.loads((TOP / "models.schema.json").read_text(encoding="utf-8"))
    assert written == ModelRegistry.json_schema()


def test_an_engine_takes_a_registry_in_three_ways(tmp_path: Path) -> None:
    """Nothing is the packaged registry, a path is read, a registry is taken as it is."""
    given_one = registry(tmp_path)
    given_one.save(tmp_path / "r.json")
    assert registry_of(given_one) is given_one
    assert registry_of(str(tmp_path / "r.json")).data == given_one.data
    assert registry_of(None).data == ModelRegistry.packaged().data


# What is wrong with a file


def test_all_problems_are_listed_at_once() -> None:
    """Wrong shapes anywhere in the file are found in one reading, each with its place."""
    found = problems(
        models={
            "m": model(contxt_length=1, context_length=0),
            "bad id": model(),
            "none": model(variants={}),
        },
        agents={
            "a": agent(routing={"patterns": {"(": 1, "a": 0}, "exampels": []}),
            "b": agent(defaults={"temperature": 9}),
        },
        providers={"p": {"kind": "openai", "base_url": "localhost"}},
        verison="1",
    )
    assert sorted(problem.partition(": ")[0] for problem in found) == [
        "agents.a.routing.exampels",
        "agents.a.routing.patterns.(",
        "agents.a.routing.patterns.a",
        "agents.b.defaults.temperature",
        "models.bad id",
        "models.m.context_length",
        "models.m.contxt_length",
        "models.none.variants",
        "providers.p.base_url",
        "verison",
    ]
    assert "models.m.contxt_length: unknown key (did you mean 'context_length'?)" in found
    assert "agents.a.routing.exampels: unknown key (did you mean 'examples'?)" in found
    assert "verison: unknown key (did you mean 'version'?)" in found


def test_a_bad_pattern_says_what_is_wrong_with_it() -> None:
    """A regular expression that does not compile is found when the file is read."""
    (problem,) = problems(agents={"a": agent(routing={"patterns": {"a(b": 1}})})
    assert "not a regular expression: missing )" in problem


def test_references_to_nothing_are_all_found() -> None:
    """Every mention of a model or an agent that does not exist is listed, with the close name."""
    found = problems(
        models={"small": model(), "large": model()},
        agents={
            "a": agent("smal", models={"lite": "larg", "fallback": ["small", "qqq"]}),
            "b": agent("small", fallback_agent="c"),
        },
        model_groups={"g": ["large", "lagre"]},
        recommendations={"r": {"description": "", "min_ram_gb": 1, "models": ["zzz"]}},
    )
    assert found == [
        "agents.a.models.primary: there is no model 'smal' (did you mean 'small'?)",
        "agents.a.models.lite: there is no model 'larg' (did you mean 'large'?)",
        "agents.a.models.fallback: there is no model 'qqq'",
        "agents.b.fallback_agent: there is no agent 'c'",
        "model_groups.g: there is no model 'lagre' (did you mean 'large'?)",
        "recommendations.r.models: there is no model 'zzz'",
    ]


def test_an_agent_is_needed() -> None:
    """A registry without agents can answer nothing."""
    assert problems(agents={}) == ["agents: there is none"]


def test_an_id_is_used_once() -> None:
    """A key that appears twice in an object, or as a model and a custom model, is an error."""
    assert problems(custom_models={"m": model()}) == ["custom_models.m: 'models' has the same id"]
    text = json.dumps({"version": "1", "models": {"m": model()}, "agents": {"a": agent()}})
    twice = text.replace('"name": "M"', '"name": "M", "name": "N"').replace(
        '"version": "1"', '"version": "1", "version": "1"'
    )
    with pytest.raises(RegistryError) as caught:
        ModelRegistry.parse(twice, base=Path())
    assert caught.value.problems == [
        "'name' appears twice in one object",
        "'version' appears twice in one object",
    ]


@pytest.mark.parametrize(
    ("follows", "circles"),
    [
        ({"a": "a"}, ["a -> a"]),
        ({"a": "b", "b": "c", "c": "a"}, ["a -> b -> c -> a"]),
        ({"a": "b", "b": "c", "c": "b"}, ["b -> c -> b"]),
        ({"a": "b", "b": "a", "c": "d", "d": "c"}, ["a -> b -> a", "c -> d -> c"]),
        ({"a": "b", "b": "c", "d": "c"}, []),
    ],
)
def test_fallback_agents_must_not_go_in_a_circle(
    follows: dict[str, str], circles: list[str]
) -> None:
    """Each circle is reported once; chains that only join are fine."""
    agents = {name: agent(fallback_agent=follows.get(name)) for name in "abcd"}
    expected = [f"fallback agents go in a circle: {circle}" for circle in circles]
    assert (problems(agents=agents) if circles else []) == expected
    assert circles or registry(agents=agents).agents.keys() == set("abcd")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ({}, "exactly one of path, url, hub, package is needed, found none"),
        ({"path": "a", "hub": "o/r", "files": ["f"]}, "found ['path', 'hub']"),
        ({"url": "https://x"}, "a 'url' source needs 'shards'"),
        ({"hub": "o/r"}, "a 'hub' source needs 'files'"),
        ({"package": "p"}, "a 'package' source needs 'file'"),
        ({"path": "a", "revision": "main"}, "'revision' does not belong to a 'path' source"),
        ({"path": "a", "files": ["b"]}, "'files' does not belong to a 'path' source"),
        ({"hub": "o/r", "files": ["a", "b"], "sha256": [SHA]}, "1 sha256 values for 2 file(s)"),
        ({"hub": "no-slash", "files": ["f"]}, "String should match pattern"),
        ({"package": "a.b", "file": "f"}, "String should match pattern"),
        ({"path": "a", "sha256": ["xyz"]}, "String should match pattern"),
        ({"paht": "a"}, "unknown key (did you mean 'path'?)"),
    ],
)
def test_a_source_is_of_one_kind_and_complete(source: dict[str, Any], complaint: str) -> None:
    """A source that names no place, two places, or half of one is refused."""
    bad = variant() | {"source": source}
    assert complaint in " ".join(problems(models={"m": model(variants={"v": bad})}))


@pytest.mark.parametrize("size", ["Infinity", "1e999", "NaN"])
def test_sizes_are_finite(size: str) -> None:
    """A number that JSON cannot hold is refused: it could not be saved again."""
    text = json.dumps(registry().data.model_dump(mode="json", exclude_defaults=True))
    assert '"size_mb": 1.0' in text
    with pytest.raises(RegistryError, match=r"models\.m\.variants\.v\.size_mb: "):
        ModelRegistry.parse(text.replace('"size_mb": 1.0', f'"size_mb": {size}'), base=Path())


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\ufeff{}", '{"version": ' + "1" * 5000 + "}", "[" * 100_000],
    ids=["empty", "cut", "list", "null", "bom", "huge number", "deep"],
)
def test_nonsense_is_a_registry_error(text: str) -> None:
    """Whatever the file holds, the caller gets the one error that names the file."""
    with pytest.raises(RegistryError, match="odd\\.json"):
        ModelRegistry.parse(text, base=Path(), name="odd.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no text are registry errors with the path."""
    (tmp_path / "latin.json").write_bytes(b'{"version": "\xff"}')
    for name in ("missing.json", ".", "latin.json"):
        with pytest.raises(
            RegistryError, match=r"(cannot read|there is no) (the )?registry"
        ) as caught:
            ModelRegistry.load(tmp_path / name)
        assert str(tmp_path) in caught.value.message


# From an agent to files


def test_models_are_resolved_in_order() -> None:
    """Primary, lite, fallbacks, then the fallback agents', as far as they are written down."""
    chosen = registry(
        models={name: model() for name in ("p", "l", "f1", "f2", "o", "c", "x")},
        agents={
            "a": agent("p", models={"lite": "l", "fallback": ["f1", "f2"]}, fallback_agent="b"),
            "b": agent("o", models={"fallback": ["p"]}),
            "conversation": agent("c", models={"lite": "l"}),
            "unrelated": agent("x"),
        },
    ).resolve("a")
    assert [(choice.agent_id, choice.role, choice.model_id) for choice in chosen] == [
        ("a", "primary", "p"),
        ("a", "lite", "l"),
        ("a", "fallback", "f1"),
        ("a", "fallback", "f2"),
        ("b", "fallback", "o"),
    ]


def test_a_model_named_twice_is_tried_once() -> None:
    """The first mention of a model counts, whatever the roles."""
    chosen = registry(
        models={"p": model(), "q": model()},
        agents={"a": agent("p", models={"lite": "p", "fallback": ["q", "p", "q"]})},
    ).resolve("a")
    assert [(choice.role, choice.model_id) for choice in chosen] == [
        ("primary", "p"),
        ("fallback", "q"),
    ]


def test_the_conversation_agent_may_fall_back_too() -> None:
    """A chain through the conversation agent ends where it has been before."""
    chosen = registry(
        models={"p": model(), "q": model()},
        agents={"a": agent("p"), "conversation": agent("q", fallback_agent="a")},
    )
    assert [choice.model_id for choice in chosen.resolve("a")] == ["p"]
    assert [choice.model_id for choice in chosen.resolve("conversation")] == ["q", "p"]


def choice_of(base: Path, *variants: dict[str, Any]) -> Choice:
    listed = {f"v{number}": spec for number, spec in enumerate(variants)}
    (choice,) = registry(base, models={"m": model(variants=listed)}).resolve("a")
    return choice


def test_a_path_starts_at_the_registry_file(tmp_path: Path) -> None:
    """A relative path means the same wherever the program was started; an absolute one, itself."""
    (tmp_path / "weights").mkdir()
    there = tmp_path / "weights" / "m.gguf"
    there.touch()
    registry(tmp_path, models={"m": model(variants={"v": variant(path="weights/m.gguf")})}).save(
        tmp_path / "models.json"
    )
    (choice,) = ModelRegistry.load(tmp_path / "models.json").resolve("a")
    assert choice == Choice("a", "m", "primary", "v", (there,))
    assert choice_of(Path("/nowhere"), variant(path=str(there))).files == (there,)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    """A path without a file makes the model unavailable, and the reason names the path."""
    choice = choice_of(tmp_path, variant(path="m.gguf"))
    assert (choice.files, choice.variant) == (None, "v0")
    assert choice.why_unavailable.startswith(f"v0: {tmp_path / 'm.gguf'}: there is no such file")


def test_what_was_not_downloaded_is_unavailable(tmp_path: Path) -> None:
    """A remote source is not fetched, and every variant gives its reason."""
    choice = choice_of(
        tmp_path,
        variant(hub="org/repo", files=["a.gguf"]),
        variant(url="https://example.org/x", shards=["a.gguf"]),
    )
    assert choice.files is None
    assert choice.why_unavailable == (
        "v0: not downloaded from org/repo; v1: not downloaded from https://example.org/x"
    )


def test_the_first_variant_that_is_here_is_taken(tmp_path: Path) -> None:
    """Variants are looked at in the order of the file."""
    for name in ("b.gguf", "c.gguf"):
        (tmp_path / name).touch()
    choice = choice_of(
        tmp_path, variant(path="a.gguf"), variant(path="b.gguf"), variant(path="c.gguf")
    )
    assert (choice.variant, choice.files) == ("v1", (tmp_path / "b.gguf",))
    assert choice.why_unavailable == ""


def test_a_package_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in an installed package are located; its code is not run."""
    package = tmp_path / "weights_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('was imported')")
    (package / "m.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = choice_of(tmp_path, variant(package="weights_for_a_test", file="m.gguf"))
    assert found.files == (package / "m.gguf",)
    assert "weights_for_a_test" not in sys.modules
    other = choice_of(tmp_path, variant(package="weights_for_a_test", file="n.gguf"))
    assert other.why_unavailable == "v0: the package weights_for_a_test has no file n.gguf"


def test_a_package_that_is_not_installed_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No package, a plain module, and a module made by hand hold no weights."""
    monkeypatch.setitem(sys.modules, "made_by_hand", types.ModuleType("made_by_hand"))
    reasons = {
        "no_such_package_here": "v0: the package no_such_package_here is not installed",
        "made_by_hand": "v0: the package made_by_hand is not installed",
        "json_": "v0: the package json_ is not installed",
        "types": "v0: the package types has no file m.gguf",
    }
    for name, reason in reasons.items():
        assert choice_of(tmp_path, variant(package=name, file="m.gguf")).why_unavailable == reason


def test_the_lite_model_is_found_in_its_package(smollm2: Path) -> None:
    """The real package of the smollm2 extra gives the packaged agents their first answer."""
    chosen = ModelRegistry.packaged().resolve("conversation")
    (lite,) = [choice for choice in chosen if choice.model_id == LITE]
    assert (lite.role, lite.variant, lite.files) == ("lite", "q4_1", (smollm2,))


def test_unknown_names_get_a_suggestion() -> None:
    """Asking for an agent or a model that is not there names the close one."""
    known = registry(agents={"code": agent(), "creative": agent()})
    with pytest.raises(UnknownAgentError, match=r"'cod' \(did you mean 'code'\?\)") as caught:
        known.resolve("cod")
    assert caught.value.details == {"agent_id": "cod", "known": ["code", "creative"]}
    with pytest.raises(ModelNotFoundError, match="there is no model 'mm'") as missing:
        known.model("mm")
    assert missing.value.details == {"model_id": "mm"}


# Changes


@pytest.mark.parametrize("as_spec", [True, False], ids=["spec", "dictionary"])
def test_agents_and_models_are_added_while_running(as_spec: bool) -> None:
    """A new model and an agent that uses it are there at once, from a spec or a dictionary."""
    changed = registry()
    new_model, new_agent = model(name="New"), agent("n", models={"lite": "m"})
    changed.add_model("n", ModelSpec(**new_model) if as_spec else new_model)
    changed.add_agent("b", AgentSpec(**new_agent) if as_spec else new_agent)
    assert changed.models["n"].name == "New"
    assert changed.data.custom_models == {"n": ModelSpec(**new_model)}
    assert [choice.model_id for choice in changed.resolve("b")] == ["n", "m"]


def test_an_agent_and_a_custom_model_can_be_replaced() -> None:
    """Adding under a known name replaces what was there."""
    changed = registry()
    for name in ("first", "second"):
        changed.add_model("n", model(name=name))
        changed.add_agent("a", agent("n", system_prompt=name))
    assert changed.models["n"].name == changed.agents["a"].system_prompt == "second"


def test_the_registry_s_own_models_are_not_replaced() -> None:
    """A custom model cannot take the id of one that others rely on."""
    changed = registry()
    before = changed.data
    with pytest.raises(RegistryError, match="'m' is one of the registry's own models"):
        changed.add_model("m", model())
    assert changed.data is before


@pytest.mark.parametrize(
    ("name", "spec", "complaint"),
    [
        ("b", agent("nope"), "agents.b.models.primary: there is no model 'nope'"),
        ("b", agent(fallback_agent="b"), "fallback agents go in a circle: b -> b"),
        ("a", agent(temperature=1), "agents.a.temperature: unknown key"),
        ("bad id", agent(), "agents.bad id: String should match pattern"),
        ("b", 3, "agents.b: Input should be a valid dictionary"),
        ("b", {}, "agents.b.models: missing"),
    ],
)
def test_a_wrong_addition_changes_nothing(name: str, spec: Any, complaint: str) -> None:
    """An agent that would make the registry wrong is refused with every reason, and forgotten."""
    changed = registry()
    before = changed.data
    with pytest.raises(RegistryError) as caught:
        changed.add_agent(name, spec)
    assert any(problem.startswith(complaint) for problem in caught.value.problems)
    assert changed.data is before


def test_what_was_read_is_not_what_is_changed() -> None:
    """The dictionary given by the caller stays the caller's."""
    changed = registry()
    mine = agent()
    changed.add_agent("b", mine)
    mine["models"]["primary"] = "other"
    assert changed.agents["b"].models.primary == "m"


# Saving


def test_the_packaged_registry_survives_saving(tmp_path: Path) -> None:
    """Nothing of a full registry is lost or altered by writing and reading it."""
    packaged = ModelRegistry.packaged()
    packaged.save(tmp_path / "copy.json")
    assert ModelRegistry.load(tmp_path / "copy.json").data == packaged.data
    assert [path.name for path in tmp_path.iterdir()] == ["copy.json"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    """When the disk is full in the middle, the old registry stays and nothing else is left."""
    path = tmp_path / "models.json"
    registry().save(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="File too large"), full_disk(len(before) // 2):
        registry().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A target that is a folder, or in no folder, is an error without left-overs."""
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", tmp_path / "missing" / "models.json"):
        with pytest.raises(OSError, match=str(tmp_path)):
            registry().save(target)
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,7}", fullmatch=True)
texts = st.text(max_size=8)
sizes = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
prices = st.builds(
    PriceSpec,
    prompt=st.floats(min_value=0, allow_infinity=False),
    completion=st.floats(min_value=0, allow_infinity=False),
)
shas = st.just(SHA) | st.just("f" * 64)
addresses = texts.filter(len).filter(lambda text: "?" not in text)  # a signature is not saved
sources = (
    st.builds(SourceSpec, path=texts.filter(len), sha256=st.lists(shas, max_size=1))
    | st.builds(SourceSpec, url=addresses, shards=st.lists(texts, min_size=1, max_size=2))
    | st.builds(SourceSpec, hub=st.just("o/r"), files=st.just(["f"]), revision=st.none() | texts)
    | st.builds(SourceSpec, package=st.just("p"), file=texts.filter(len))
)
variants = st.builds(
    VariantSpec,
    quantization=texts,
    size_mb=sizes,
    min_ram_gb=sizes,
    source=sources,
    sharding=st.none() | st.builds(ShardingSpec, num_shards=st.integers(1, 99)),
)
model_specs = st.builds(
    ModelSpec,
    name=texts,
    version=texts,
    type=st.sampled_from(["causal-lm", "vision-lm", "embedding"]),
    license=texts,
    context_length=st.integers(1, 2**40),
    prompt_format=st.none() | st.builds(PromptFormat, user_prefix=texts, assistant_prefix=texts),
    variants=st.dictionaries(ids, variants, min_size=1, max_size=2),
    price=st.none() | prices,
    fusion=st.none() | st.builds(FusionSpec, method=texts, sources=st.lists(ids, max_size=2)),
)
weights = st.floats(min_value=0, max_value=100, exclude_min=True)
agent_specs = st.builds(
    AgentSpec,
    name=texts,
    description=texts,
    capabilities=st.lists(texts, max_size=2),
    system_prompt=texts,
    models=st.builds(AgentModels, primary=st.just("m"), lite=st.none() | st.just("m")),
    routing=st.builds(
        RoutingHints,
        keywords=st.dictionaries(texts, weights, max_size=2),
        features=st.dictionaries(st.just("code_shape"), weights),
    ),
    defaults=st.builds(
        SamplingDefaults,
        temperature=st.none() | st.floats(0, 5),
        stop=st.none() | st.lists(texts.filter(len), max_size=2),
    ),
    fallback_agent=st.none() | st.just("last"),
)
last_agent = agent_specs.map(lambda spec: spec.model_copy(update={"fallback_agent": None}))
registries = st.builds(
    RegistryFile,
    version=texts,
    models=model_specs.filter(lambda spec: spec.type != "embedding").map(lambda spec: {"m": spec}),
    agents=st.tuples(last_agent, st.dictionaries(ids, agent_specs, max_size=2)).map(
        lambda parts: {**parts[1], "last": parts[0]}
    ),
    custom_models=st.dictionaries(ids.filter(lambda name: name != "m"), model_specs, max_size=1),
    model_groups=st.dictionaries(texts, st.just(["m"]), max_size=1),
    recommendations=st.dictionaries(
        texts,
        st.builds(
            Recommendation,
            description=texts,
            min_ram_gb=st.floats(min_value=0, allow_infinity=False),
            models=st.just(["m"]),
        ),
        max_size=1,
    ),
    providers=st.dictionaries(
        ids,
        st.builds(
            ProviderSpec,
            kind=st.sampled_from(["openai", "anthropic", "ollama"]),
            base_url=st.just("http://localhost"),
            models=st.dictionaries(
                texts, st.builds(ProviderModel, name=texts, price=prices), max_size=1
            ),
        ),
        max_size=1,
    ),
)


@settings(max_examples=60)
@given(data=registries)
def test_any_registry_survives_saving(
    tmp_path_factory: pytest.TempPathFactory, data: RegistryFile
) -> None:
    """Reading what was written gives the same registry, whatever texts and numbers it holds."""
    path = tmp_path_factory.getbasetemp() / "any-registry.json"
    ModelRegistry(data, path.parent).save(path)
    assert ModelRegistry.load(path).data == data
