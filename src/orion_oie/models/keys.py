"""The name of a loadable thing: a model in a variant, with the adapters that change it."""


class ModelKey(str):
    """Identifies what one worker holds: `model@variant`, and `+adapter` for each adapter.

    A key is its own text, so that it can stand in events, statistics and logs, and equals that
    text. Two loads with one key share a worker.
    """

    __slots__ = ("adapters", "model_id", "variant")

    model_id: str
    variant: str
    adapters: tuple[str, ...]

    def __new__(cls, model_id: str, variant: str, adapters: tuple[str, ...] = ()) -> "ModelKey":
        key = super().__new__(cls, "+".join((f"{model_id}@{variant}", *adapters)))
        key.model_id, key.variant, key.adapters = model_id, variant, adapters
        return key

    def __reduce__(self) -> tuple[type["ModelKey"], tuple[str, str, tuple[str, ...]]]:
        return ModelKey, (self.model_id, self.variant, self.adapters)
