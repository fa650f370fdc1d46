"""Exceptions that carry a message meant for the user."""

from __future__ import annotations


class DataError(ValueError):
    """The user's data or arguments cannot be used; the message names what, where, and what was expected.

    The command line prints the message without a traceback and exits with status 2.
    """


class BackboneMismatchError(ValueError):
    """A saved model was loaded onto a backbone other than the one it was trained on."""


class DivergedError(ValueError):
    """Training gave no finite prediction in any epoch; another learning rate may serve."""
