"""The split of labelled prompts into a training set and a held-out set: a pure function."""

from collections.abc import Sequence
from hashlib import blake2b

from orion_oie.routing.linear.fitting import Example

_ONE_IN = 5


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The training examples and the held-out ones: a fifth of each label, and at least one of a
    label with two or more texts. The digest of a text decides, so the order of the examples does
    not matter and no text is on both sides."""
    texts: dict[str, set[str]] = {}
    for example in examples:
        texts.setdefault(example.label, set()).add(example.text)
    out: set[str] = set()
    for of_label in texts.values():
        count = max(1, len(of_label) // _ONE_IN) if len(of_label) > 1 else 0
        out.update(sorted(of_label, key=_digest)[:count])
    rest = [example for example in examples if example.text not in out]
    return rest, [example for example in examples if example.text in out]


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
