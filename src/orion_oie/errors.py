"""All errors that this library raises, in one tree.

    OrionError
    ├── InvalidRequestError        the caller must change the request
    │   ├── ContextOverflowError   prompt and answer do not fit the model's context
    │   ├── GuardrailError         the request was refused by a guardrail
    │   └── UnknownAgentError      no agent has that name
    ├── RegistryError              models.json is wrong; lists every problem found
    ├── ModelError                 a model cannot be used
    │   ├── ModelNotFoundError     its files are not on this machine
    │   ├── ModelCorruptError      its files are not what they claim to be
    │   ├── DownloadError
    │   ├── DigestMismatchError
    │   └── InsufficientMemoryError
    ├── WorkerError                the process that holds a model failed
    │   ├── WorkerCrashedError     it died
    │   └── WorkerTimeoutError     it stopped responding
    ├── CircuitOpenError           the operation failed too often lately and is paused
    ├── QueueFullError             too many requests are waiting
    ├── DeadlineExceededError      the request's own time limit passed
    ├── RequestCancelledError      the caller cancelled
    ├── ProviderError              a remote provider failed
    │   ├── ProviderAuthError
    │   └── ProviderRateLimitError
    ├── BudgetExceededError        a cost budget is used up
    ├── EngineClosedError          the engine was shut down
    └── RecipeError                a foundry recipe is wrong

`retryable` is True if the same call may succeed later without a change.
`details` holds the numbers of the message, for programs.
"""

from typing import Any, ClassVar


class OrionError(Exception):
    """Base of all errors of this library.

    message: describes what happened, with numbers, and what to do about it. details: the same
    facts as JSON-compatible values.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


def message_of(error: BaseException) -> str:
    """The message of an error; of a class whose text fails, a remark on that."""
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001 (a class of the application)
        return f"<it has no text: {type(failure).__name__}>"


def described(error: BaseException) -> str:
    """The type and the message of an error, in one line of a log or of a receipt."""
    return f"{type(error).__name__}: {message_of(error)}"


class OrionWarning(UserWarning):
    """Something works in another way than was asked for; the message says how to have it."""


class InvalidRequestError(OrionError):
    """The request itself is wrong; `details["problems"]` may list the faults, one line each."""


class ContextOverflowError(InvalidRequestError):
    """Prompt and answer do not fit; details: prompt_tokens, requested_tokens, limit."""


class GuardrailError(InvalidRequestError):
    """A guardrail refused the request."""


class UnknownAgentError(InvalidRequestError):
    """No agent has the given id; details: agent_id, suggestion."""


class RegistryError(OrionError):
    """A registry is unusable; `problems` lists every fault, in file order."""

    def __init__(self, message: str, problems: list[str] | None = None, **details: Any) -> None:
        super().__init__(message, problems=problems or [], **details)
        self.problems = problems or []


class ModelError(OrionError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError):
    """The files of a model are not on this machine."""


class ModelCorruptError(ModelError):
    """A model file is not what it claims to be; details: path, offset or the bad value."""


class DownloadError(ModelError):
    """A download failed."""

    retryable = True


class DigestMismatchError(ModelError):
    """A file does not have the expected SHA-256."""


class InsufficientMemoryError(ModelError):
    """A model does not fit in the memory it may use."""

    retryable = True


class WorkerError(OrionError):
    """The process that holds a model failed."""

    retryable = True


class WorkerCrashedError(WorkerError):
    """A worker process died; details: pid, exit_code, signal, output, log."""


class WorkerTimeoutError(WorkerError):
    """A worker process stopped responding and was terminated."""


class CircuitOpenError(OrionError):
    """The operation is paused after repeated failures; details: retry_after_s."""

    retryable = True


class QueueFullError(OrionError):
    """The request queue is full; details: waiting, limit."""

    retryable = True


class DeadlineExceededError(OrionError):
    """The deadline of the request passed; details: deadline_s."""

    retryable = True


class RequestCancelledError(OrionError):
    """The caller cancelled the request."""


class ProviderError(OrionError):
    """A remote provider failed."""

    retryable = True


class ProviderAuthError(ProviderError):
    """A remote provider refused the credentials."""

    retryable = False


class ProviderRateLimitError(ProviderError):
    """A remote provider asked to slow down."""


class BudgetExceededError(OrionError):
    """A cost budget is used up."""


class EngineClosedError(OrionError):
    """The engine was shut down, or belongs to another process."""


class RecipeError(OrionError):
    """A foundry recipe is wrong."""
