"""Batches of like length: little padding, and a function of the lengths alone."""

from __future__ import annotations

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group rows of like length; the longest come first, so that a machine without memory for them says so at once.

    The same lengths give the same batches in any process: a matrix product's last bits may depend on what else is
    in the batch, and the same file is to give the same bits.

    Args:
        lengths: of every row.
        batch_size: rows per batch; the batch of the longest rows may hold fewer.

    Returns:
        row numbers per batch, in the order to run them.
    """
    by_length = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    starts = range(0, len(by_length), batch_size)
    return [by_length[start : start + batch_size] for start in reversed(starts)]
