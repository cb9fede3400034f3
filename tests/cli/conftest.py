"""Fixtures of the tests of the command line."""

from shops import cache, shop

__all__ = ["cache", "shop"]
