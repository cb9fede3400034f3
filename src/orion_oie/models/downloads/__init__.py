"""Files over HTTP: fetched in parallel ranges, checked, kept in a cache.

cache is what others use; fetch, arrival, parts and sources are for backends that compute with
files while these arrive.
"""
