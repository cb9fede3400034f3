"""Embeddings of texts, by one model that all parts of a program share.

shared: the service of an engine. service: the queue and the cache in front of an embedder.
batching, cache, vectors: parts of the service. pooled, sentence_transformer: the embedders.
"""
