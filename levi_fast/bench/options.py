"""Checks that the options of several benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from levi_fast.errors import DataError


def check_choices(name: str, values: Iterable[str], allowed: Sequence[str]) -> None:
    """Raise DataError, which begins with the name, unless every value is allowed."""
    for value in values:
        if value not in allowed:
            raise DataError(f"{name}: expected some of {', '.join(allowed)}; got {value!r}")


def check_seconds(name: str, seconds: float) -> None:
    """Raise DataError, which begins with the name, unless the number is above 0."""
    if not seconds > 0:
        raise DataError(f"{name}: expected a number above 0; got {seconds}")
