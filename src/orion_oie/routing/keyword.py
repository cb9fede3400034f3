"""Routing by weighted words, phrases, patterns and shapes: fast, explainable, without a model.

It adds up the evidence that each agent's `RoutingHints` name. It does not understand the text, does
not learn, and depends on the quality of the hints in the registry.

The score of an agent is the sum of its evidence: the weight of each hint found (once, however often
the hint occurs; times `FAR_FACTOR` if it occurs only in the middle of a long text), and the weight
of each feature times its strength. With `best` and `second` as the two highest scores,

    confidence = best / (best + 1) * (0.6 + 0.4 * (best - second) / best)

so it grows with the absolute strength of the evidence and with its margin: one undisputed hint of
weight 1 gives 0.5, one of weight 0.5 gives 0.33, and a tie costs four tenths.
"""

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cached_property

from orion_oie.models.specs import (
    CONVERSATION,
    AgentSpec,
    RouteFeature,
    RoutingHints,
)
from orion_oie.routing.attachment import image_route
from orion_oie.routing.base import (
    NO_CONTEXT,
    RouteContext,
)
from orion_oie.routing.candidates import candidates
from orion_oie.routing.text.excerpt import excerpt
from orion_oie.routing.text.features import measure
from orion_oie.routing.text.language import (
    Language,
    detect,
)
from orion_oie.schemas.results import (
    Route,
    RouteCandidate,
)

NEAR_HEAD_CHARS, NEAR_TAIL_CHARS = 600, 300
FAR_FACTOR = 0.5

_SHOWN_HINTS = 4
_DECIMALS = 4
_STEM = "*"

# Scripts that do not put spaces between words: a hint in them may start and end anywhere.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3041-\u30ff\u3131-\u318e\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD_CHAR = rf"[^\W{_UNSPACED}]"
_WORD = re.compile(f"{_WORD_CHAR}+")


def _flattened(text: str) -> str:
    """The text with folded case, one space between words, and plain apostrophes."""
    return " ".join(text.casefold().replace("\u2019", "'").split())


class _Text:
    """A part of a query, prepared once for the hints of all agents."""

    def __init__(self, raw: str) -> None:
        self.raw = raw
        self._prefixes: dict[int, set[str]] = {}

    @cached_property
    def flat(self) -> str:
        return _flattened(self.raw)

    @cached_property
    def words(self) -> set[str]:
        return set(_WORD.findall(self.flat))

    def prefixes(self, length: int) -> set[str]:
        if length not in self._prefixes:
            self._prefixes[length] = {word[:length] for word in self.words}
        return self._prefixes[length]


class _Literal:
    """A phrase, or a keyword that is more than one plain word.

    first_word: the whole word that it starts with, or None.
    """

    def __init__(self, text: str) -> None:
        self.folded = _flattened(text.removesuffix(_STEM))
        first = _WORD.match(self.folded)
        self._starts_word = first is not None
        self._ends_word = not text.endswith(_STEM) and _is_word_char(self.folded[-1:])
        self.first_word = first[0] if first and first.end() < len(self.folded) else None

    def is_in(self, text: _Text) -> bool:
        """True if it occurs in the text at word boundaries. String search, because compiling an
        expression for each of the hundreds of phrases would take half a second."""
        flat = text.flat
        start = flat.find(self.folded)
        while start >= 0:
            end = start + len(self.folded)
            cuts_left = self._starts_word and start > 0 and _is_word_char(flat[start - 1])
            cuts_right = self._ends_word and _is_word_char(flat[end : end + 1])
            if not cuts_left and not cuts_right:
                return True
            start = flat.find(self.folded, start + 1)
        return False


def _is_word_char(character: str) -> bool:
    return _WORD.fullmatch(character) is not None


class _CompiledHints:
    """The hints of one agent, indexed so that only a few of them are tried on a text."""

    def __init__(self, hints: RoutingHints) -> None:
        self.hints = hints
        self.features: dict[RouteFeature, float] = hints.features
        self._words: dict[str, tuple[str, float]] = {}
        self._stems: dict[int, dict[str, tuple[str, float]]] = {}
        self._anchored: dict[str, list[tuple[str, float, _Literal]]] = {}
        self._floating: list[tuple[str, float, _Literal]] = []
        for keyword, weight in hints.keywords.items():
            self._add_keyword(keyword, weight)
        for phrase, weight in hints.phrases.items():
            self._add_literal(f"phrase:{phrase}", phrase, weight)
        self._patterns = [
            (f"pattern:{pattern}", weight, re.compile(pattern, re.IGNORECASE))
            for pattern, weight in hints.patterns.items()
        ]

    def words_in(self, text: _Text) -> Iterator[tuple[str, float]]:
        """The name and weight of every keyword and phrase that occurs in `text`."""
        for word in self._words.keys() & text.words:
            yield self._words[word]
        for length, stems in self._stems.items():
            for stem in stems.keys() & text.prefixes(length):
                yield stems[stem]
        for anchor in self._anchored.keys() & text.words:
            yield from _present(self._anchored[anchor], text)
        yield from _present(self._floating, text)

    def patterns_in(self, text: _Text) -> Iterator[tuple[str, float]]:
        """The name and weight of every pattern that matches in `text`."""
        for name, weight, pattern in self._patterns:
            if pattern.search(text.raw):
                yield name, weight

    def _add_keyword(self, keyword: str, weight: float) -> None:
        name, folded = f"keyword:{keyword}", keyword.removesuffix(_STEM).casefold()
        if not _WORD.fullmatch(folded):
            self._add_literal(name, keyword, weight)
        elif keyword.endswith(_STEM):
            self._stems.setdefault(len(folded), {})[folded] = (name, weight)
        else:
            self._words[folded] = (name, weight)

    def _add_literal(self, name: str, text: str, weight: float) -> None:
        literal = _Literal(text)
        if not literal.folded:
            return
        if literal.first_word:
            self._anchored.setdefault(literal.first_word, []).append((name, weight, literal))
        else:
            self._floating.append((name, weight, literal))


def _present(
    literals: Iterable[tuple[str, float, _Literal]], text: _Text
) -> Iterator[tuple[str, float]]:
    for name, weight, literal in literals:
        if literal.is_in(text):
            yield name, weight


class KeywordRouter:
    """Routes by the hints in the agents' specs; see the module for the score and the confidence.

    Below `threshold` the conversation agent answers; if there is none, the best agent does. A
    trailing `*` makes a keyword or the last word of a phrase a stem (`translat*`); without it they
    are whole words, except in scripts that put no spaces between words. Patterns see only the start
    and the end of the question; the author of the registry must make sure that they do not
    backtrack without bound. Thread-safe.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._compiled: dict[str, _CompiledHints] = {}

    def route(
        self,
        query: str,
        agents: Mapping[str, AgentSpec],
        context: RouteContext = NO_CONTEXT,
    ) -> Route:
        """The agent for `query`, with the evidence for every agent that may answer, best first. Of
        the context it uses the number of images."""
        attached = image_route(agents, context)
        if attached is not None:
            return attached
        language, agents = detect(query), candidates(agents, context.images)
        found = self.candidates(query, language, agents)
        best = found[0] if found else RouteCandidate(agent_id=CONVERSATION, score=0.0)
        confidence = _confidence(found)
        if found and best.score > 0 and confidence >= self.threshold:
            agent_id, reason = best.agent_id, _reason(best, language)
        else:
            agent_id = CONVERSATION if CONVERSATION in agents else best.agent_id
            reason = _fallback_reason(best, confidence, agent_id)
        return Route(
            agent_id=agent_id,
            confidence=confidence,
            reason=reason,
            language=language.code,
            candidates=found,
        )

    def candidates(
        self,
        query: str,
        language: Language,
        agents: Mapping[str, AgentSpec],
        among: Container[str] | None = None,
        strengths: Mapping[RouteFeature, float] | None = None,
    ) -> list[RouteCandidate]:
        """The evidence for every agent, or only for those in `among`, best first. `language` and
        `strengths` (see `features.measure`) are those of the question."""
        whole = excerpt(query)
        near = excerpt(whole, NEAR_HEAD_CHARS, NEAR_TAIL_CHARS)
        texts = [_Text(near)] if near is whole else [_Text(near), _Text(whole)]
        if strengths is None:
            strengths = measure(whole, language)
        candidates = []
        for agent_id, hints in self._hints_of(agents).items():
            if among is not None and agent_id not in among:
                continue
            evidence = _evidence(hints, texts, strengths)
            score = round(math.fsum(evidence.values()), _DECIMALS)
            candidates.append(RouteCandidate(agent_id=agent_id, score=score, evidence=evidence))
        return sorted(candidates, key=lambda candidate: -candidate.score)

    def _hints_of(self, agents: Mapping[str, AgentSpec]) -> dict[str, _CompiledHints]:
        """The compiled hints of `agents`; compiles only what is new or has changed."""
        known = self._compiled
        current = {}
        for agent_id, spec in agents.items():
            hints = known.get(agent_id)
            if hints is None or (hints.hints is not spec.routing and hints.hints != spec.routing):
                hints = _CompiledHints(spec.routing)
            current[agent_id] = hints
        self._compiled = current
        return current


def _fallback_reason(best: RouteCandidate, confidence: float, chosen: str) -> str:
    if best.score <= 0:
        return "no agent's hints occur in the question"
    # Rounded down, so that the text never claims that the threshold was reached.
    reached = f"{math.floor(confidence * 100) / 100:.2f}"
    if best.agent_id == chosen:
        return f"no agent is sure: {chosen} is the best guess ({reached})"
    return f"no agent is sure: the best guess was {best.agent_id} ({reached}), so {chosen} answers"


def _evidence(
    hints: _CompiledHints, texts: list[_Text], strengths: Mapping[RouteFeature, float]
) -> dict[str, float]:
    evidence: dict[str, float] = {}
    for name, weight in hints.patterns_in(texts[0]):
        evidence[name] = round(weight, _DECIMALS)
    for factor, text in zip((1.0, FAR_FACTOR), texts, strict=False):
        for name, weight in hints.words_in(text):
            evidence.setdefault(name, round(weight * factor, _DECIMALS))
    for feature, weight in hints.features.items():
        strength = strengths.get(feature, 0.0)
        if strength > 0:
            evidence[f"feature:{feature}"] = round(weight * strength, _DECIMALS)
    return dict(sorted(evidence.items(), key=lambda item: (-item[1], item[0])))


def _confidence(candidates: list[RouteCandidate]) -> float:
    if not candidates or candidates[0].score <= 0:
        return 0.0
    best = candidates[0].score
    second = candidates[1].score if len(candidates) > 1 else 0.0
    return round(best / (best + 1) * (0.6 + 0.4 * (best - second) / best), _DECIMALS)


def _reason(best: RouteCandidate, language: Language) -> str:
    """The strongest evidence in words, such as "keywords 'python', 'function' and code shape"."""
    named: dict[str, list[str]] = {}
    for name in list(best.evidence)[:_SHOWN_HINTS]:
        kind, _, hint = name.partition(":")
        named.setdefault(kind, []).append(hint)
    parts = []
    for kind, hints in named.items():
        if kind == "feature":
            parts += [_feature_in_words(hint, language) for hint in hints]
        elif kind == "pattern":
            parts.append("a pattern" if len(hints) == 1 else f"{len(hints)} patterns")
        else:
            quoted = ", ".join(f"'{hint}'" for hint in hints)
            parts.append(f"{kind}{'s' if len(hints) > 1 else ''} {quoted}")
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _feature_in_words(feature: str, language: Language) -> str:
    if feature == "non_english":
        return f"the language is {language.code or 'not English'}"
    return feature.replace("_", " ")
