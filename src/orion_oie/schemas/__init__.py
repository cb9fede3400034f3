"""Schemas: the data that crosses the border of the library, its validation and its units.

requests, results, loading, plans, stats: immutable data, by subject. base: their common base class.
validation: readable messages for invalid data. units: sizes in words.
"""
