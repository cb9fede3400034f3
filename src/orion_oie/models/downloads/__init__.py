"""Files over HTTP: fetched in parallel ranges, checked, kept in a cache.

Most callers need `cache` alone. A backend that computes with files while they arrive also uses
`fetch`, `arrival`, `parts` and `sources`.
"""
