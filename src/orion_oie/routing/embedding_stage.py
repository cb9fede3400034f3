"""The embedding stage: compares a prompt by the vector of an embedding model.

If the weights hold a head for that model, its scores are fused with those of the n-grams;
otherwise the prompt is compared with the examples of the agents. The head is found by what the
model makes of a few texts, which are embedded once. The stage is used only if the
earlier ones are not sure, or if examples of an agent without a topic may contradict them.
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
    from orion_oie.routing.linear.fitting import Embedded
    from orion_oie.routing.linear.model import (
        Floats,
        LinearModel,
    )
    from orion_oie.routing.linear.probes import Probes

SURE_WITHOUT_EMBEDDING = 0.9  # probability from which on this stage is skipped
_RIVAL_AFFINITY = 0.3  # affinity to a sure topic that lets an agent's examples contradict it
_ALIKE_GAIN = 4.2  # log-odds of an example with the same meaning, if there is no trained head
_LEAST = 1e-30  # keeps the logarithm finite
_EMBEDDED_AT_ONCE = 16


class EmbeddingStage:
    """The stage with one embedding model. Thread-safe.

    folder: directory that caches the vectors of examples; None keeps them in memory.
    """

    def __init__(self, embedder: Embedder, folder: Path | None) -> None:
        self._embedder = embedder
        self._prototypes = Prototypes(embedder, folder)
        self._probes: dict[tuple[str, ...], Probes] = {}  # what the model makes of their texts
        self._found: tuple[LinearModel, str | None] | None = None  # the last answer of `head_of`

    @property
    def name(self) -> str:
        """The name of the embedding model."""
        return self._embedder.name

    def is_ready(self) -> bool:
        """True if the files of the model are on this machine."""
        return self._embedder.is_ready()

    def head_of(self, model: "LinearModel", limit_s: float | None = None) -> str | None:
        """The name of the head that the weights hold for the embedding model. Raises what the
        embedder raises."""
        found = self._found  # one read: another thread may replace it
        if found is None or found[0] is not model:
            for texts in dict.fromkeys(head.probes.texts for head in model.heads.values()):
                self._probed(texts, limit_s)
            found = self._found = (model, self.known_head_of(model))
        return found[1]

    def known_head_of(self, model: "LinearModel") -> str | None:
        """The same without embedding anything; None if that would be necessary."""
        names = (model.head_of(probes) for probes in list(self._probes.values()))
        return next((name for name in names if name is not None), None)

    def _probed(self, texts: tuple[str, ...], limit_s: float | None) -> "Probes":
        from orion_oie.routing.linear.probes import NO_PROBES, Probes

        if not texts:
            return NO_PROBES
        if texts not in self._probes:
            self._probes[texts] = Probes(texts, self._embedder.embed(texts, limit_s))
        return self._probes[texts]

    def embedded(self, texts: Sequence[str], model: "LinearModel") -> "Embedded":
        """The vectors of prompts, for training, without a time limit. Raises what the embedder
        raises."""
        import numpy as np

        from orion_oie.routing.linear.fitting import Embedded
        from orion_oie.routing.linear.probes import PROBE_TEXTS
        from orion_oie.routing.text.prompt import read

        read_of = [text_to_embed(read(text)) for text in texts]
        pieces = range(0, len(texts), _EMBEDDED_AT_ONCE)
        found = [
            self._embedder.embed(read_of[at : at + _EMBEDDED_AT_ONCE], math.inf) for at in pieces
        ]
        name = self.head_of(model, math.inf)
        probe_texts = PROBE_TEXTS if name is None else model.heads[name].probes.texts
        probes = self._probed(probe_texts, math.inf)
        return Embedded(name or self.name, np.concatenate(found), probes)

    def is_wanted(self, decision: Decision, *, may_load: bool) -> bool:
        """True if the stage should be used and can be; if it cannot, the decision notes why."""
        if not decision.prompt.substance:
            return False
        is_sure = decision.top >= SURE_WITHOUT_EMBEDDING
        best = max(decision.topics, key=lambda topic: decision.topics[topic], default="")
        rivals = (p for p in decision.profiles.values() if not p.owns and p.examples)
        affinities = (p.affinity(decision.hidden).get(best, 0.0) for p in rivals)
        if is_sure and not any(affinity > _RIVAL_AFFINITY for affinity in affinities):
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
        """Refine the decision, given the `logits` of the n-grams, shape (topics,). After a failure,
        which the decision notes, the stage does nothing for the rest of the route."""
        if budget.embedding_failed:
            return
        # A sure decision is only compared with examples of agents without a topic.
        is_sure = decision.top >= SURE_WITHOUT_EMBEDDING
        model, prototypes = decision.model, self._prototypes
        name, found = None, None
        try:
            vector = self._embedder.embed([text_to_embed(decision.prompt)], budget.left_s())[0]
            if not is_sure:
                name = self.head_of(model, budget.left_s())
            if name is not None:
                found = model.vector_logits(name, vector, decision.prompt.signals)
            alike = {
                agent_id: prototypes.alike(vector, profile.examples, budget.left_s())
                for agent_id, profile in decision.profiles.items()
                if not (profile.owns and (is_sure or found is not None)) and profile.examples
            }
        except OrionError as error:
            budget.embedding_failed = True
            decision.asides.append(f"the embedding stage failed: {error.message}")
            return
        if name is None and model.heads and not is_sure:
            decision.asides.append(
                f"the weights hold no head for the embedding model {self._embedder.name}"
            )
        if name is not None and found is not None:
            fused = _fused(model, logits, found, model.heads[name].unseen)
            decision.set_topics(fused.tolist())
            decision.is_fused = True
        decision.share_topics("embedding", alike)
        if found is None and not is_sure:
            decision.add_log_odds(
                "embedding", {agent_id: _ALIKE_GAIN * much for agent_id, much in alike.items()}
            )


def _fused(
    model: "LinearModel", logits: "Floats", found: "Floats", unseen: Sequence[int]
) -> "Floats":
    """The combined logits of n-grams and vector. Topics that the head has never seen keep the
    probability that the n-grams alone give them; the others share the rest."""
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
