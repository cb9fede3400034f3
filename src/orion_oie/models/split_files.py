"""Model files on this machine: the parts of a split one, and whether a file is a model at all.

Whoever gets a path from a user checks it here: nothing blocks, nothing is loaded, and every error
names the absolute path and what to do. Formats are read by `formats.gguf`.
"""

import itertools
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orion_oie.errors import ModelCorruptError, ModelError, ModelNotFoundError
from orion_oie.models.formats.gguf import (
    GGUFHeader,
    read_header,
)
from orion_oie.schemas.validation import did_you_mean

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.I)
_UNFINISHED = re.compile(
    r"\.(?:part|incomplete|partial|crdownload|download|aria2|opdownload)$|-partial(?:-\d+)?$", re.I
)
_PIECE = re.compile(r"\.gguf[.-](?:part\d+of\d+|split-\w+|part-\w+)$", re.I)
_MOST_NEIGHBOURS = 10_000
_SHOWN = 6
_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_MODELS = {
    "mmproj": "a projector for images (mmproj)",
    "adapter": "an adapter (LoRA)",
    "imatrix": "an importance matrix (imatrix)",
    "control vector": "a control vector",
    "vocabulary": "a vocabulary without any weights",
}


@dataclass(frozen=True, slots=True)
class SplitName:
    """The name of one file of a split model, `STEM-00001-of-00003.gguf`; `number` is from 1."""

    stem: str
    number: int
    count: int
    suffix: str = ".gguf"

    def part(self, number: int) -> str:
        """The name of another file of the same model."""
        return f"{self.stem}-{number:05d}-of-{self.count:05d}{self.suffix}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all files of the model, in order."""
        return tuple(self.part(number) for number in range(1, self.count + 1))


def split_name(name: str) -> SplitName | None:
    """A file name, with or without folders, taken apart; None when it is not that of a split."""
    found = _SPLIT.fullmatch(name)
    if found is None:
        return None
    parsed = SplitName(found["stem"], int(found["number"]), int(found["count"]), found["suffix"])
    return parsed if 1 <= parsed.number <= parsed.count else None


def split_parts(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """All files of the model whose first file is `path`: that one alone unless its name is that of
    a split. Paths are absolute.

    Raises `ModelNotFoundError` when it is not the first file, and when others are missing.
    """
    first = _absolute(path)
    split = split_name(first.name)
    if split is None:
        return (first,)
    if split.number != 1:
        raise ModelNotFoundError(
            f"{first}: this is part {split.number} of {split.count} of a split model: name the "
            f"first part, {first.with_name(split.part(1))}",
            path=str(first),
        )
    parts = tuple(first.with_name(name) for name in split.parts)
    missing = [part.name for part in parts if not os.path.exists(part)]
    if missing and os.path.lexists(first):
        raise ModelNotFoundError(
            f"{first}: {len(missing)} of the {split.count} parts of this split model are missing: "
            f"{shortened(missing)}; all of them belong into {first.parent}",
            path=str(first),
            missing=missing,
        )
    return parts if not missing else (first,)


def check_gguf_file(path: str | os.PathLike[str]) -> GGUFHeader:
    """The header of a local file that can be loaded as a model.

    Raises `ModelNotFoundError` when there is no readable file, `ModelCorruptError` when it is
    broken or something else, and `ModelError` for a sound GGUF file that is no model. Never
    blocks, whatever the path names.
    """
    file = _absolute(path)
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFoundError(f"{file}: {_why_absent(file)}", path=str(file)) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelNotFoundError(
            f"{file}: it cannot be read ({reason}): check the path and the permissions",
            path=str(file),
        ) from error
    if stat.S_ISDIR(mode):
        raise ModelNotFoundError(f"{file}: {_about_folder(file)}", path=str(file))
    _refuse_special(file, mode)
    _refuse_unfinished(file)
    header = read_header(file)
    if header.role in _NO_MODELS:
        raise ModelError(
            f"{file}: this is {_NO_MODELS[header.role]}, not a model: name the model's own file",
            path=str(file),
            role=header.role,
        )
    _check_split(file, header)
    return header


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is a download that has not finished."""
    return _UNFINISHED.search(name) is not None


def gguf_names(folder: Path) -> list[str]:
    """The names of the GGUF files in a folder, sorted; empty for an unreadable one."""
    return sorted(name for name in names_in(folder) if name.lower().endswith(".gguf"))


def shortened(names: Sequence[str]) -> str:
    """A list in a message: the first names and the number of the others."""
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _absolute(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if not text:
        raise ModelNotFoundError("the path of the model is empty: name a .gguf file", path="")
    return Path(os.path.abspath(os.path.expanduser(text)))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, at most some thousands; none for one that cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, _MOST_NEIGHBOURS)]
    except (OSError, ValueError):
        return []


def _why_absent(file: Path) -> str:
    if os.path.islink(file):
        return (
            f"it is a link to {os.path.realpath(file)}, which does not exist: fetch the model again"
        )
    folder = file.parent
    if not folder.is_dir():
        while not folder.exists() and not folder.parent.is_dir():
            folder = folder.parent
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        return f"there is no such file: {folder} {what}{_close(folder.name, folder.parent)}"
    names = names_in(folder)
    for name in names:
        if name.startswith(file.name) and is_unfinished(name):
            return f"its download has not finished ({name} is there): fetch it again"
    hint = _close(file.name, folder)
    ggufs = [] if hint else gguf_names(folder)
    if ggufs:
        hint = f"; the GGUF files in its folder are {shortened(ggufs)}"
    return f"there is no such file{hint or ': check the path, or fetch the model'}"


def _close(name: str, folder: Path) -> str:
    """A suggestion among the names in a folder, first of all one that differs in case alone."""
    names = names_in(folder)
    for known in names:
        if known.lower() in (name.lower(), f"{name}.gguf".lower()):
            return f" (did you mean '{known}'?)"
    return close_name(name, names)


def close_name(name: str, known: Iterable[str]) -> str:
    """A suggestion for the name of a file. Names are compared without `.gguf`, which makes all of
    them alike."""
    stems = {one.removesuffix(".gguf"): one for one in known}
    hint = did_you_mean(name.removesuffix(".gguf"), stems)
    found = re.search(r"'(.*)'", hint)
    return f" (did you mean '{stems[found[1]]}'?)" if found else ""


def _about_folder(folder: Path) -> str:
    names = gguf_names(folder)
    firsts = [name for name in names if _is_first_or_whole(name)]
    if firsts:
        return f"this is a folder: name one of its GGUF files, {shortened(firsts)}"
    others = names_in(folder)
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in others):
        return (
            "this is a folder with a model that is not GGUF: convert it to GGUF, or fetch a "
            "repository that has GGUF files"
        )
    return "this is a folder without any GGUF file: name a .gguf file"


def _is_first_or_whole(name: str) -> bool:
    split = split_name(name)
    return split is None or split.number == 1


def _refuse_special(file: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    what = next((name for is_kind, name in _SPECIAL if is_kind(mode)), "no regular file")
    raise ModelCorruptError(
        f"{file}: it is {what}, and models are read from regular files alone: save it to a file",
        path=str(file),
    )


def _refuse_unfinished(file: Path) -> None:
    if is_unfinished(file.name) or os.path.exists(f"{file}.aria2"):
        raise ModelCorruptError(
            f"{file}: this is a download that has not finished: fetch it again, and name the file "
            "that it becomes",
            path=str(file),
        )
    if _PIECE.search(file.name):
        raise ModelCorruptError(
            f"{file}: this is a piece of a file that was cut: join all pieces with 'cat' in their "
            "order, and name the result",
            path=str(file),
        )


def _check_split(file: Path, header: GGUFHeader) -> None:
    split = split_name(file.name)
    if not header.is_split or (split is not None and split.count == header.split_count):
        return
    raise ModelError(
        f"{file}: by its header this is part {header.split_no + 1} of {header.split_count}, but "
        "its name does not say so, and the others are found by name: call it "
        f"NAME-{header.split_no + 1:05d}-of-{header.split_count:05d}.gguf",
        path=str(file),
    )
