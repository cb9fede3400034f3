"""The shape of an embedding service's statistics. Needs no numpy, unlike the service itself."""

from orion_oie.schemas import Schema


class EmbeddingStats(Schema):
    """What an embedding service was asked since it was made, and what sharing it saves.

    Of all `texts` in all `requests`, `hits` were in the cache, `coalesced` were being computed for
    somebody already (or stood twice in a request), and `misses` had to be computed; `hit_rate` is
    hits / texts, 0 before the first. They went to the embedder in `batches`, the largest of
    `largest_batch` texts.

    The cache holds `entries` vectors in 16 bits, which take `cache_bytes` with their keys. `users`
    have given their names. `model_bytes` is what one loaded model takes, 0 if nobody says so.
    `saved_bytes` is what is not taken because the users share: (users - 1) * model_bytes, never
    below 0, and the two bytes by which each number in the cache is shorter than a float32.
    """

    requests: int
    texts: int
    hits: int
    misses: int
    hit_rate: float
    coalesced: int
    batches: int
    largest_batch: int
    entries: int
    cache_bytes: int
    users: int
    model_bytes: int
    saved_bytes: int
