"""A receipt as a short table for people. Pure."""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orion_oie.schemas.units import in_mib, size_text

if TYPE_CHECKING:
    from orion_oie.schemas.results import Receipt

_WIDTH = 96
_OUTCOMES = {
    "answered": "answered",
    "unavailable": "is not here",
    "loading": "is being loaded",
    "circuit_open": "is paused",
    "failed": "failed",
    "restarted": "failed after its first words",
    "not_needed": "was not needed",
}


def receipt_table(receipt: "Receipt") -> str:
    """The receipt in lines of a label and a text, without what did not happen."""
    rows = [row for row in _rows(receipt) if row[1]]
    width = max(len(label) for label, _ in rows) + 2
    lines = []
    for label, text in rows:
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=label.ljust(width),
            subsequent_indent=" " * width,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _rows(receipt: "Receipt") -> Iterator[tuple[str, str]]:
    yield "request", receipt.request_id
    route, model, load, variant = receipt.route, receipt.model, receipt.load, receipt.variant
    if route is not None:
        yield "agent", f"{route.agent_id} ({route.confidence:.2f}): {route.reason}"
    if model is not None:
        size = f", {size_text(model.size_bytes)}" if model.size_bytes else ""
        yield "model", f"{model.model_id}@{model.variant}{size}, on {model.device}"
    for one in receipt.considered:
        if one.outcome != "not_needed":
            why = one.error or one.reason
            yield "  " + one.role, f"{one.model_id} {_OUTCOMES[one.outcome]}: {why}".rstrip(": ")
    if variant is not None and variant.budget_bytes is not None:
        budget = f"{in_mib(variant.reserved_bytes)} of {in_mib(variant.budget_bytes)}"
        yield "memory", f"{budget} reserved for models; the variant: {variant.reason}"
    if receipt.cold_load and load is not None:
        yield "load", "; ".join(filter(None, [f"cold, {load.mode}", load.note]))
    yield "evicted", ", ".join(receipt.evicted)
    if receipt.replays:
        yield "replays", f"{receipt.replays}, after a crash"
    if receipt.dropped_turns:
        yield "dropped", f"{receipt.dropped_turns} of the oldest turns, for the context"
    if receipt.finish_reason == "length":
        yield "cut off", "at max_tokens, or at the end of the context: the answer is not complete"
    if receipt.removed_characters:
        yield "removed", f"{receipt.removed_characters} control characters from the answer"
    yield "seed", "" if receipt.seed is None else str(receipt.seed)
    spent = [f"{name.replace('_', ' ')} {ms:.0f}" for name, ms in receipt.state_ms.items() if ms]
    yield "time in ms", ", ".join(spent)
