"""The memory that a model takes: the backend's estimate, corrected by earlier measurements.

Reads headers of files, never weights; loads nothing.
"""

from collections.abc import Callable
from dataclasses import replace

from orion_oie.backends.base import Footprint, LoadSpec
from orion_oie.pool.footprint_ledger import FootprintLedger


class ModelSizes:
    """The footprints of models as this engine would load them. Thread-safe, as its parts are."""

    def __init__(self, footprint: Callable[[LoadSpec], Footprint], ledger: FootprintLedger) -> None:
        self._footprint = footprint
        self._ledger = ledger

    @property
    def revision(self) -> int:
        """A number that grows with every new measurement."""
        return self._ledger.revision

    def footprint(self, spec: LoadSpec) -> Footprint:
        """The memory that a model takes. Raises `ModelNotFoundError`, `ModelCorruptError`."""
        return self.corrected(spec, self._footprint(spec))

    def corrected(self, spec: LoadSpec, estimate: Footprint) -> Footprint:
        """An estimate of the backend, corrected by earlier measurements. Reads no file."""
        peak_bytes = self._ledger.get(_identity(spec, estimate)).peak_bytes
        return corrected(estimate, peak_bytes) if peak_bytes else estimate

    def max_bytes(self, spec: LoadSpec) -> int:
        """The memory to reserve for a model."""
        return self.footprint(spec).max_bytes

    def load_s(self, spec: LoadSpec, footprint: Footprint) -> float | None:
        """Seconds that its last load from local files took; None if there was none. Any footprint
        of the model will do, corrected or not."""
        return self._ledger.get(_identity(spec, footprint)).load_s or None

    def note_peak(self, spec: LoadSpec, resident_bytes: int) -> None:
        """Note the measured memory of a model that has answered."""
        self._ledger.note_peak(_identity(spec, self._footprint(spec)), resident_bytes)

    def note_load(self, spec: LoadSpec, load_s: float) -> None:
        """Note the time in which a model was loaded."""
        self._ledger.note_load(_identity(spec, self._footprint(spec)), load_s)


def corrected(estimate: Footprint, peak_bytes: int) -> Footprint:
    """The estimate, corrected by a measured peak.

    Memory beyond the estimate was either growth, of which that much less is still to come, or an
    error of the estimate. The measured memory is spread over the parts that are only estimated:
    weights and KV cache are known to the byte.
    """
    known_bytes = estimate.weights_bytes + estimate.kv_bytes
    beyond_bytes = max(0, peak_bytes - estimate.total_bytes)
    rest_bytes = max(0, peak_bytes - known_bytes)
    process_bytes = min(estimate.process_bytes, rest_bytes)
    return replace(
        estimate,
        weights_bytes=min(estimate.weights_bytes, max(0, peak_bytes - estimate.kv_bytes)),
        kv_bytes=min(estimate.kv_bytes, peak_bytes),
        process_bytes=process_bytes,
        compute_bytes=rest_bytes - process_bytes,
        growth_bytes=max(0, estimate.growth_bytes - beyond_bytes),
        is_measured=True,
    )


def _identity(spec: LoadSpec, estimate: Footprint) -> str:
    """The facts on which the size of a load depends, as a key: the weights, and the settings."""
    facts = [spec.key, estimate.weights_bytes, spec.slots, spec.context_length, spec.is_embedding]
    return "|".join(map(str, facts))
