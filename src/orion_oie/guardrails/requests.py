"""Request validation: shape and size of the options, the question and the history.

Does not judge the intent of a request.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas.requests import (
    Message,
    RequestOptions,
)
from orion_oie.schemas.validation import encoded, problems_of


def checked_query(query: object, options: RequestOptions, max_chars: int) -> str:
    """The question, unchanged, if it and its options are valid. Raises `InvalidRequestError`."""
    question = check_query(query, max_chars)
    check_history(options.conversation_history, max_chars)
    check_images(options.images)
    check_text(options.system_prompt or "", "system_prompt", max_chars)
    _check_structure(options)
    return question


def checked_options(options: Mapping[str, object]) -> RequestOptions:
    """The keyword options of a request; raises `InvalidRequestError` with every problem."""
    try:
        return RequestOptions.model_validate(options)
    except ValidationError as error:
        problems = problems_of(error, RequestOptions)
        raise InvalidRequestError("; ".join(problems), problems=problems) from error


def check_query(query: object, max_chars: int) -> str:
    """The question, unchanged, if it is valid. Raises `InvalidRequestError`."""
    if not isinstance(query, str):
        raise InvalidRequestError(f"the question must be a str, got {type(query).__name__}")
    if not query.strip():
        what = "is empty" if not query else f"is {len(query)} characters of white space"
        raise InvalidRequestError(f"the question {what}; ask something")
    check_text(query, "the question", max_chars)
    return query


def check_history(history: Sequence[Message], max_chars: int) -> None:
    """Raise `InvalidRequestError` for a history that no chat template could render."""
    for index, message in enumerate(history):
        where = f"conversation_history[{index}]"
        if message.role == "system":
            raise InvalidRequestError(
                f"{where} has the role 'system'; pass its text as system_prompt= instead"
            )
        check_text(message.content, where, max_chars)


def check_images(images: Sequence[str | Path | bytes]) -> None:
    """Raise `InvalidRequestError` for an image that is empty or no readable file."""
    for index, image in enumerate(images):
        where = f"images[{index}]"
        if isinstance(image, bytes):
            if not image:
                raise InvalidRequestError(f"{where} is empty")
            continue
        path = Path(image)
        if not path.is_file():
            raise InvalidRequestError(f"{where}: there is no file {str(path)!r}")
        try:
            path.open("rb").close()
        except OSError as error:
            raise InvalidRequestError(
                f"{where}: {str(path)!r} cannot be read: {error.strerror}"
            ) from error


def check_text(text: str, where: str, max_chars: int) -> None:
    """Raise `InvalidRequestError` for a text that is too long or not valid Unicode."""
    if len(text) > max_chars:
        raise InvalidRequestError(
            f"{where} has {len(text)} characters, the limit is {max_chars}; shorten it or raise "
            "EngineConfig.guardrails.max_query_chars",
            characters=len(text),
            limit=max_chars,
        )
    encoded(text, where)


def _check_structure(options: RequestOptions) -> None:
    if options.json_schema is None and options.grammar is None:
        return
    if options.json_schema is not None and options.grammar is not None:
        raise InvalidRequestError("json_schema and grammar exclude each other: pass one of them")
    # Imported on demand: few requests use them, and the library should import quickly.
    from orion_oie.guardrails.gbnf import check_grammar
    from orion_oie.guardrails.json_schema import check_json_schema

    if options.json_schema is not None:
        check_json_schema(options.json_schema)
    if options.grammar is not None:
        check_grammar(options.grammar)
