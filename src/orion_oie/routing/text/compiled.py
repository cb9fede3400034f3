"""The regular expressions of the router, each compiled once."""

import re
from functools import cache


@cache
def compiled(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """Compiled when first needed: an import of the library should not pay for it."""
    return re.compile(pattern, flags)
