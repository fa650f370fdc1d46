"""Data: the user's tables, their preprocessing, and the named tasks."""
