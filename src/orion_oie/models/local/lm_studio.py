"""The models of LM Studio, found in its folder without LM Studio.

    FOLDER/PUBLISHER/REPO/FILE.gguf

The layout is that of https://lmstudio.ai/docs/basics/import-model.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from orion_oie.errors import InvalidRequestError, ModelError, ModelNotFoundError
from orion_oie.models.local.found import (
    Found,
    LocalModel,
    Unusable,
)
from orion_oie.models.local.walk import (
    Walk,
    is_forbidden,
    read_small,
)
from orion_oie.models.quant_choice import (
    FileSet,
    ListedFile,
    choose_files,
    file_sets,
    quantization_of,
)
from orion_oie.models.source_names import (
    LMStudioName,
    parse_source_name,
)
from orion_oie.models.split_files import (
    is_unfinished,
    shortened,
)
from orion_oie.schemas.validation import did_you_mean

_POINTER = "~/.lmstudio-home-pointer"
_HOMES = ("~/.lmstudio", "~/.cache/lm-studio")
_DEPTH = 4  # folders below that of all models


def lm_studio_folders() -> list[Path]:
    """The folders in which LM Studio may keep models, existing or not: by its settings, then in
    its home folder, which it notes in a file."""
    homes = list(_HOMES)
    with contextlib.suppress(OSError, ValueError):
        noted = read_small(Path(os.path.expanduser(_POINTER))).strip()
        if noted:
            homes.insert(0, noted)
    folders = []
    for home in [Path(os.path.expanduser(home)) for home in homes]:
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            said = json.loads(read_small(home / "settings.json")).get("downloadsFolder")
            if isinstance(said, str) and said:
                folders.append(Path(os.path.expanduser(said)))
        folders.append(home / "models")
    return list(dict.fromkeys(folders))


def lm_studio_models() -> Found:
    """All models in LM Studio's folders. Raises nothing."""
    return Found.together(map(_in_folder, lm_studio_folders()))


def find_lm_studio(name: LMStudioName) -> tuple[Path, ...]:
    """The files of a model that LM Studio has fetched; upper and lower case are the same.

    Raises `ModelNotFoundError`: for none, for several, for one with missing parts.
    """
    wanted = f"{name.publisher}/{name.repository}"
    known: list[str] = []
    for folder in lm_studio_folders():
        repositories, files, _ = _walked(folder)
        known += repositories
        for repository, listing in repositories.items():
            if repository.lower() == wanted.lower():
                chosen = choose_files(
                    listing,
                    f"lmstudio:{repository}",
                    quantization=name.quantization,
                    file=name.file,
                )
                return tuple(files[f"{repository}/{part}"] for part in chosen.names)
    hint = did_you_mean(wanted, known)
    if known and not hint:
        hint = f"; it has {shortened(known)}"
    where = "" if known else f"; looked in {', '.join(map(str, lm_studio_folders()))}"
    raise ModelNotFoundError(
        f"{name.text}: LM Studio has no such model on this machine{hint}: fetch it in LM Studio "
        f"('lms get {wanted}'), or from the hub with 'hf:{wanted}'{where}",
        source=name.text,
        choices=known,
    )


def _walked(folder: Path) -> tuple[dict[str, list[ListedFile]], dict[str, Path], Walk]:
    """The files of a folder: by PUBLISHER/REPO with their names in there, and by all of the name
    with their paths."""
    walk = Walk(folder, _DEPTH)
    repositories: dict[str, list[ListedFile]] = {}
    for file in walk.files:
        parts = file.name.split("/")
        if len(parts) > 2 and file.name.lower().endswith(".gguf"):
            inside = ListedFile("/".join(parts[2:]), file.size)
            repositories.setdefault("/".join(parts[:2]), []).append(inside)
    return repositories, {file.name: file.path for file in walk.files}, walk


def _in_folder(folder: Path) -> Found:
    if is_forbidden(folder):
        return Found(
            unusable=(Unusable(str(folder), "it cannot be read (Permission denied)", "lmstudio"),)
        )
    if not folder.is_dir():
        return Found()
    repositories, files, walk = _walked(folder)
    models: list[LocalModel] = []
    unusable = [Unusable(str(folder / name), why, "lmstudio") for name, why in walk.problems]
    unusable += [
        Unusable(str(file.path), "its download has not finished", "lmstudio")
        for file in walk.files
        if is_unfinished(file.name) and ".gguf" in file.name.lower()
    ]
    for repository, listing in repositories.items():
        sets = file_sets(listing)
        for one in sets:
            source = _source(repository, one, sets, files)
            if one.missing:
                reason = f"{len(one.missing)} of its parts are missing"
                unusable.append(Unusable(source, reason, "lmstudio"))
            elif one.size_bytes == 0:
                unusable.append(Unusable(source, "its file is empty", "lmstudio"))
            else:
                models.append(_model(source, repository, one, files))
    models += [
        LocalModel(str(file.path), file.name, (file.path,), file.size, "lmstudio",
                   quantization_of(file.name))
        for file in walk.files
        if file.name.count("/") < 2 and file_sets([ListedFile(file.name)])
    ]  # fmt: skip
    return Found(tuple(models), tuple(unusable))


def _model(source: str, repository: str, one: FileSet, files: Mapping[str, Path]) -> LocalModel:
    paths = tuple(files[f"{repository}/{name}"] for name in one.names)
    return LocalModel(source, repository, paths, one.size_bytes or 0, "lmstudio", one.quantization)


def _source(repository: str, one: FileSet, sets: list[FileSet], files: Mapping[str, Path]) -> str:
    """The shortest text that names a set among those of its repository; else its path."""
    publisher, _, name = repository.partition("/")
    whole = LMStudioName(publisher, name)
    if one.missing:
        return replace(whole, file=one.shown).text
    choices = [whole] if len(sets) == 1 else []
    if one.quantization is not None:
        choices.append(replace(whole, quantization=one.quantization))
    choices.append(replace(whole, file=one.shown))
    listing = [file for each in sets for file in each.files]
    for choice in choices:
        with contextlib.suppress(ModelError, InvalidRequestError):
            found = choose_files(listing, "", quantization=choice.quantization, file=choice.file)
            if found == one and parse_source_name(choice.text) == choice:
                return choice.text
    return str(files[f"{repository}/{one.shown}"])
