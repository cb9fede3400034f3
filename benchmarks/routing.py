"""How well, how fast and how lean the router routes; semantic-router as a peer.

Prompts: own.jsonl, kinds.jsonl and conversations.jsonl of benchmarks/routing, written for this
project and never trained on; prompts about images are asked with one. Where
shared/data/routing_dev.jsonl lies beside the project also real prompts from public sources, each
source by a model that was trained without it. --quick takes a quarter of the prompts, --smoke one
of forty; both leave out the real ones and the peer. Needs the dev extra, and Linux.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import _report
import numpy as np
import psutil
from _report import Row, extent_of, row

from orion_oie.backends.base import LoadSpec
from orion_oie.backends.llama.host.loader import LlamaBackend
from orion_oie.cancellation import CancelScope
from orion_oie.embeddings.sentence_transformer import SentenceTransformerEmbedder
from orion_oie.models.registry import ModelRegistry
from orion_oie.models.specs import AgentSpec
from orion_oie.routing.base import VISION, RouteContext
from orion_oie.routing.evaluation import (
    Judged,
    Score,
    agent_of,
    bins,
    confusion,
    judged,
    right_among_surest,
    score,
)
from orion_oie.routing.hybrid import HybridRouter
from orion_oie.routing.linear.fitting import (
    Example,
    read_examples,
)
from orion_oie.routing.linear.model import shipped_model
from orion_oie.routing.linear.probes import PROBE_TEXTS
from orion_oie.routing.profiles import text_to_embed
from orion_oie.routing.text.prompt import read
from orion_oie.schemas.results import ModelInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
import train_router  # noqa: E402
from gguf_embedder import GGUFEmbedder  # noqa: E402
from minilm import minilm_folder, write_minilm  # noqa: E402

SETS = ROOT / "benchmarks" / "routing"
DEV = ROOT.parent / "shared" / "data" / "routing_dev.jsonl"
HEAD = train_router.HEAD
INFO = ModelInfo(model_id=HEAD, variant="q8_0", name="MiniLM", version="2", license="apache-2.0")
SURER = 0.65
UNSURE = 0.6  # confidence below which a route does not claim to be sure
Agents = Mapping[str, AgentSpec]

# What a process takes before and after its first routes.
CHILD = """
import json, psutil, sys
from orion_oie.models.registry import ModelRegistry
agents = ModelRegistry.load(sys.argv[1]).agents
process = psutil.Process()
before = process.memory_full_info()
from orion_oie.routing.hybrid import HybridRouter
router = HybridRouter()
for text in json.load(sys.stdin):
    router.route(text, agents)
after = process.memory_full_info()
print(json.dumps([after.uss - before.uss, after.rss - before.rss]))
"""


class Known:
    """An embedder for a measurement of accuracy: vectors that were computed before."""

    name = HEAD

    def __init__(self, texts: Sequence[str], vectors: train_router.Floats) -> None:
        probes = zip(PROBE_TEXTS, train_router.vectors_of(PROBE_TEXTS), strict=True)
        self._vectors = dict([*zip(texts, vectors, strict=True), *probes])

    def is_ready(self) -> bool:
        return True

    def is_loaded(self) -> bool:
        return True

    def embed(self, texts: Sequence[str], _limit_s: float | None = None) -> train_router.Floats:
        return np.array([self._vectors[text] for text in texts], np.float32)


class Worker:
    """An embedder of the router over a model in a worker."""

    name = HEAD

    def __init__(self, embedder: GGUFEmbedder) -> None:
        self._embedder = embedder
        self.ms: list[float] = []

    def is_ready(self) -> bool:
        return True

    def is_loaded(self) -> bool:
        return True

    def embed(self, texts: Sequence[str], _limit_s: float | None = None) -> train_router.Floats:
        started = time.perf_counter()
        vectors = self._embedder.embed(texts, CancelScope())
        self.ms.append((time.perf_counter() - started) * 1e3)
        return vectors


class Original:
    """An embedder of the router over the model in the library that it comes from."""

    name = "original"

    def __init__(self, embedder: SentenceTransformerEmbedder) -> None:
        self._embedder = embedder

    def is_ready(self) -> bool:
        return True

    def is_loaded(self) -> bool:
        return True

    def embed(self, texts: Sequence[str], _limit_s: float | None = None) -> train_router.Floats:
        return self._embedder.embed(texts, CancelScope())


@contextmanager
def minilm_worker() -> Iterator[GGUFEmbedder]:
    with tempfile.TemporaryDirectory(prefix="orion-routing-") as folder:
        file = write_minilm(Path(folder) / "minilm.gguf", quantization="q8_0")
        spec = LoadSpec(INFO, (file,), is_embedding=True)
        embedder = GGUFEmbedder(LlamaBackend().load, spec)
        try:
            yield embedder
        finally:
            embedder.close()


# -- accuracy


def known(examples: Sequence[Example]) -> Known:
    texts = [text_to_embed(read(one.text)) for one in examples]
    return Known(texts, train_router.vectors_of(texts))


def accuracy_rows(name: str, found: Score, *, lenient: float | None, bars: bool) -> list[Row]:
    rows = [
        row(f"{name}, lenient", [found.lenient], "", bar=lenient),
        row(f"{name}, strict", [found.strict], ""),
    ]
    calibration = 0.05 if bars else None
    rows.append(
        row(
            f"{name}, calibration error",
            [found.calibration_error],
            "",
            bar=calibration,
            higher_is_better=False,
        )
    )
    right, covered = (0.97, 0.65) if bars else (None, None)
    rows.append(row(f"{name}, right at >= .55", [found.confident_right], "", bar=right))
    rows.append(row(f"{name}, coverage at >= .55", [found.coverage], "", bar=covered))
    return rows


def own_rows(agents: Agents, kept: dict[str, Any], step: int) -> list[Row]:
    examples = read_examples(SETS / "own.jsonl")[::step]
    rows = []
    for name, embedder, bar in (("core", None, 0.93), ("embeddings", known(examples), 0.95)):
        found = judged(HybridRouter(embedder=embedder), examples, agents)
        rows += accuracy_rows(f"own set, {name}", score(found), lenient=bar, bars=False)
        kept[f"own, {name}"] = picture(found)
    return rows


def kinds_rows(agents: Agents, step: int) -> list[Row]:
    """Prompts of kinds that are easily misread. Of those without any sense a route is right if it
    goes to the conversation and does not claim to be sure of that."""
    lines = (SETS / "kinds.jsonl").read_text("utf-8").split("\n")
    facts = [json.loads(line) for line in lines if line.strip()][::step]
    examples = read_examples(SETS / "kinds.jsonl")[::step]
    rows = []
    for name, embedder in (("core", None), ("embeddings", known(examples))):
        found: dict[str, list[bool]] = {}
        routed = judged(HybridRouter(embedder=embedder), examples, agents)
        for fact, one in zip(facts, routed, strict=True):
            is_modest = not fact.get("low") or one.route.confidence < UNSURE
            found.setdefault(fact["kind"], []).append(one.is_right and is_modest)
        rows += [
            row(f"kinds, {name}, {kind}", [sum(right) / len(right)], "", bar=0.9)
            for kind, right in sorted(found.items())
        ]
    return rows


def agreement_rows(agents: Agents, step: int, *, is_smoke: bool) -> list[Row]:
    """The same head, found by what the model computes, with 8-bit weights in a worker and with the
    original ones in sentence-transformers, which a smoke run does not load: there the former alone.
    """
    examples = read_examples(SETS / "own.jsonl")[::step]
    with minilm_worker() as embedder:
        worker = Worker(embedder)
        original = worker if is_smoke else Original(SentenceTransformerEmbedder(minilm_folder()))
        pairs = zip(
            judged(HybridRouter(embedder=worker), examples, agents),
            judged(HybridRouter(embedder=original), examples, agents),
            strict=True,
        )
        same = [one.route.agent_id == other.route.agent_id for one, other in pairs]
    what = "own set, sentence-transformers and an 8-bit GGUF agree"
    return [row(what, [sum(same) / len(same)], "", bar=0.99)]


def dev_rows(agents: Agents, path: Path, kept: dict[str, Any]) -> list[Row]:
    """Each source by a model that was trained without it. The hints of the registry were written
    with these prompts in sight, so they are left out, and shown for information."""
    rows = train_router.own_rows() + train_router.rows_of(path, is_extra=True)
    texts = [text_to_embed(read(one.example.text)) for one in rows]
    vectors = train_router.vectors_of(texts)
    embedder = Known(texts, vectors)
    found: dict[str, list[Judged]] = {}
    for train, test in train_router.folds(rows, train_router.FOLDS):
        some = [one for one, is_in in zip(rows, train, strict=True) if is_in]
        model = train_router.trained(some, vectors[train])
        model = replace(model, calibration=shipped_model().calibration)
        held = [one.example for one, is_in in zip(rows, test, strict=True) if is_in]
        for name, router in (
            ("core", HybridRouter(model=model, enable_hints=False)),
            ("core and hints", HybridRouter(model=model)),
            ("embeddings", HybridRouter(model=model, enable_hints=False, embedder=embedder)),
            ("embeddings and hints", HybridRouter(model=model, embedder=embedder)),
        ):
            found.setdefault(name, []).extend(judged(router, held, agents))
    result = []
    bars = {"core": 0.90, "embeddings": 0.93}
    for name, all_judged in found.items():
        result += accuracy_rows(
            f"real prompts, {name}",
            score(all_judged),
            lenient=bars.get(name),
            bars=name == "embeddings",
        )
        right, least = right_among_surest(all_judged, SURER)
        result += [
            row(
                f"real prompts, {name}, right, the surer 65 %",
                [right],
                "",
                bar=0.97 if name in bars else None,
            ),
            row(f"real prompts, {name}, their least confidence", [least], ""),
        ]
        kept[f"real, {name}"] = picture(all_judged)
    return result


def picture(found: Sequence[Judged]) -> dict[str, Any]:
    """What the plots show."""
    return {
        "confusion": [[*pair, count] for pair, count in sorted(confusion(found).items())],
        "bins": bins(found),
    }


def curve(agents: Agents, path: Path) -> list[dict[str, Any]]:
    """How right the own set is routed after training on some of the prompts, for the plot."""
    rows = train_router.own_rows() + train_router.rows_of(path, is_extra=True)
    vectors = train_router.vectors_of([text_to_embed(read(one.example.text)) for one in rows])
    examples = read_examples(SETS / "own.jsonl")
    embedder, order = known(examples), np.random.default_rng(0).permutation(len(rows))
    points = []
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
        some = order[: int(len(rows) * share)]
        model = train_router.trained([rows[index] for index in some], vectors[some])
        model = replace(model, calibration=shipped_model().calibration)
        for name, used in (("core", None), ("embeddings", embedder)):
            router = HybridRouter(model=model, embedder=used, enable_hints=False)
            lenient = score(judged(router, examples, agents)).lenient
            points.append({"prompts": len(some), "name": name, "lenient": lenient})
    return points


# -- conversations


def conversation_rows(agents: Agents, step: int) -> list[Row]:
    """A wrong switch: a turn that goes to another agent than the turn before, and should not have
    gone there. A missed one: a turn that stays, and should not have."""
    lines = (SETS / "conversations.jsonl").read_text("utf-8").split("\n")
    conversations = [json.loads(line) for line in lines if line.strip()][::step]
    turns = [turn for one in conversations for turn in one["turns"]]
    embedder = known([Example(turn["text"], turn["label"]) for turn in turns])
    rows = []
    for name, used in (("core", None), ("embeddings", embedder)):
        wrong = missed = right = switched = 0
        router = HybridRouter(embedder=used)
        for conversation in conversations:
            before = None
            for turn in conversation["turns"]:
                is_of_image = turn["label"] == VISION
                context = RouteContext(int(is_of_image), conversation["id"])
                agent_id = router.route(turn["text"], agents, context).agent_id
                accepted = {agent_of(label) for label in turn["labels"]}
                is_right = agent_id in accepted
                right += is_right
                if before is not None:
                    switched += agent_id != before
                    wrong += agent_id != before and not is_right
                    missed += agent_id == before and not is_right
                before = agent_id
        count = len(turns)
        bar = 0.03
        what = f"conversations, {name}"
        rows += [
            row(f"{what}, wrong switches", [wrong / count], "", bar=bar, higher_is_better=False),
            row(f"{what}, wrongly stayed", [missed / count], "", higher_is_better=False),
            row(f"{what}, turns routed right", [right / count], ""),
            row(f"{what}, switches", [switched / count], "", higher_is_better=False),
        ]
    return rows


# -- speed and memory


def timed(router: HybridRouter, texts: Sequence[str], agents: Agents) -> list[float]:
    for text in texts[:50]:
        router.route(text, agents)
    found = []
    for text in texts:
        started = time.perf_counter()
        router.route(text, agents)
        found.append((time.perf_counter() - started) * 1e3)
    return found


def percentile_rows(
    what: str, rounds: Sequence[Sequence[float]], bars: tuple[float, float]
) -> list[Row]:
    return [
        row(
            f"{what}, {name}",
            [float(np.percentile(one, share)) for one in rounds],
            "ms",
            bar=bar,
            higher_is_better=False,
        )
        for name, share, bar in zip(("p50", "p95"), (50, 95), bars, strict=True)
    ]


def speed_rows(agents: Agents, texts: Sequence[str], rounds: int) -> list[Row]:
    gc.collect()
    core = [timed(HybridRouter(), texts, agents) for _ in range(rounds)]
    rows = percentile_rows("core, a prompt", core, (0.5, 1.5))
    long = [
        "Summarize this report.\n\n" + "The harbour was quiet that year. " * 1_700
        for _ in range(20)
    ]
    rows.append(
        row(
            "core, 50,000 characters",
            [max(timed(HybridRouter(), long, agents)) for _ in range(rounds)],
            "ms",
            bar=5.0,
            higher_is_better=False,
        )
    )
    with minilm_worker() as embedder:
        worker = Worker(embedder)
        with_vectors, alone = [], []
        for _ in range(rounds):
            router = HybridRouter(embedder=worker)
            timed(router, texts[:60], agents)
            worker.ms.clear()
            with_vectors.append(timed(router, texts, agents))
            alone.append(float(np.median(worker.ms)))
            share = len(worker.ms) / (len(texts) + 50)
        assert embedder.pid is not None
        memory = psutil.Process(embedder.pid).memory_full_info()
    rows += percentile_rows("with embeddings, a prompt", with_vectors, (2.0, 15.0))
    rows += [
        row("embedding stage alone, median", alone, "ms", bar=5.0, higher_is_better=False),
        row("prompts that reach the embedding stage", [share], "", higher_is_better=False),
        row(
            "embedding stage, memory (pss)",
            [memory.pss / 1e6],
            "MB",
            bar=120.0,
            higher_is_better=False,
        ),
    ]
    return rows


def memory_rows(texts: Sequence[str], rounds: int) -> list[Row]:
    found = []
    for _ in range(rounds):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(ROOT / "models.json")],
            input=json.dumps(list(texts[:300])),
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(child.stdout)[0] / 1e6)
    return [
        row("core router, memory, numpy included", found, "MB", bar=20.0, higher_is_better=False)
    ]


# -- the peer


def peer_rows(path: Path) -> list[Row]:
    """All of the real prompts are its utterances, as they are among our training prompts; both are
    asked the own set but the prompts about images, which it cannot be given."""
    from _semantic_router import semantic_router_labels

    rest = [one for one in read_examples(path) if one.label != VISION]
    train = [{"text": one.text, "label": agent_of(one.label)} for one in rest]
    examples = [one for one in read_examples(SETS / "own.jsonl") if one.label != VISION]
    agents = ModelRegistry.load(ROOT / "models.json").agents
    texts = [example.text for example in examples]
    ours = score(judged(HybridRouter(embedder=known(examples)), examples, agents))
    core = score(judged(HybridRouter(), examples, agents))
    rows = []
    for aggregation, bar in ((None, 0.15), ("sum", None)):
        result = semantic_router_labels(train, texts, aggregation=aggregation)
        labels = ["conversation" if label == "none" else label for label in result.labels]
        lenient = sum(
            label in {agent_of(one) for one in example.accepted}
            for label, example in zip(labels, examples, strict=True)
        ) / len(examples)
        what = f"semantic-router {result.version}, {aggregation or 'its defaults'}"
        rows += [
            row(f"{what}, own set, lenient", [lenient], ""),
            row(f"ours - {what}, lenient", [ours.lenient - lenient], "", bar=bar),
            row(f"core - {what}, lenient", [core.lenient - lenient], ""),
            row(
                f"{what}, a prompt, p50",
                [float(np.median(result.ms))],
                "ms",
                higher_is_better=False,
            ),
        ]
    return rows


def main() -> int:
    options = _report.options(__doc__ or "", data=True)
    agents = ModelRegistry.load(ROOT / "models.json").agents
    kept: dict[str, Any] = {}
    step = extent_of(options, full=1, quick=4, smoke=40)
    rows = own_rows(agents, kept, step) + kinds_rows(agents, step)
    rows += agreement_rows(agents, step, is_smoke=options.smoke) + conversation_rows(agents, step)
    texts = [one.text for one in read_examples(SETS / "own.jsonl")]
    if DEV.exists():
        texts += [one.text for one in read_examples(DEV)]
    texts, rounds = texts[::step], 1 if step > 1 else 3
    rows += speed_rows(agents, texts, rounds) + memory_rows(texts, rounds)
    if step > 1:
        print(f"one prompt of {step} is taken, no real ones and no peer")
    elif not DEV.exists():
        print(f"{DEV} is not here: the real prompts and the peer are left out")
    else:
        rows += dev_rows(agents, DEV, kept)
        if options.data:
            kept["curve"] = curve(agents, DEV)
        rows += peer_rows(DEV)
    if options.data:
        options.data.write_text(json.dumps(kept), encoding="utf-8")
    return _report.report(rows, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
