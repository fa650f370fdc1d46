"""Timings beside peers, on cases that need no checkout: what ``levi-fast bench`` and ``make bench`` run."""
