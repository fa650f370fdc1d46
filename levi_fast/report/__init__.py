"""Figures for people (tables in the terminal) and for programs (``metrics.json``)."""
