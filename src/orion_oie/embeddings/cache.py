"""A bounded cache that evicts the least often used entry, among equals the least recently used.

Policy only: it knows nothing of texts and vectors, and is not thread-safe. cachetools has an
`LFUCache`, but its older versions break ties by age instead of by use; hence these own counts.
"""

from typing import TypeVar

from cachetools import Cache

K = TypeVar("K")
V = TypeVar("V")


class LeastUsedCache(Cache[K, V]):
    """At most `maxsize` entries. Setting and getting count as uses; `in` does not."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._uses: dict[K, int] = {}
        self._by_uses: dict[int, dict[K, None]] = {}  # in each, the least recently used first

    def __getitem__(self, key: K) -> V:
        value = super().__getitem__(key)
        self._count(key)
        return value

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self._count(key)

    def __delitem__(self, key: K) -> None:
        super().__delitem__(key)
        self._forget(key)

    def popitem(self) -> tuple[K, V]:
        """Remove and return the entry to evict next. Raises `KeyError` when empty."""
        if not self._uses:
            raise KeyError("the cache is empty")
        key = next(iter(self._by_uses[min(self._by_uses)]))
        value = super().__getitem__(key)
        del self[key]
        return key, value

    def clear(self) -> None:
        """Remove everything."""
        super().clear()  # some versions of cachetools ask neither popitem nor __delitem__
        self._uses.clear()
        self._by_uses.clear()

    def _count(self, key: K) -> None:
        uses = self._forget(key) + 1
        self._uses[key] = uses
        self._by_uses.setdefault(uses, {})[key] = None

    def _forget(self, key: K) -> int:
        """Forget the uses of a key; return their number."""
        uses = self._uses.pop(key, 0)
        if uses:
            peers = self._by_uses[uses]
            del peers[key]
            if not peers:
                del self._by_uses[uses]
        return uses
