"""Downloads of model files over HTTP: in parallel ranges, verified, kept in a cache.

Most callers need `cache` alone, and `listing` for names of the hub. A backend that computes with
files while they arrive also uses `fetch`, `arrival`, `parts` and `sources`.
"""
