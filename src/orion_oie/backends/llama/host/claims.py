"""What a registry states about a model, compared with the headers of its files. Pure.

A wrong statement that the engine acts on is an error: the model is another one than was asked for.
One that only describes it is a warning.
"""

from collections.abc import Iterator, Sequence

from orion_oie.backends.base import LoadSpec
from orion_oie.errors import ModelCorruptError, ModelError
from orion_oie.models.formats.gguf import GGUFHeader
from orion_oie.models.quantization import level_of
from orion_oie.schemas.units import size_text

_LEAST_SIZE_GAP = 0.2


def check_claims(spec: LoadSpec, headers: Sequence[GGUFHeader]) -> list[str]:
    """The warnings about a model; `headers` are those of its files, the first one first.

    Raises `ModelError` when it is of another kind, and `ModelCorruptError` when its quantization is
    of another level.
    """
    header = headers[0]
    where = spec.files[0]
    if header.is_embedding_model and not spec.is_embedding:
        raise ModelError(
            f"{where}: this is an embedding model ({header.architecture}), which does not answer "
            "questions; register it with 'type': 'embedding' and use engine.embed()",
            path=str(where),
        )
    stated, found = spec.info.quantization, header.stated_quantization
    levels = {level_of(name) for name in (stated, found) if name}
    if len(levels) == 2 and None not in levels:
        raise ModelCorruptError(
            f"{where}: the registry states {stated} for {spec.key}, but by its header the file is "
            f"{found}: correct or leave out 'quantization', or fetch the right file",
            path=str(where),
            stated=stated,
            found=found,
        )
    return list(_warnings(spec, headers))


def _warnings(spec: LoadSpec, headers: Sequence[GGUFHeader]) -> Iterator[str]:
    info, header = spec.info, headers[0]
    facts = [
        ("quantization", info.quantization, header.stated_quantization),
        ("context_length", info.context_length, header.context_length),
        ("license", info.license, header.license),
    ]
    for name, stated, found in facts:
        if stated and found and str(stated).lower() != str(found).lower():
            yield (
                f"{spec.key}: the registry states {name} {stated}, the header of "
                f"{spec.files[0]} {found}; the header counts"
            )
    asked, trained = spec.context_length or 0, header.context_length
    if trained and asked > trained:
        yield (
            f"{spec.key}: context_length {asked} was asked for, but the model was trained on "
            f"{trained} tokens, and has no more"
        )
    size = sum(one.file_size for one in headers)
    if info.size_bytes and abs(size - info.size_bytes) > _LEAST_SIZE_GAP * info.size_bytes:
        yield (
            f"{spec.key}: the registry states {size_text(info.size_bytes)}, its files have "
            f"{size_text(size)}"
        )
