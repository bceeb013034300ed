"""Numbers as people read them: few digits, signs on changes, units chosen by the column."""

import math

MINUS = "\u2212"
MISSING = "\u2013"
TIMES = "\u00d7"


def fixed(value: float, digits: int) -> str:
    """``value`` with ``digits`` decimals, thousands separated, a true minus sign."""
    text = f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.removeprefix("-")
    return text.replace("-", MINUS)


def signed(value: float, digits: int) -> str:
    """A change: always with its sign; one that rounds to zero gets ±0."""
    text = fixed(value, digits)
    if float(text.replace(",", "").replace(MINUS, "-")) == 0:
        return "±" + fixed(0.0, digits)
    return text if text.startswith(MINUS) else f"+{text}"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, never in exponent form."""
    if value == 0 or not math.isfinite(value):
        return fixed(value, 0) if value == 0 else str(value)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return fixed(round(value, decimals), max(0, decimals))


def times(ratio: float, digits: int = 2) -> str:
    """A ratio with its multiplication sign, such as a speed-up."""
    return fixed(ratio, digits) + TIMES


def percent_change(value: float, base: float) -> str:
    """Signed change against ``base`` in percent; empty where the base is zero."""
    return f"{signed(100 * (value / base - 1), 1)} %" if base else ""


def bytes_text(size: float) -> str:
    """A size in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{significant(size / scale)} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    """A duration in the unit that fits."""
    if seconds < 120:
        return f"{significant(seconds)} s"
    return f"{significant(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
