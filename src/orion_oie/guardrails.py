"""What may come in: a question and a history that a model can be given.

Checks shape and size. Judging intent is not done here.
"""

from collections.abc import Sequence

from orion_oie.errors import InvalidRequestError
from orion_oie.schemas import Message


def check_query(query: object, max_chars: int) -> str:
    """The question itself, if it may go on; raises `InvalidRequestError`."""
    if not isinstance(query, str):
        raise InvalidRequestError(f"the question must be a str, got {type(query).__name__}")
    if not query.strip():
        what = "is empty" if not query else f"is {len(query)} characters of white space"
        raise InvalidRequestError(f"the question {what}; ask something")
    check_text(query, "the question", max_chars)
    return query


def check_history(history: Sequence[Message], max_chars: int) -> None:
    """Raises `InvalidRequestError` for a history that no chat template could place."""
    for index, message in enumerate(history):
        where = f"conversation_history[{index}]"
        if message.role == "system":
            raise InvalidRequestError(
                f"{where} has the role 'system'; pass its text as system_prompt= instead"
            )
        check_text(message.content, where, max_chars)


def check_text(text: str, where: str, max_chars: int) -> None:
    """Raises `InvalidRequestError` for a text that is too long or that no tokenizer could take."""
    if len(text) > max_chars:
        raise InvalidRequestError(
            f"{where} has {len(text)} characters, the limit is {max_chars}; shorten it or raise "
            "EngineConfig(max_query_chars=...)",
            characters=len(text),
            limit=max_chars,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{where} is not valid Unicode: unpaired surrogate at index {error.start}"
        ) from error
