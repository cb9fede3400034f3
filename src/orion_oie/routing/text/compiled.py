"""A cache of the router's regular expressions, each compiled once."""

import re
from functools import cache


@cache
def compiled(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    """The compiled pattern. It is compiled when first needed, which keeps imports fast."""
    return re.compile(pattern, flags)
