"""Texts to vectors, by one model that all parts of a program share.

shared: makes the service of an engine. service: the queue and the cache in front of an embedder.
pooled, sentence_transformer: the embedders.
"""
