"""Writes amounts for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Returns seconds in the unit that fits. Example: duration(5400) -> '1.5 hours'"""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def amount(number: float) -> str:
    """Returns a number in whole units, or with three digits where it is small or huge. Example: amount(116711.4) ->
    '116,711'"""
    return f"{number:,.0f}" if 100 <= number < 1e15 else f"{number:.3g}"


def gigabytes(size: int) -> str:
    """Returns bytes in units of 1e9, as the papers do, of 1e12 or 1e6. Example: gigabytes(16_600_000_000) -> '16.6
    GB'"""
    if size >= 1e12:
        return f"{size / 1e12:.3g} TB"
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
