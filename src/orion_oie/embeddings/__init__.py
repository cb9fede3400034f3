"""Embeddings of texts, by one model that all parts of a program share.

For other packages: shared, the embedding service of an engine. service is the queue and the cache
in front of an embedder, with batching, cache and vectors as its parts; pooled and
sentence_transformer are the embedders.
"""
