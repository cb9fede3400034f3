"""Conversion of pydantic's errors into readable lines, one per problem, with suggestions.

Used at every edge where outside data enters: request options, configuration, models.json.
"""

import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_SHOWN_VALUE_CHARS = 60


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" if a known word is close, else an empty string."""
    import difflib  # only mistakes need it

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One readable line per problem of a failed validation of `model`."""
    return [_line(item, model) for item in error.errors(include_url=False)]


def _line(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    loc = tuple(item["loc"])
    if item["type"] == "extra_forbidden":
        owner = _annotation_at(model, loc[:-1])
        known = _fields_of(owner)
        hint = did_you_mean(str(loc[-1]), known)
        if not hint and known:
            hint = f"; known are {', '.join(sorted(known))}"
        return f"{_dotted(loc)}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{_dotted(loc)}: missing"
    bounds = _bounds_at(model, loc)
    allowed = f"; allowed: {bounds}" if bounds else ""
    return f"{_dotted(loc)}: {item['msg']}{allowed}, got {_shown(item['input'])}"


def _dotted(loc: tuple[Any, ...]) -> str:
    names = [str(part) for part in loc if not _is_union_tag(part)]
    return ".".join(names) or "(top level)"


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "float", "bool"})


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a huge {type(value).__name__}"
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
            if isinstance(member, type) and issubclass(member, BaseModel):
                if str(part) in member.model_fields:
                    annotation = member.model_fields[str(part)].annotation
                    break
            elif get_origin(member) is dict:
                annotation = get_args(member)[1]
                break
            elif get_origin(member) is list:
                annotation = get_args(member)[0]
                break
    return annotation


def _fields_of(annotation: Any) -> set[str]:
    return {
        name
        for member in _members(annotation)
        if isinstance(member, type) and issubclass(member, BaseModel)
        for name in member.model_fields
    }


def _bounds_at(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    field_loc = [str(part) for part in loc if not _is_union_tag(part)]
    if not field_loc or len(field_loc) > 1 or field_loc[0] not in model.model_fields:
        return ""
    schema = model.model_json_schema()["properties"][field_loc[0]]
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
