"""What is found in the folders of another program: models, and what is there but unusable."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Program = Literal["ollama", "lmstudio", "hub"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine. `source` is what to type for it, `name` what to show; `where` is
    the program whose folder it lies in. Of a split model, `paths` are all files in order."""

    source: str
    name: str
    paths: tuple[Path, ...]
    size_bytes: int
    where: Program
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class Unusable:
    """Something that would be a model or a folder of models, and the reason why it is none."""

    name: str
    reason: str
    where: Program


@dataclass(frozen=True, slots=True)
class Found:
    """Everything in the folders of one or more programs."""

    models: tuple[LocalModel, ...] = ()
    unusable: tuple[Unusable, ...] = ()

    @staticmethod
    def together(parts: "Iterable[Found]") -> "Found":
        """Several results as one, in their order."""
        listed = list(parts)
        return Found(
            tuple(model for part in listed for model in part.models),
            tuple(one for part in listed for one in part.unusable),
        )
