"""`orion-oie route`: what it prints is what the router says, and what it learns stays learned."""

import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import PoolingType
from helpers import config_with
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackServer
from minilm import write_minilm

from orion_oie import Message, ModelRegistry, OrionInferenceEngine, Route
from orion_oie.cli.console import (
    GLUE,
    print_table,
    print_wrapped,
)
from orion_oie.cli.main import main
from orion_oie.engine.router_embedder import RouterEmbedder
from orion_oie.routing.base import RouteContext
from orion_oie.routing.candidates import candidates
from orion_oie.routing.evaluation import Judged, judged, score
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.linear.fitting import (
    Example,
    read_examples,
)
from orion_oie.routing.linear.holdout import split
from orion_oie.routing.linear.model import (
    load_model,
    shipped_model,
)

QUESTION = "Write a Python function that adds two numbers"
MISLEADING = "Write a poem about Python the snake"
VAGUE = "the boat thing with the numbers again"
TIME = re.compile(r"time      \d+\.\d ms; the first question of a process \d+ ms")
OWN = Path(__file__).parents[2] / "benchmarks" / "routing" / "own.jsonl"
MINILM = "all-minilm-l6-v2"

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of this test, and a terminal of 80 columns."""
    monkeypatch.setenv("ORION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def run(*arguments: object) -> int:
    return main(["route", *map(str, arguments)])


def printed(capsys: Capture, *arguments: object) -> str:
    """The standard output of a command that must succeed."""
    assert run(*arguments) == 0
    return capsys.readouterr().out


def routed(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """A route as JSON."""
    facts: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return facts


def route_of(question: str, **context: Any) -> Route:
    agents = ModelRegistry.packaged().agents
    return HybridRouter().route(question, agents, RouteContext(**context))


def head_of(out: str) -> str:
    """The head of the table of agents."""
    return next(line for line in out.splitlines() if line.startswith("agent "))


def registry_file(folder: Path, change: Any) -> Path:
    """The packaged registry with a change, as a file."""
    raw = json.loads(ModelRegistry.packaged().data.model_dump_json(exclude_defaults=True))
    change(raw)
    path = folder / "models.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


# -- one question


@pytest.mark.parametrize("question", [QUESTION, MISLEADING, "train", "What day is it? 🙂", "¿?"])
def test_a_question_is_explained(question: str, capsys: Capture) -> None:
    """Agent, confidence and reason; every agent with its probability after every stage; the
    evidence; all of it within 80 columns."""
    expected = route_of(question)
    out = printed(capsys, "--no-embeddings", "--", question)
    lines = out.splitlines()
    start = f"{expected.agent_id}  {expected.confidence:.2f}  "
    why = "there is no word" if question == "¿?" else "reads most like"
    assert lines[0].startswith(f"{start}{why}")
    head = lines.index(head_of(out))
    assert lines[head].split() == ["agent", "probability", *expected.stages]
    table = [line.split() for line in lines[head + 1 : head + 1 + len(expected.candidates)]]
    assert table == [
        [one.agent_id, f"{one.score:.2f}", *(f"{one.stages[s]:.2f}" for s in expected.stages)]
        for one in expected.candidates
    ]
    shown = " ".join(out.split())
    for one in expected.candidates:
        for name, weight in one.evidence.items():
            text = name.removeprefix("shape: ").partition(":")[2] or name.removeprefix("shape: ")
            assert f"{weight:.2f}" in shown
            assert text[:20] in shown
    assert f"language  {expected.language or 'unknown'}" in lines
    assert TIME.fullmatch(lines[-1])
    assert max(map(len, lines)) <= 80


def test_a_route_as_json_is_the_plan_of_an_engine(capsys: Capture) -> None:
    """The command line and an application see the same route, whole patterns included."""
    with OrionInferenceEngine() as engine:
        planned = engine.plan(MISLEADING).route.model_dump(mode="json")
    facts = routed(capsys, MISLEADING)
    assert facts.pop("ms") > 0
    assert facts.pop("first_ms") > 0
    # Times apart, only the residency of models could differ, and none is in memory.
    assert facts == planned


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        ((QUESTION, "--json"), QUESTION),
        (("--json", QUESTION), QUESTION),
        (("--json", "--", "train"), "train"),
        (("--json", "evaluate"), "evaluate"),
        (("QUESTION", "--json"), "QUESTION"),
        (("--json", "--", "--json"), "--json"),
    ],
    ids=str,
)
def test_what_is_no_command_is_a_question(
    arguments: tuple[str, ...], question: str, capsys: Capture
) -> None:
    """Options may come first, and `--` makes a question of anything."""
    found = Route.model_validate(
        {k: v for k, v in json.loads(printed(capsys, *arguments)).items() if "ms" not in k}
    )
    expected = route_of(question)
    assert (found.agent_id, found.confidence) == (expected.agent_id, expected.confidence)


def test_a_command_is_no_question(capsys: Capture) -> None:
    """The first word `train` asks for files."""
    assert run("train") == 2
    assert "Usage: orion-oie route train [OPTIONS]" in capsys.readouterr().err


def test_a_question_may_come_from_the_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """`-` reads it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert routed(capsys, "-")["agent_id"] == "code"


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(question: str, capsys: Capture) -> None:
    """As `infer` would."""
    assert run(question) == 1
    assert capsys.readouterr().err.startswith("error: the question is")


def test_nothing_of_a_question_acts_on_the_terminal(capsys: Capture) -> None:
    """Words of the question are shown without its control characters."""
    out = printed(capsys, "Translate the word \x1b[2Jhouse\x9b into Polish, \x07please")
    assert re.findall(r"[^\n\x20-\x7e]", out) == []


def test_earlier_questions_keep_a_conversation_where_it_is(capsys: Capture) -> None:
    """A follow-up stays with the agent of the turns before; the stage and the reason are shown."""
    follow_up, turns = "and the other way round?", ["Write hello world in Rust", QUESTION]
    options = [part for turn in turns for part in ("--session-turn", turn)]
    alone, after = routed(capsys, follow_up), routed(capsys, follow_up, *options)
    assert alone["agent_id"] != "code"
    assert after["agent_id"] == "code"
    history = [Message(role="user", content=turn) for turn in turns]
    expected = route_of(follow_up, history=history)
    assert after["confidence"] == expected.confidence
    out = printed(capsys, follow_up, *options, "--no-embeddings")
    assert head_of(out).split()[-1] == "session"
    assert " ".join(out.split()).count(expected.notes[0]) == 1


def test_an_image_goes_to_whom_it_concerns(tmp_path: Path, capsys: Capture) -> None:
    """No text is looked at; where nobody looks at images, it is said."""
    out = printed(capsys, "what is this", "--image", 2)
    assert out.splitlines()[0].startswith("vision  0.97  images are attached")
    assert "language" not in out
    blind = registry_file(tmp_path, lambda raw: raw["agents"].pop("vision"))
    out = printed(capsys, "what is this", "--image", 1, "--registry", blind)
    assert "note      no agent looks at images" in out.splitlines()


def test_many_agents_are_not_all_listed(tmp_path: Path, capsys: Capture) -> None:
    """Ten are; how many are left out is said."""

    def add(raw: dict[str, Any]) -> None:
        for number in range(20):
            raw["agents"][f"more-{number}"] = {
                **raw["agents"]["conversation"],
                "routing": {"topics": ["conversation"]},
            }

    path = registry_file(tmp_path, add)
    count = len(candidates(ModelRegistry.load(path).agents, images=0))
    out = printed(capsys, QUESTION, "--registry", path, "--no-embeddings")
    assert f"and {count - 10} agents that are less probable" in out.splitlines()


# -- the embedding model


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_minilm(tmp_path_factory.mktemp("minilm") / "minilm.gguf")


def with_embeddings(folder: Path, source: dict[str, Any]) -> Path:
    variant = {"quantization": "F16", "size_mb": 46, "min_ram_gb": 0.1, "source": source}

    def change(raw: dict[str, Any]) -> None:
        raw["models"][MINILM]["variants"] = {"f16": variant}

    return registry_file(folder, change)


def test_the_embedding_model_is_asked_when_it_is_here(
    minilm: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Its stage has a column; `--no-embeddings` leaves it out, and says nothing of it."""
    registry = with_embeddings(tmp_path, {"path": str(minilm)})
    with_it = routed(capsys, VAGUE, "--registry", registry)
    assert "embedding" in with_it["stages"]
    assert "embedding" in head_of(printed(capsys, VAGUE, "--registry", registry))
    without = routed(capsys, VAGUE, "--registry", registry, "--no-embeddings")
    assert "embedding" not in without["stages"]
    assert without["notes"] == []
    named = routed(capsys, VAGUE, "--registry", registry, "--embedding-model", MINILM)
    assert named["confidence"] == pytest.approx(with_it["confidence"], abs=1e-3)


def test_the_embedding_model_is_never_fetched(
    only_this_machine: None, tmp_path: Path, capsys: Capture
) -> None:
    """One that is not here is a note; nobody is asked for it."""
    (tmp_path / "served").mkdir()
    with LoopbackServer(tmp_path / "served") as server:
        source = {"url": server.url, "shards": ["minilm.gguf"]}
        registry = with_embeddings(tmp_path, source)
        out = printed(capsys, VAGUE, "--registry", registry)
        assert server.requests == []
    assert f"note      the embedding model {MINILM} is not here" in out.splitlines()


def test_an_unknown_embedding_model_is_refused(capsys: Capture) -> None:
    """With the closest name."""
    assert run(QUESTION, "--embedding-model", "all-minilm-l6") == 1
    assert f"did you mean '{MINILM}'" in capsys.readouterr().err


# -- training

PLANT = [
    "Reset the controller of turbine 2",
    "The feed pump trips on low suction pressure",
    "What is the alarm limit for the bearing temperature?",
    "Start the second boiler with the bypass valve open",
    "Turbine 1 vibrates after the restart, what should we check?",
    "Which valve isolates the condenser?",
    "Why does the boiler pressure fall when the second pump starts?",
    "Log that the turbine controller was replaced",
    "Who confirmed the alarm of the second feed pump?",
    "The condenser valve does not close",
]
LOOSE = ("--pull", "0.1", "--no-embeddings")
ASKED = "The turbine trips on low suction pressure"


def write_examples(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry that has an agent `plant`, its questions, and trained weights."""
    folder = tmp_path_factory.mktemp("plant")

    def add(raw: dict[str, Any]) -> None:
        conversation = raw["agents"]["conversation"]
        raw["agents"]["plant"] = {**conversation, "name": "Plant", "routing": {}}

    registry = registry_file(folder, add)
    rows = [{"text": text, "label": "plant"} for text in PLANT]
    examples = write_examples(folder / "plant.jsonl", rows)
    out = folder / "weights.npz"
    assert run("train", examples, *LOOSE, "--registry", registry, "--out", out) == 0
    return folder


def test_what_was_learned_is_used(plant: Path, capsys: Capture) -> None:
    """By `--weights`, and by an engine; without them the agent gets nothing."""
    registry, weights = plant / "models.json", plant / "weights.npz"
    assert routed(capsys, ASKED, "--registry", registry)["agent_id"] != "plant"
    found = routed(capsys, ASKED, "--registry", registry, "--weights", weights)
    assert found["agent_id"] == "plant"
    with OrionInferenceEngine(registry, config_with(weights=weights)) as engine:
        assert engine.plan(ASKED).route.agent_id == "plant"
        assert engine.plan(QUESTION).route.agent_id == "code"


def test_training_learns_from_all_and_reports_on_what_was_held_out(
    plant: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The weights are those of one fit to all; the table is about a model that saw four fifths."""
    out = tmp_path / "w.npz"
    arguments = ("train", plant / "plant.jsonl", "--registry", plant / "models.json")
    lines = printed(capsys, *arguments, "--out", out, *LOOSE).splitlines()
    agents = ModelRegistry.load(plant / "models.json").agents
    examples = [Example(text, "plant") for text in PLANT]
    expected = HybridRouter()
    rest, held = split(examples)
    untrained = judged(expected, held, agents)
    expected.fit(rest, agents, pull=0.1)
    trained = judged(expected, held, agents)
    before, after = score(untrained).lenient, score(trained).lenient
    assert lines[2].split() == ["label", "prompts", "before", "after"]
    assert lines[3].split() == ["plant", "2", f"{before:.3f}", f"{after:.3f}"]
    assert lines[4].split() == ["all", "2", f"{before:.3f}", f"{after:.3f}"]
    assert _share_of_plant(trained) > _share_of_plant(untrained)
    assert "learned from all 10 prompts in " in " ".join(lines)
    whole = HybridRouter().fit(examples, agents, pull=0.1)
    assert out.read_bytes() == whole.save(tmp_path / "whole.npz").read_bytes()
    assert max(map(len, lines[:-2])) <= 80


def _share_of_plant(found: list[Judged]) -> float:
    """The mean probability of the agent that was learned."""
    shares = [{c.agent_id: c.score for c in one.route.candidates}["plant"] for one in found]
    return sum(shares) / len(shares)


def test_training_goes_on_from_weights(plant: Path, tmp_path: Path, capsys: Capture) -> None:
    """`--from` keeps what was learned before; `--pull` holds it more or less."""
    rows = [{"text": "Describe the harbour master's day", "label": "creative"}]
    examples = write_examples(tmp_path / "more.jsonl", rows)
    distances = []
    start = load_model(plant / "weights.npz")
    for pull in ("0.1", "100"):
        out = tmp_path / f"{pull}.npz"
        arguments = ("train", examples, "--from", plant / "weights.npz", "--out", out)
        shown = printed(capsys, *arguments, "--pull", pull, "--no-embeddings")
        assert "Held-out" not in shown  # a single prompt cannot be
        assert "plant" in load_model(out).topics
        distances.append(float(np.abs(load_model(out).gram_weights - start.gram_weights).sum()))
    assert distances[0] > 2 * distances[1]


def test_a_label_of_nobody_is_said(tmp_path: Path, capsys: Capture) -> None:
    """It may be a slip, or an agent of another registry."""
    rows = [{"text": QUESTION, "label": "coed"}, {"text": MISLEADING, "label": "math"}]
    examples = write_examples(tmp_path / "e.jsonl", rows)
    assert run("train", examples, "--out", tmp_path / "w.npz", "--no-embeddings") == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith("note: 'coed' is no agent")
    assert "(did you mean 'code'?)" in notes[0]


def test_a_label_that_the_registry_understands_needs_no_note(
    tmp_path: Path, capsys: Capture
) -> None:
    """A topic that its hints name, or `reasoning` where others have its topics; both are scored."""

    def change(raw: dict[str, Any]) -> None:
        solver = raw["agents"].pop("reasoning")
        raw["agents"]["solver"] = {**solver, "routing": {"topics": ["math", "logic"]}}
        raw["agents"]["lawyer"] = {**solver, "routing": {"topics": ["law"]}}

    registry = registry_file(tmp_path, change)
    rows = [
        {"text": "What is 12 * 13 - 7?", "label": "math"},
        {"text": "Solve 3x + 4 = 19 for x", "label": "reasoning"},
        {"text": "May the landlord keep the deposit?", "label": "law"},
    ]
    examples = write_examples(tmp_path / "e.jsonl", rows)
    arguments = (examples, "--registry", registry, "--no-embeddings")
    assert run("train", *arguments, "--out", tmp_path / "w.npz") == 0
    assert capsys.readouterr().err == ""
    assert run("evaluate", *arguments, "--weights", tmp_path / "w.npz", "--json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    labels = json.loads(shown.out)["labels"]
    assert (labels["math"]["strict"], labels["reasoning"]["strict"]) == (1, 1)


def test_a_missing_embedding_model_is_said(tmp_path: Path, capsys: Capture) -> None:
    """Training goes on without it, and says how to get it."""
    examples = write_examples(tmp_path / "e.jsonl", [{"text": QUESTION, "label": "code"}])
    assert run("train", examples, "--out", tmp_path / "w.npz") == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith("note: only words are learned from: ")
    assert f"orion-oie pull {MINILM}" in notes[0]
    assert (tmp_path / "w.npz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "code"}\n{"text": 1}\n', "line 2: "),
        ("", "there is no example"),
        (None, "the examples cannot be read"),
    ],
)
def test_what_cannot_be_learned_from_leaves_no_file(
    content: str | None, message: str, tmp_path: Path, capsys: Capture
) -> None:
    """Status 1, a line that says where, and nothing is written."""
    file = tmp_path / "e.jsonl"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert run("train", file, "--out", tmp_path / "w.npz", "--no-embeddings") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w.npz").exists()


@pytest.mark.parametrize("out", ["missing/w.npz", "", "file/w.npz", "~/missing/w.npz"], ids=repr)
@pytest.mark.parametrize("command", [("train", "no-examples.jsonl", "--out"), ("export",)], ids=str)
def test_a_place_that_nothing_can_be_written_to_is_wrong_usage(
    command: tuple[str, ...],
    out: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """A folder that is not there, or a folder instead of a file: said before anything is read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "file").touch()
    assert run(*command, out if out.startswith("~") else tmp_path / out) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Usage: orion-oie route" in shown.err
    message = "there is no folder" if out else f"{tmp_path} is a folder"
    assert message in shown.err


def test_weights_may_be_written_to_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """`~` is expanded where the shell did not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    examples = write_examples(tmp_path / "e.jsonl", [{"text": QUESTION, "label": "code"}])
    printed(capsys, "train", examples, "--no-embeddings", "--out", "~/w.npz")
    assert (tmp_path / "w.npz").is_file()


def plant_with_embeddings(folder: Path, plant: Path, minilm: Path, name: str = MINILM) -> Path:
    """The registry of the plant, with the embedding model on this machine under a name."""
    raw = json.loads((plant / "models.json").read_text(encoding="utf-8"))
    model = raw["models"].pop(MINILM)
    variant = {**model["variants"]["f16"], "source": {"path": str(minilm)}}
    raw["models"][name] = {**model, "variants": {"f16": variant}}
    registry = folder / "models.json"
    registry.write_text(json.dumps(raw), encoding="utf-8")
    return registry


def test_an_embedding_model_of_too_few_examples_is_said(
    plant: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Ten prompts of one topic are no first head: the words are learned alone. The head of the
    package is for what its model computes, so another pooling makes another model of it."""
    other = write_minilm(tmp_path / "cls.gguf", pooling=PoolingType.CLS)
    registry, out = plant_with_embeddings(tmp_path, plant, other, "Other-MiniLM"), tmp_path / "w"
    assert run("train", plant / "plant.jsonl", "--registry", registry, "--out", out) == 0
    assert capsys.readouterr().err == (
        "note: the embedding model other-minilm learned nothing: a first head takes 10 examples "
        "of every topic\n"
    )
    assert set(load_model(out).heads) == {MINILM}


def test_a_model_of_another_name_goes_on_with_its_head(
    minilm: Path, plant: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The head of the package is found by what the model computes."""
    registry, out = plant_with_embeddings(tmp_path, plant, minilm, "my-own"), tmp_path / "w"
    arguments = ("train", plant / "plant.jsonl", "--registry", registry, "--pull", "0.1")
    assert run(*arguments, "--out", out) == 0
    assert capsys.readouterr().err == ""
    head = load_model(out).heads[MINILM]
    assert np.abs(head.weights[:, load_model(out).topics.index("plant")]).max() > 0.01


def test_vectors_are_learned_from_when_the_embedding_model_is_here(
    minilm: Path, plant: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The head of the embedding model knows the new topic, too. The model is in memory before
    anything is learned: no load of it is left to a router that waits for a short while."""
    loaded: dict[RouterEmbedder, list[bool]] = {}
    embed = RouterEmbedder.embed

    def noted(embedder: RouterEmbedder, *arguments: Any) -> Any:
        loaded.setdefault(embedder, []).append(embedder.is_loaded())
        return embed(embedder, *arguments)

    monkeypatch.setattr(RouterEmbedder, "embed", noted)
    registry, out = plant_with_embeddings(tmp_path, plant, minilm), tmp_path / "w.npz"
    arguments = ("train", plant / "plant.jsonl", "--registry", registry, "--pull", "0.1")
    assert run(*arguments, "--out", out) == 0
    assert capsys.readouterr().err == ""
    assert len(loaded) == 2  # a router each, before what was held out is learned and after
    assert all(map(all, loaded.values()))
    model = load_model(out)
    head, plain = model.heads[MINILM], load_model(plant / "weights.npz").heads[MINILM]
    topic = model.topics.index("plant")
    assert np.abs(head.weights[:, topic]).max() > 0.01
    assert np.abs(plain.weights[:, topic]).max() == 0


# -- which examples are held out

EXAMPLES = st.lists(st.builds(Example, st.text(max_size=3), st.sampled_from(["a", "b", "c"])))


@given(EXAMPLES, st.randoms(use_true_random=False))
def test_a_split_is_a_partition_by_texts(examples: list[Example], random: Any) -> None:
    """Nothing is lost or doubled, no text is on both sides, and the order decides nothing."""
    rest, held = split(examples)
    assert Counter(rest) + Counter(held) == Counter(examples)
    assert {one.text for one in rest}.isdisjoint(one.text for one in held)
    shuffled = list(examples)
    random.shuffle(shuffled)
    again = split(shuffled)
    assert [Counter(part) for part in again] == [Counter(rest), Counter(held)]


@given(st.integers(0, 200))
def test_a_fifth_of_a_label_is_held_out(count: int) -> None:
    """At least one of two."""
    examples = [Example(f"text {number}", "a") for number in range(count)]
    _, held = split(examples)
    assert len(held) == (max(1, count // 5) if count > 1 else 0)


# -- weights as a file


def test_exported_weights_are_those_in_use(tmp_path: Path, capsys: Capture) -> None:
    """A route with them is the same to the last digit."""
    out = tmp_path / "weights.npz"
    assert printed(capsys, "export", out).startswith(f"{out} (")
    assert load_model(out).topics == shipped_model().topics
    plain, exported = routed(capsys, MISLEADING), routed(capsys, MISLEADING, "--weights", out)
    assert {**plain, "ms": 0, "first_ms": 0} == {**exported, "ms": 0, "first_ms": 0}


@pytest.mark.parametrize("command", [(QUESTION,), ("evaluate", OWN)], ids=["question", "evaluate"])
def test_weights_that_are_none_are_refused(
    command: tuple[object, ...], tmp_path: Path, capsys: Capture
) -> None:
    """Status 1 and a line."""
    file = tmp_path / "weights.npz"
    file.write_bytes(b"no weights")
    assert run(*command, "--weights", file) == 1
    assert "holds no weights of a router" in capsys.readouterr().err


# -- judging


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of every tenth of our own labelled prompts."""
    path = tmp_path_factory.mktemp("some") / "some.jsonl"
    path.write_text("\n".join(OWN.read_text("utf-8").split("\n")[::10]), encoding="utf-8")
    return path


def test_figures_are_those_of_the_library(some: Path, capsys: Capture) -> None:
    """Shares, the confusion matrix and the labels, in text and as JSON."""
    examples = read_examples(some)
    found = judged(HybridRouter(), examples, ModelRegistry.packaged().agents)
    figures, wrong = score(found), [one for one in found if not one.is_right]
    facts = json.loads(printed(capsys, "evaluate", some, "--no-embeddings", "--json"))
    assert facts["errors"] == []
    for name in ("count", "strict", "lenient", "calibration_error", "coverage"):
        assert facts[name] == pytest.approx(getattr(figures, name))
    assert sum(sum(row.values()) for row in facts["confusion"].values()) == len(examples)
    on_the_diagonal = sum(row.get(should, 0) for should, row in facts["confusion"].items())
    assert on_the_diagonal == len(examples) - len(wrong)
    assert {k: v["count"] for k, v in facts["labels"].items()} == Counter(
        one.label for one in examples
    )
    lines = printed(capsys, "evaluate", some, "--no-embeddings").splitlines()
    assert lines[0] == f"{len(examples)} prompts"
    shown = {line.split()[0]: line.split()[1] for line in lines[3:6]}
    assert shown == {
        "lenient": f"{figures.lenient:.3f}",
        "strict": f"{figures.strict:.3f}",
        "calibration": f"{figures.calibration_error:.3f}",
    }
    matrix = [line.split() for line in lines if re.match(r" ?\d+ \w+ ", line)]
    cells = [cell for row in matrix for cell in row[2:-1] if cell != "."]
    assert sum(map(int, cells)) == len(examples)
    start = lines.index(next(line for line in lines if line.startswith("label ")))
    shares = [float(line.split()[2]) for line in lines[start + 1 :]]
    assert len(shares) == len(facts["labels"])
    assert shares == sorted(shares)
    assert max(map(len, lines)) <= 80


def test_misrouted_prompts_are_listed(tmp_path: Path, capsys: Capture) -> None:
    """The surest first, in one line each, cut to 100 characters in text and whole in JSON."""
    long = f"{QUESTION}\n\n{'and explain it ' * 20}"
    rows = [
        {"text": QUESTION, "label": "data", "labels": ["data", "conversation"]},
        {"text": long, "label": "creative"},
        {"text": "Write a Python function that sorts a list", "label": "code"},
    ]
    examples = write_examples(tmp_path / "e.jsonl", rows)
    found = json.loads(printed(capsys, "evaluate", examples, "--errors", 9, "--json"))["errors"]
    assert {one["text"] for one in found} == {QUESTION, long}
    confidences = [one["confidence"] for one in found]
    assert confidences == sorted(confidences, reverse=True)
    out = printed(capsys, "evaluate", examples, "--errors", 9)
    shown = " ".join(out.split())
    assert "code, should be data or conversation Write a Python" in shown
    assert f"{' '.join(long.split())[:97]}..." in shown
    assert len(re.findall("should be", out)) == 2
    assert len(re.findall("should be", printed(capsys, "evaluate", examples, "--errors", 1))) == 1


def test_prompts_that_nobody_could_get_right_are_said(tmp_path: Path, capsys: Capture) -> None:
    """An agent that the registry does not have explains the figures."""
    rows = [{"text": "Reset turbine 2", "label": "plant"}, {"text": QUESTION, "label": "code"}]
    assert run("evaluate", write_examples(tmp_path / "e.jsonl", rows)) == 0
    note = "note: 1 prompt should go to plant, which the registry does not have\n"
    assert capsys.readouterr().err == note


def test_no_prompt_cannot_be_judged(tmp_path: Path, capsys: Capture) -> None:
    """An empty file is wrong usage."""
    assert run("evaluate", write_examples(tmp_path / "e.jsonl", [])) == 2
    assert "there is no prompt" in capsys.readouterr().err


# -- how it is run


def test_help_names_options_and_commands(capsys: Capture) -> None:
    """`route --help` is about the question and lists the commands; each has its own."""
    out = printed(capsys, "--help")
    assert "Usage: orion-oie route QUESTION [OPTIONS]" in out
    for word in (
        "--session-turn",
        "--image",
        "--weights",
        "RouterConfig(weights=",
        "evaluate",
        "export",
    ):
        assert word in out
    assert "how many images are attached" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    for command in ("train", "evaluate", "export"):
        assert f"Usage: orion-oie route {command}" in printed(capsys, command, "-h")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [QUESTION, "--what"],
        [QUESTION, "another"],
        [QUESTION, "--image", "-1"],
        ["train", "file.jsonl"],
        ["evaluate"],
        ["export"],
    ],
    ids=str,
)
def test_wrong_usage_has_status_2(arguments: list[str], capsys: Capture) -> None:
    """What cannot be parsed is explained on the standard error."""
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Usage: orion-oie route" in shown.err


# -- printing


def test_numbers_stand_on_the_right(capsys: Capture) -> None:
    """The named columns are aligned to the right, the others to the left."""
    print_table(["name", "n", "rest"], [["a", "1", "x"], ["long name", "10", "\x1b[0my"]], (1,))
    assert capsys.readouterr().out.splitlines() == [
        "name        n  rest",
        "a           1  x",
        "long name  10  [0my",
    ]


@given(
    st.lists(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=9)),
    st.integers(0, 20),
)
def test_wrapped_text_fits_and_is_whole(words: list[str], hang: int) -> None:
    """No line is wider than the terminal, later lines are indented, and no word is lost."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        print_wrapped(" ".join(words), first="> ", hang=hang)
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= max(60, shutil.get_terminal_size().columns) for line in lines)
    assert " ".join(lines).split() == [">", *words]
    assert all(line.startswith(" " * hang) for line in lines[1:])


def test_glued_words_stay_together(capsys: Capture) -> None:
    """No line is broken at a glued space, which is printed as a space."""
    print_wrapped(" ".join([f"eleven{GLUE}more"] * 20), first="")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert all(line.startswith("eleven more") and line.endswith("eleven more") for line in lines)
