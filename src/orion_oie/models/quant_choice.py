"""The files of a repository that a quantization stands for. Pure: a listing in, a file set out.

People name a quantization as it stands in file names and folders (`Q4_K_M`, `UD-Q4_K_XL`, `bf16`);
there is no other list of them. Which quantization suits a machine is decided elsewhere.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orion_oie.errors import ModelNotFoundError
from orion_oie.models.split_files import (
    SplitName,
    is_unfinished,
    shortened,
    split_name,
)
from orion_oie.schemas.units import size_text
from orion_oie.schemas.validation import did_you_mean

PREFERRED: tuple[str, ...] = (
    # Four bits with larger blocks lose little and are the usual choice of other programs.
    *("Q4_K_M", "Q4_K_S", "Q4_K_L", "Q4_K_XL", "Q4_K", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"),
    *("MXFP4", "MXFP4_MOE", "NVFP4"),
    # More bits take more memory, but answer at least as well.
    *("Q5_K_M", "Q5_K_S", "Q5_K_L", "Q5_K_XL", "Q5_K", "Q5_0", "Q5_1"),
    *("Q6_K", "Q6_K_L", "Q6_K_XL", "Q8_0", "Q8_K_XL"),
    # Fewer bits cost quality: the most bits first.
    *("Q3_K_L", "Q3_K_XL", "Q3_K_M", "Q3_K", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"),
    *("Q2_K_L", "Q2_K_XL", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    *("TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S"),
    # Unquantized: four times the size, for those who quantize themselves.
    *("BF16", "F16", "F32"),
)
"""The order in which a quantization is taken when none is named."""

_LABEL = re.compile(
    r"(?<![A-Z0-9])(?P<dynamic>UD[-_])?(?P<base>IQ[1-9]_(?:XXS|XS|NL|XL|[SML])|TQ[12]_0"
    r"|Q[1-9]_K_(?:XXL|XL|XS|[SMLP])|Q[1-9]_K|Q[1-9]_[01](?:_\d_\d)?|Q[1-9](?!_)"
    r"|MXFP4_MOE|MXFP4|NVFP4|BF16|FP?16|FP?32)(?![A-Z0-9])"
)
_SYNONYMS = {"FP16": "F16", "FP32": "F32"}
_ADAPTER_LABELS = (None, "F16", "F32", "BF16", "Q8_0")
_OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".mlx", ".npz")
_SHOWN_CHOICES = 12


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a repository, by its path there; its size in bytes and its SHA-256, if known."""

    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class FileSet:
    """The file or files of one model, in order; `missing` are the names of parts that are not in
    the repository. `quantization` is in upper case, None when no name tells."""

    files: tuple[ListedFile, ...]
    quantization: str | None
    missing: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.name for file in self.files)

    @property
    def size_bytes(self) -> int | None:
        """The size of all files; None if one is unknown."""
        sizes = [file.size for file in self.files if file.size is not None]
        return sum(sizes) if len(sizes) == len(self.files) else None

    @property
    def shown(self) -> str:
        """The name that stands for all files."""
        return self.names[0]


def quantization_of(name: str) -> str | None:
    """The quantization in a file's name, else in its folders' names, such as "UD-Q4_K_XL"."""
    for part in reversed(name.upper().split("/")):
        found = list(_LABEL.finditer(part))
        if found:
            base = _SYNONYMS.get(found[-1]["base"], found[-1]["base"])
            return f"UD-{base}" if found[-1]["dynamic"] else base
    return None


def role_of_name(name: str) -> str | None:
    """What a GGUF file is instead of a model, by its name; None for a model."""
    base = name.rpartition("/")[2].lower().removesuffix(".gguf")
    words = _words(base)
    if "mmproj" in words or "projector" in words:
        return "a projector (mmproj)"
    label = quantization_of(base)
    # Names of models tell that an importance matrix or an adapter went into them.
    if "imatrix" in words and (label is None or "imatrix" in (words[0], words[-1])):
        return "an importance matrix"
    if not {"lora", "qlora", "adapter"}.isdisjoint(words) and "merged" not in words:
        return "an adapter (LoRA)" if label in _ADAPTER_LABELS else None
    return "a vocabulary" if "vocab" in words and label is None else None


def file_sets(listing: Iterable[ListedFile]) -> list[FileSet]:
    """The models in a repository: each whole file, and each split model, complete or not."""
    whole: list[FileSet] = []
    splits: dict[tuple[str, int, str], dict[int, ListedFile]] = {}
    for file in sorted(listing, key=lambda file: file.name):
        name = file.name
        if not name.lower().endswith(".gguf") or is_unfinished(name) or role_of_name(name):
            continue
        split = split_name(name)
        if split is None:
            whole.append(FileSet((file,), quantization_of(name)))
        else:
            parts = splits.setdefault((split.stem, split.count, split.suffix), {})
            parts[split.number] = file
    for (stem, count, suffix), parts in splits.items():
        names = SplitName(stem, 1, count, suffix).parts
        files = tuple(parts[number] for number in sorted(parts))
        missing = tuple(name for number, name in enumerate(names, 1) if number not in parts)
        whole.append(FileSet(files, quantization_of(names[0]), missing))
    return sorted(whole, key=lambda one: one.shown)


def choose_files(
    listing: Sequence[ListedFile],
    source: str,
    *,
    quantization: str | None = None,
    file: str | None = None,
) -> FileSet:
    """The files of the model that is named by its quantization or by a file, else the best.

    `source` is the text that names the repository, for messages. Raises `ModelNotFoundError` that
    lists what there is: for no match, several, a split model with missing parts, and a repository
    without GGUF files.
    """
    sets = file_sets(listing)
    if file is not None:
        return _complete(_by_file(listing, sets, source, file), source)
    if not sets:
        raise _nothing(listing, source)
    if quantization is not None:
        matches = _matching(sets, quantization.upper())
        if not matches:
            raise _unknown(sets, source, quantization)
        return _complete(_only(matches, source, quantization), source)
    complete = [one for one in sets if not one.missing]
    best = _best(complete or sets)
    return _complete(_only(best, source, best[0].quantization), source)


def _matching(sets: Sequence[FileSet], wanted: str) -> list[FileSet]:
    """The sets that a quantization in upper case may mean, by the first rule that finds any."""
    wanted = _SYNONYMS.get(wanted, wanted)
    exact = [one for one in sets if one.quantization == wanted]
    if exact:
        return exact
    base = [one for one in sets if _base(one) == wanted]  # only the dynamic kind exists
    if base:
        return base
    words = _words(wanted)
    named = [one for one in sets if _has_words(_words(one.shown.upper()), words)]
    if named:
        return _best(named)
    # "Q4" and "Q4_K" stand for their whole family.
    family = [one for one in sets if (_base(one) or "").startswith(f"{wanted}_")]
    return _best(family)


def _best(sets: Sequence[FileSet]) -> list[FileSet]:
    """Those with the most preferred quantization."""
    ranks = [_rank(one) for one in sets]
    return [one for one, rank in zip(sets, ranks, strict=True) if rank == min(ranks)]


def _rank(one: FileSet) -> tuple[int, str, bool]:
    base = _base(one)
    known = PREFERRED.index(base) if base in PREFERRED else len(PREFERRED)
    return known, base or "", one.quantization != base


def _base(one: FileSet) -> str | None:
    return one.quantization.removeprefix("UD-") if one.quantization is not None else None


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", text) if word]


def _has_words(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether all wanted words follow each other, and go on with no other part of a label."""
    size = len(wanted)
    return any(
        list(words[at : at + size]) == list(wanted)
        and not _is_part_of_label(words[at + size : at + size + 1])
        for at in range(len(words) - size + 1)
    )


def _is_part_of_label(after: Sequence[str]) -> bool:
    return bool(after) and after[0] in {"K", "S", "M", "L", "XS", "XXS", "XL", "NL", "0", "1"}


def _by_file(
    listing: Sequence[ListedFile], sets: Sequence[FileSet], source: str, wanted: str
) -> FileSet:
    """The set whose file, or whose first file, has this name, in whatever case."""
    names = [file.name for file in listing]
    name = _spelled(names, wanted)
    if name is None:
        hint = did_you_mean(wanted, [one.shown for one in sets])
        raise ModelNotFoundError(
            f"{source} has no file '{wanted}'{hint or _there_are(sets)}",
            source=source,
            choices=[one.shown for one in sets],
        )
    for one in sets:
        if name == one.shown:
            return one
    if role := role_of_name(name):
        raise ModelNotFoundError(
            f"{source}: '{name}' is {role}, not a model{_there_are(sets)}",
            source=source,
            choices=[one.shown for one in sets],
        )
    split = split_name(name)
    if split is not None:
        raise ModelNotFoundError(
            f"{source}: '{name}' is part {split.number} of {split.count} of a split model: name "
            f"the first, '{split.part(1)}'",
            source=source,
        )
    raise ModelNotFoundError(f"{source}: '{name}' is no GGUF file{_there_are(sets)}", source=source)


def _spelled(names: Sequence[str], wanted: str) -> str | None:
    """A name as it is spelled in the repository: exactly, in another case, or without folders;
    the last two only if there is one such."""
    if wanted in names:
        return wanted
    lower = wanted.lower()
    for alike in (
        [name for name in names if name.lower() == lower],
        [name for name in names if name.lower().endswith(f"/{lower}")],
    ):
        if alike:
            return alike[0] if len(alike) == 1 else None
    return None


def _complete(one: FileSet, source: str) -> FileSet:
    if one.missing:
        count = len(one.files) + len(one.missing)
        raise ModelNotFoundError(
            f"{source}: {len(one.missing)} of the {count} parts of its split model are missing: "
            f"{shortened(one.missing)}",
            source=source,
            missing=list(one.missing),
        )
    return one


def _only(matches: Sequence[FileSet], source: str, wanted: str | None) -> FileSet:
    if len(matches) == 1:
        return matches[0]
    names = [one.shown for one in matches]
    what = f" of the quantization {wanted}" if wanted else ""
    base, at, revision = source.partition("@")
    raise ModelNotFoundError(
        f"{source} has {len(names)} models{what}: name the file of one, such as "
        f"'{base}/{names[0]}{at}{revision}'; they are {shortened(names)}",
        source=source,
        choices=names,
    )


def _nothing(listing: Sequence[ListedFile], source: str) -> ModelNotFoundError:
    names = [file.name for file in listing]
    roles = sorted({role for name in names if name.lower().endswith(".gguf")
                    and (role := role_of_name(name))})  # fmt: skip
    if roles:
        why = f"only {' and '.join(roles)}: look for the repository of the model itself"
    elif any(name.lower().endswith(_OTHER_FORMATS) for name in names):
        why = (
            "but a model in another format: look for a repository of the same name that ends in "
            "'-GGUF', or convert the model with llama.cpp"
        )
    else:
        why = "and no model in any other format that could be converted"
    return ModelNotFoundError(f"{source} has no GGUF model, {why}", source=source, choices=[])


def _unknown(sets: Sequence[FileSet], source: str, wanted: str) -> ModelNotFoundError:
    labels = _labels(sets)
    hint = did_you_mean(wanted.upper(), [one.quantization for one in sets if one.quantization])
    known = f"; there are {', '.join(labels)}" if labels else _there_are(sets)
    return ModelNotFoundError(
        f"{source} has no quantization '{wanted}'{hint}{known}",
        source=source,
        quantization=wanted,
        choices=[one.quantization or one.shown for one in sets],
    )


def _labels(sets: Sequence[FileSet]) -> list[str]:
    """The quantizations that can be named, the preferred ones first, with their sizes."""
    labels: dict[str, str] = {}
    for one in sorted(sets, key=_rank):
        if one.quantization is not None:
            size = f" ({size_text(one.size_bytes)})" if one.size_bytes else ""
            labels.setdefault(one.quantization, f"{one.quantization}{size}")
    shown = list(labels.values())[:_SHOWN_CHOICES]
    return [*shown, f"{len(labels) - len(shown)} more"] if len(labels) > len(shown) else shown


def _there_are(sets: Sequence[FileSet]) -> str:
    names = [one.shown for one in sets]
    return f"; the models there are {shortened(names)}" if names else "; there is no model there"
