"""Conversion of pydantic's errors into readable lines, one per problem, with suggestions.

Used at every edge where outside data enters: request options, configuration, models.json.
"""

import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orion_oie.errors import InvalidRequestError

_SHOWN_VALUE_CHARS = 60
_QUERY = re.compile(r"(https?://[^\s'\"?]*)\?[^\s'\"]*")  # of an address; it may be a signature
_CLOSE = 0.6  # least similarity of names, of 1
_CLOSE_ELSEWHERE = 2 / 3  # of the many names of all sections some are similar by chance


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" if a known word is close, else an empty string."""
    import difflib  # only mistakes need it

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=_CLOSE)
    return f" (did you mean '{close[0]}'?)" if close else ""


def encoded(text: str, where: str, **details: object) -> bytes:
    """A text in UTF-8. Raises `InvalidRequestError` with `where` and the details for one that no
    tokenizer could take."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{where} is not valid Unicode: unpaired surrogate at index {error.start}", **details
        ) from None


def problems_of(
    error: ValidationError, model: type[BaseModel], whole: type[BaseModel] | None = None
) -> list[str]:
    """One readable line per problem of a failed validation of `model`.

    `whole` is the model that `model` is a section of, if it is one: a key that belongs in another
    section gets its dotted path as the suggestion.
    """
    sections = whole or model
    return [_line(item, model, sections) for item in error.errors(include_url=False)]


def _line(item: Mapping[str, Any], model: type[BaseModel], whole: type[BaseModel]) -> str:
    loc = tuple(item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_of(_annotation_at(model, loc[:-1]))
        return f"{_dotted(loc)}: unknown key{_suggestion(str(loc[-1]), known, whole)}"
    if item["type"] == "missing":
        return f"{_dotted(loc)}: missing"
    hint = ""
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        hint = did_you_mean(item["input"], _literals_of(_annotation_at(model, loc)))
    bounds = "" if item["type"] == "value_error" else _bounds_at(model, loc)
    allowed = f"; allowed: {bounds}" if bounds else ""
    return f"{_dotted(loc)}: {item['msg']}{hint}{allowed}, got {_shown(item['input'])}"


def _suggestion(word: str, known: Collection[str], whole: type[BaseModel]) -> str:
    """The rest of a line about an unknown key: where the key of this name belongs, or the closest
    key of its own section or another one, or all known keys."""
    paths = [path for path in _paths_of(whole) if "." in path]
    homes = [path for path in paths if _name(path) == word]
    if homes:
        return f"; did you mean {' or '.join(homes)}?"
    likeness, path = max(((_likeness(word, path), path) for path in paths), default=(0.0, ""))
    if path and likeness > max((_ratio(word, name) for name in known), default=0.0):
        return f"; did you mean {path}?"
    hint = did_you_mean(word, known)
    if not hint and known:
        return f"; known are {', '.join(sorted(known))}"
    return hint


def _likeness(word: str, path: str) -> float:
    """How close a key is to the name of a path or, with the order of words ignored, to all of it:
    "auto_download" is close to "download.auto". 0 below the least that is worth a suggestion."""
    likeness = max(_ratio(word, _name(path)), _ratio(_words(word), _words(path)))
    return likeness if likeness >= _CLOSE_ELSEWHERE else 0.0


def _ratio(one: str, other: str) -> float:
    import difflib  # only mistakes need it

    return difflib.SequenceMatcher(None, one, other).ratio()


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _paths_of(model: type[BaseModel]) -> Iterator[str]:
    """The dotted paths of all fields of a model and of its sections."""
    for name, field in model.model_fields.items():
        yield name
        for member in _members(field.annotation):
            if _is_model(member):
                yield from (f"{name}.{path}" for path in _paths_of(member))


def _words(path: str) -> str:
    return " ".join(sorted(path.replace(".", "_").split("_")))


def _dotted(loc: tuple[Any, ...]) -> str:
    names = [str(part) for part in loc if not _is_union_tag(part)]
    return ".".join(names) or "(top level)"


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and (
        "[" in part or part.startswith("constrained-") or part in {"str", "int", "float", "bool"}
    )


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a huge {type(value).__name__}"
    text = _QUERY.sub(r"\1?...", text)
    if len(text) <= _SHOWN_VALUE_CHARS:
        return text
    return f"{text[:_SHOWN_VALUE_CHARS]}... ({len(text)} characters)"


def _members(annotation: Any) -> list[Any]:
    """The annotation and everything inside its unions and `Annotated` wrappers."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for arg in get_args(annotation) for inner in _members(arg)]
    return [annotation]


def _annotation_at(annotation: Any, loc: tuple[Any, ...]) -> Any:
    for part in loc:
        for member in _members(annotation):
            if _is_model(member):
                if str(part) in member.model_fields:
                    annotation = member.model_fields[str(part)].annotation
                    break
            elif get_origin(member) is dict:
                annotation = get_args(member)[1]
                break
            elif get_origin(member) in (list, tuple):
                annotation = get_args(member)[0]
                break
    return annotation


def _fields_of(annotation: Any) -> set[str]:
    return {
        name
        for member in _members(annotation)
        if _is_model(member)
        for name in (*member.model_fields, *getattr(member, "also_known", ()))
    }


def _literals_of(annotation: Any) -> list[str]:
    return [
        value
        for member in _members(annotation)
        if get_origin(member) is Literal
        for value in get_args(member)
        if isinstance(value, str)
    ]


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _bounds_at(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    *sections, name = [str(part) for part in loc if not _is_union_tag(part)] or [""]
    owner: Any = model
    for section in sections:
        field = owner.model_fields.get(section)
        owner = None if field is None else next(filter(_is_model, _members(field.annotation)), None)
        if owner is None:
            return ""
    if name not in owner.model_fields:
        return ""
    schema = owner.model_json_schema()["properties"][name]
    parts = []
    for option in schema.get("anyOf", [schema]):
        if "enum" in option:
            parts.append(" or ".join(repr(value) for value in option["enum"]))
        elif option.get("type") in ("number", "integer"):
            parts.append(_interval(option))
        elif option.get("type") not in (None, "null"):
            parts.append(str(option["type"]))
    return " or ".join(parts)


def _interval(schema: Mapping[str, Any]) -> str:
    kind = schema["type"]
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    left = "" if low is None else f" {'>=' if 'minimum' in schema else '>'} {low}"
    right = "" if high is None else f" {'<=' if 'maximum' in schema else '<'} {high}"
    return f"{kind}{left}{' and' if left and right else ''}{right}"
