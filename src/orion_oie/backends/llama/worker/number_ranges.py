"""Grammar rules for the numbers between two bounds, in llama.cpp's GBNF: digit patterns."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

DIGITS = 18  # of an integer without bounds
_DECIMALS = 6  # of a number with bounds; with 9 digits before them a float is exact
_WHOLE = 10**9


def number_body(schema: dict[str, Any], *, is_integer: bool) -> str | None:
    """A rule for the bounds of a schema; None without bounds."""
    scale = 1 if is_integer else 10**_DECIMALS
    low = _bound(schema, "minimum", "exclusiveMinimum", scale, math.ceil, 1)
    high = _bound(schema, "maximum", "exclusiveMaximum", scale, math.floor, -1)
    if low is None and high is None:
        return None
    digits = max(DIGITS, *(len(str(abs(bound))) + 1 for bound in (low, high) if bound is not None))
    far = 10**digits - 1 if is_integer else _WHOLE * scale - 1
    options = _signed(-far if low is None else low, far if high is None else high, scale)
    if not is_integer:
        # On an unbounded side, numbers may have more digits than a bound could.
        large = f'[1-9] [0-9]{{9,14}} ("." [0-9]{{1,{_DECIMALS}}})?'
        options += [large] if high is None else []
        options += [f'"-" {large}'] if low is None else []
    return " | ".join(options)


def _bound(
    schema: dict[str, Any],
    plain: str,
    strict: str,
    scale: int,
    to_inside: Callable[[Fraction], int],
    step: int,
) -> int | None:
    """The last multiple of 1/`scale` inside a bound."""
    if plain in schema:
        return to_inside(Fraction(str(schema[plain])) * scale)
    if strict not in schema:
        return None
    value = Fraction(str(schema[strict])) * scale
    inside = to_inside(value)
    return inside + step if inside == value else inside


def _signed(low: int, high: int, scale: int) -> list[str]:
    options = []
    if high >= 0:
        options += _unsigned(max(low, 0), high, scale)
    if low < 0:
        options.append(f'"-" ({" | ".join(_unsigned(max(-high, 1), -low, scale))})')
    return options


def _unsigned(low: int, high: int, scale: int) -> list[str]:
    """Numbers from `low` to `high`, both in units of 1/`scale`."""
    if scale == 1:
        return _whole(low, high)
    (first, below), (last, above) = divmod(low, scale), divmod(high, scale)
    if first == last:
        return [f'"{first}" {_decimals(below, above, scale)}']
    options = []
    if below > 0:
        options.append(f'"{first}" {_decimals(below, scale - 1, scale)}')
        first += 1
    if above < scale - 1:
        options.append(f'"{last}" {_decimals(0, above, scale)}')
        last -= 1
    if first <= last:
        options.append(f"({' | '.join(_whole(first, last))}) {_decimals(0, scale - 1, scale)}")
    return options


def _whole(low: int, high: int) -> list[str]:
    options = []
    for width in range(len(str(low)), len(str(high)) + 1):
        least, most = 10 ** (width - 1) if width > 1 else 0, 10**width - 1
        options.append(_between(str(max(low, least)), str(min(high, most)), may_stop=False))
    return options


def _decimals(low: int, high: int, scale: int) -> str:
    digits = len(str(scale)) - 1
    body = f'"." ({_between(f"{low:0{digits}}", f"{high:0{digits}}", may_stop=True)})'
    return body if low else f"({body})?"


def _between(low: str, high: str, *, may_stop: bool) -> str:
    """Strings of digits from `low` to `high`, all of one length.

    With `may_stop`, zeros at the end may be missing, but for the first digit.
    """
    width = len(low) - 1
    zeros, nines = "0" * width, "9" * width

    def rest(low: str, high: str) -> str:
        if not width:
            return ""
        if (low, high) == (zeros, nines):
            return f"[0-9]{{{'0,' if may_stop else ''}{width}}}"
        inner = f"({_between(low, high, may_stop=may_stop)})"
        return f"{inner}?" if may_stop and low == zeros else inner

    first, last = int(low[0]), int(high[0])
    if first == last:
        return f'"{first}" {rest(low[1:], high[1:])}'
    options = []
    if low[1:] != zeros:
        options.append(f'"{first}" {rest(low[1:], nines)}')
        first += 1
    if high[1:] != nines:
        options.append(f'"{last}" {rest(zeros, high[1:])}')
        last -= 1
    if first <= last:
        options.append(f"[{first}-{last}] {rest(zeros, nines)}")
    return " | ".join(options)
