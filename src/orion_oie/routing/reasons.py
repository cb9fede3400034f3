"""What a route says about the agent that answers: the reason and the notes in words.

Pure functions of a decision. A later stage may overrule an earlier one, so a note is written only
when the agent is known, and the reason never speaks for another one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orion_oie.routing.decision import Decision

_SHOWN_REASONS = 3


class Verdict(NamedTuple):
    """The agent that answers. best: the most probable one, with that confidence. is_fallback: no
    agent is good enough, so the conversation agent, or else the best one, answers."""

    agent_id: str
    best: str
    confidence: float
    is_fallback: bool


def reason(
    decision: Decision, verdict: Verdict, evidence: Mapping[str, float], notes: Sequence[str]
) -> str:
    """Why this agent answers. evidence: what speaks for it; notes: those of `notes`."""
    chosen = verdict.agent_id
    if verdict.is_fallback:
        if decision.top <= 0:
            return "nothing in the question points to an agent"
        # Rounded down, so that the text never claims that the threshold was reached.
        reached = math.floor(verdict.confidence * 100) / 100
        if chosen == verdict.best:
            return f"no agent is sure: {chosen} is the best guess ({reached:.2f})"
        return (
            f"no agent is sure: the best guess was {verdict.best} ({reached:.2f}), "
            f"so {chosen} answers"
        )
    if chosen != decision.best_by_text and notes:
        return "; ".join(notes)  # a later stage chose it, and the note of that stage says why
    if not decision.prompt.substance and chosen not in decision.hints:
        return "; ".join(["there is no word in the question to go by", *notes])
    named = [_in_words(name) for name in evidence]
    shown = list(dict.fromkeys(named))[:_SHOWN_REASONS]
    words = f"reads most like {chosen}"
    if shown:
        words += f": {', '.join(shown)}"
    return "; ".join([words, *notes])


def notes(decision: Decision, chosen: str) -> tuple[list[str], list[str]]:
    """The notes that belong into the reason of `chosen`, and the others."""
    found: list[str] = []
    asides: list[str] = []
    if decision.explicit:
        topic, words = decision.explicit
        profile = decision.profiles.get(chosen)
        if profile is not None and topic in profile.owns:
            found.append(f"asked for outright: '{words}'")
        else:
            asides.append(f"'{words}' asks for {topic}")
    if decision.session is not None:
        last, better, why = decision.session
        if chosen != last:
            found.append(f"leaves {last}, which answered last")
        elif better != last:
            because = f": {why}" if why else ""
            found.append(f"stays with {last}, though {better} fits the words better{because}")
    if decision.tie is not None:
        first, second, said = decision.tie
        preferred = first if said >= 0.5 else second
        note = f"a language model was asked: {first} {said:.2f}, {second} {1 - said:.2f}"
        (found if chosen == preferred else asides).append(note)
    if decision.resident is not None:
        faster, slower, saved = decision.resident
        if chosen == faster:
            found.append(
                f"{faster} instead of the near-equal {slower}: it can answer {saved:.1f} s earlier"
            )
    return found, [*asides, *decision.asides]


def _in_words(name: str) -> str:
    """A piece of evidence as it appears in a reason: words in quotes, shapes without."""
    kind, _, what = name.partition(":")
    if kind in ("shape", "feature"):
        return what.strip().replace("_", " ")
    if kind == "pattern":
        return "a pattern"
    return f"'{what if kind in ('keyword', 'phrase') else name}'"
