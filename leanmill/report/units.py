"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """Shorten a count to three digits: 1234567 -> `1.23M`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{suffix}" if abs(number) < 999.5 * size else f"{number / size:.0f}{suffix}"
    return f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Write a time with its two largest units: 3725 -> `1h02m`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86_400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86_400}d{total % 86_400 // 3600:02d}h"


def size(num_bytes: float) -> str:
    """Write bytes in binary units: 1572864 -> `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1000:  # so that three digits always suffice
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def plural(number: int, noun: str) -> str:
    """Write `1 rank`, `2 ranks`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def number(value: float) -> str:
    """Write a measured value with four significant digits, no exponent where it can be helped."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return scientific(value)
    digits = max(0, 4 - len(str(int(abs(value))))) if abs(value) >= 1 else 4
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def scientific(value: float) -> str:
    """Write a small value with a short exponent: 0.0003 -> `3e-4`."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def percent(value: float) -> str:
    """Write a share: 0.413 -> `41.3%`."""
    return f"{100 * value:.3g}%" if abs(value) < 9.995 else f"{100 * value:,.0f}%"
