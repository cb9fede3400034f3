"""The version of this library, as in pyproject.toml."""

__version__ = "0.1.0"
