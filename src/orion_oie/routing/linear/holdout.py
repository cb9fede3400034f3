"""Pure: which labelled prompts are held out of a training, so that it can be judged on them."""

from collections.abc import Sequence
from hashlib import blake2b

from orion_oie.routing.linear.fitting import Example

_ONE_IN = 5


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The examples to learn from and those held out: a fifth of each label, at least one of those
    that have two texts. The digest of a text decides, so the order of the examples does not matter,
    and a text is never on both sides."""
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
