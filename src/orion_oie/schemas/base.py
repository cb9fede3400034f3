"""The common base of all schemas."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Base of the public schemas: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True
    )


LONGEST_WAIT_S = 1_000_000  # a much longer wait would overflow the clocks of the system
