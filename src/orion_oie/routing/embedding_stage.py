"""The embedding stage: what a prompt means by the vector of an embedding model.

Where a head was trained for that model, its scores are fused with those of the n-grams; else the
examples of the agents speak for them. Asked only where the stages before are not sure, or where
examples of an agent without a topic may speak against what they are sure of.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orion_oie.errors import OrionError
from orion_oie.routing.decision import (
    Decision,
    TimeBudget,
)
from orion_oie.routing.profiles import Embedder, Prototypes, text_to_embed

if TYPE_CHECKING:
    from orion_oie.routing.linear.model import (
        Floats,
        LinearModel,
    )

SURE_WITHOUT_EMBEDDING = 0.9  # what the stages before have to reach
_RIVAL_AFFINITY = 0.3  # of a sure topic: from here on the vectors of examples may speak against it
_ALIKE_GAIN = 4.2  # log-odds of an example that means the same, where there is no trained head
_LEAST = 1e-30  # a probability that has a logarithm
_EMBEDDED_AT_ONCE = 16


class EmbeddingStage:
    """folder: where vectors of examples are kept; None keeps them in memory. Thread-safe."""

    def __init__(self, embedder: Embedder, folder: Path | None) -> None:
        self._embedder = embedder
        self._prototypes = Prototypes(embedder, folder)

    @property
    def name(self) -> str:
        """The embedding model."""
        return self._embedder.name

    def is_ready(self) -> bool:
        """Whether the model is here to be used."""
        return self._embedder.is_ready()

    def vectors(self, texts: Sequence[str]) -> "Floats":
        """Those of many prompts, shape (texts, dimensions), however long that takes. Raises what
        the embedding raises."""
        import numpy as np

        from orion_oie.routing.text.prompt import read

        read_of = [text_to_embed(read(text)) for text in texts]
        pieces = range(0, len(texts), _EMBEDDED_AT_ONCE)
        found = [
            self._embedder.embed(read_of[at : at + _EMBEDDED_AT_ONCE], math.inf) for at in pieces
        ]
        return np.concatenate(found)

    def is_wanted(self, decision: Decision, *, may_load: bool) -> bool:
        """Whether it should be asked and can be; where it cannot be, the decision says so."""
        if not decision.prompt.has_words:
            return False
        is_sure = decision.top >= SURE_WITHOUT_EMBEDDING
        best = max(decision.topics, key=lambda topic: decision.topics[topic])
        rivals = (p for p in decision.profiles.values() if not p.owns and p.examples)
        if is_sure and not any(p.affinity.get(best, 0.0) > _RIVAL_AFFINITY for p in rivals):
            return False
        if not self._embedder.is_ready():
            decision.asides.append(f"the embedding model {self._embedder.name} is not here")
            return False
        if not may_load and not self._embedder.is_loaded():
            decision.asides.append(
                f"the embedding model {self._embedder.name} was not asked: it would be loaded first"
            )
            return False
        return True

    def consult(self, decision: Decision, logits: "Floats", budget: TimeBudget) -> None:
        """Go on from the `logits` of the n-grams, shape (topics,). A failure is an aside, and the
        last one of that route."""
        if budget.has_failed:
            return
        # Asked for the examples of agents without a topic alone, it leaves the topics as they are.
        is_sure = decision.top >= SURE_WITHOUT_EMBEDDING
        name, model, prototypes = self._embedder.name, decision.model, self._prototypes
        try:
            vector = self._embedder.embed([text_to_embed(decision.prompt)], budget.left_s())[0]
            found = model.vector_logits(name, vector, decision.prompt.signals)
            alike = {
                agent_id: prototypes.alike(vector, profile.examples, budget.left_s())
                for agent_id, profile in decision.profiles.items()
                if not (profile.owns and (is_sure or found is not None)) and profile.examples
            }
        except OrionError as error:
            budget.has_failed = True
            decision.asides.append(f"the embedding stage failed: {error.message}")
            return
        if found is not None and not is_sure:
            fused = _fused(model, logits, found, model.heads[name].unseen)
            decision.set_topics(fused.tolist())
            decision.is_fused = True
        decision.mix("embedding", alike)
        if found is None and not is_sure:
            decision.weigh(
                "embedding", {agent_id: _ALIKE_GAIN * much for agent_id, much in alike.items()}
            )


def _fused(
    model: "LinearModel", logits: "Floats", found: "Floats", unseen: Sequence[int]
) -> "Floats":
    """The logits of n-grams and vector together. Topics that the vector's head has never seen
    keep the probability that they have by the n-grams alone; the others share the rest."""
    calibration = model.calibration
    both: Floats = logits * calibration.grams + found * calibration.vector
    if not unseen:
        return both
    import numpy as np

    from orion_oie.routing.linear.model import softmax

    alone = softmax(logits * calibration.alone)
    apart = list(unseen)
    mixed = both.copy()
    mixed[apart] = -np.inf
    if len(apart) < len(mixed):
        mixed = softmax(mixed) * (1 - alone[apart].sum())
    mixed[apart] = alone[apart]
    fused: Floats = np.log(np.maximum(mixed, _LEAST))
    return fused
