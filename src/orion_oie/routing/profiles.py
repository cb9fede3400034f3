"""Profiles of agents, prepared before any question: the topics of an agent, its examples as n-grams
and vectors, and the topics that they belong to.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from orion_oie.models.files import replacing
from orion_oie.models.specs import AgentSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orion_oie.routing.linear.model import LinearModel
    from orion_oie.routing.text.prompt import Prompt

# The agents whose topics go by other names.
AGENT_TOPICS: Mapping[str, tuple[str, ...]] = {"reasoning": ("math", "logic")}

# Cosines: similarity is 0 up to the first number and 1 from the second on. For vectors they are
# relative to unrelated texts, whose cosine is 0.0 with one embedding model and 0.8 with another.
_SPELLED_ALIKE = (0.15, 0.6)
_MEANT_ALIKE = (0.33, 0.74)
_UNRELATED = (
    "How do I boil an egg?",
    "The train to the coast leaves at nine.",
    "Sort a list of numbers.",
    "Who painted the ceiling of the chapel?",
    "My knee hurts after running.",
    "A poem about autumn leaves",
    "The interest on the loan is four percent.",
    "Is the harbour deep enough for a ferry?",
)
_HIGHEST_FLOOR = 0.99
_KEY_BYTES = 16


class Embedder(Protocol):
    """The embedding model of the embedding stage."""

    @property
    def name(self) -> str:
        """The name of the model, such as `all-minilm-l6-v2`, for its notes and caches."""
        ...

    def is_ready(self) -> bool:
        """True if the files of the model are on this machine."""
        ...

    def is_loaded(self) -> bool:
        """True if `embed` would not have to load the model first."""
        ...

    def embed(self, texts: Sequence[str], limit_s: float | None = None) -> "NDArray[np.float32]":
        """Unit vectors, shape (texts, dimensions). Raises what the model raises, and
        `DeadlineExceededError` after `limit_s` seconds."""
        ...


def topics_of(agent_id: str, spec: AgentSpec, known: Sequence[str]) -> tuple[str, ...]:
    """The topics that an agent owns: those listed in its hints, else those named after its id."""
    if spec.routing.topics is not None:
        return tuple(topic for topic in dict.fromkeys(spec.routing.topics) if topic in known)
    names = (agent_id,) if agent_id in known else AGENT_TOPICS.get(agent_id, ())
    return tuple(topic for topic in names if topic in known)


def topics_to_learn(agent_id: str, spec: AgentSpec, known: Sequence[str]) -> tuple[str, ...]:
    """The topics that examples of an agent teach: those listed in its hints (none, if that list is
    empty), else those that it owns, else one named after its id."""
    if spec.routing.topics is not None:
        return tuple(spec.routing.topics)
    return topics_of(agent_id, spec, known) or (agent_id,)


class Profile:
    """One agent as a model of topics sees it. Its examples are read when first needed."""

    def __init__(self, agent_id: str, spec: AgentSpec, model: "LinearModel") -> None:
        self.spec = spec
        self.model = model
        self.owns = topics_of(agent_id, spec, model.topics)
        self._affinity: dict[frozenset[str], Mapping[str, float]] = {}

    @cached_property
    def _prompts(self) -> "list[Prompt]":
        from orion_oie.routing.text.prompt import read

        return [read(example) for example in self.spec.routing.examples]

    @cached_property
    def examples(self) -> tuple[str, ...]:
        """The examples in its hints, as the embedding stage reads them."""
        return tuple(map(text_to_embed, self._prompts))

    def affinity(self, hidden: frozenset[str] = frozenset()) -> Mapping[str, float]:
        """The part of each topic but the hidden ones that it could take, in [0, 1]; empty for an
        owner of topics."""
        if self.owns:
            return {}
        if hidden not in self._affinity:
            self._affinity[hidden] = _affinity(self._prompts, self.model, hidden)
        return self._affinity[hidden]

    def is_of(self, spec: AgentSpec, model: "LinearModel") -> bool:
        """True if the profile was made from an equal spec and this very model."""
        return self.model is model and (self.spec is spec or self.spec == spec)

    def spelled_alike(self, prompt: "Prompt") -> float:
        """The similarity of the nearest example by its words, in [0, 1]."""
        nearest = max(
            (self.model.similarity(prompt.grams, one.grams) for one in self._prompts), default=0.0
        )
        return _between(nearest, _SPELLED_ALIKE)


def _between(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _affinity(
    prompts: "Sequence[Prompt]", model: "LinearModel", hidden: frozenset[str]
) -> dict[str, float]:
    """The part of each topic that an agent with these examples could take; all without any."""
    if not prompts:
        return dict.fromkeys(model.topics, 1.0)
    seen = [topic not in hidden for topic in model.topics]
    if not any(seen):
        return {}
    import numpy as np

    from orion_oie.routing.linear.model import softmax

    logits = np.array([model.logits(prompt.grams, prompt.signals) for prompt in prompts])
    mean = softmax(logits).mean(axis=0) * seen
    highest = float(mean.max())
    return {topic: float(value) / highest for topic, value in zip(model.topics, mean, strict=True)}


class Prototypes:
    """The vectors of the agents' examples, embedded once and cached in a folder under a digest of
    the model's name and the texts. Thread-safe."""

    def __init__(self, embedder: Embedder, folder: Path | None) -> None:
        self._embedder = embedder
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, NDArray[np.float32]] = {}

    def alike(
        self, vector: "NDArray[np.float32]", examples: Sequence[str], limit_s: float | None = None
    ) -> float:
        """The similarity of a vector to the nearest example, in [0, 1]. Raises what the embedder
        raises."""
        if not examples:
            return 0.0
        nearest = float((self.vectors(examples, len(vector), limit_s) @ vector).max())
        floor = self._floor(len(vector), limit_s)
        return _between((nearest - floor) / (1 - floor), _MEANT_ALIKE)

    def _floor(self, dimensions: int, limit_s: float | None) -> float:
        """The mean cosine of unrelated texts with this model."""
        vectors = self.vectors(_UNRELATED, dimensions, limit_s)
        count = len(vectors)
        cosines = float((vectors @ vectors.T).sum()) - float((vectors * vectors).sum())
        return min(_HIGHEST_FLOOR, max(0.0, cosines / (count * (count - 1))))

    def vectors(
        self, examples: Sequence[str], dimensions: int, limit_s: float | None = None
    ) -> "NDArray[np.float32]":
        """Their vectors, shape (examples, dimensions). Raises what the embedder raises."""
        import numpy as np

        key = self._key(examples)
        with self._lock:
            if key in self._known:
                return self._known[key]
        vectors = self._kept(key, (len(examples), dimensions))
        if vectors is None:
            short = self._embedder.embed(examples, limit_s).astype(np.float16)
            if self._folder is not None:
                _keep(short, self._folder / f"{key}.npy")
            vectors = short.astype(np.float32)  # the same numbers as when read from the folder
        with self._lock:
            self._known[key] = vectors
        return vectors

    def _key(self, examples: Sequence[str]) -> str:
        digest = blake2b(digest_size=_KEY_BYTES)
        for text in (self._embedder.name, *examples):
            digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()

    def _kept(self, key: str, shape: tuple[int, int]) -> "NDArray[np.float32] | None":
        import numpy as np

        from orion_oie.routing.linear.model import DAMAGE

        if self._folder is None:
            return None
        try:
            short = np.load(self._folder / f"{key}.npy", allow_pickle=False)
            fits = short.dtype == np.float16 and short.shape == shape and np.isfinite(short).all()
        except DAMAGE:
            return None  # missing or damaged: the vectors are computed again
        return short.astype(np.float32) if fits else None


def _keep(vectors: "NDArray[np.float16]", path: Path) -> None:
    """Write vectors to a file; if that fails, they are computed again at the next start."""
    import numpy as np

    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh, fresh.open("xb") as file:
            np.save(file, vectors, allow_pickle=False)


EMBEDDED_CHARS = 120  # more text takes longer and does not improve the vector


def text_to_embed(prompt: "Prompt") -> str:
    """The part of a prompt that the embedding stage reads: the instruction before the payload."""
    parts = prompt.parts
    if parts.payload and parts.instruction:
        return f"{parts.instruction}\n{parts.payload}"[:EMBEDDED_CHARS]
    return prompt.text.lstrip()[:EMBEDDED_CHARS]
