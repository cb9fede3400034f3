"""Data that crosses the border of the library, its validation, and units of size.

For all packages: requests, results, loading, plans and stats (immutable data, by subject),
availability (whether a model could be used now), base (their common base class), validation
(readable messages for invalid data), units (sizes as text), version.
"""
