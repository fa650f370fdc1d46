"""Quick and quiet starts, and quick ends, of a process that imports torch and transformers.

Their half a million objects live as long as the process, and the garbage collector goes through all of them several
times while they are made, and once more at the end: a quarter of the time the imports take, and a second.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterator

# torchao, which transformers imports where it is installed, warns of its own GPU parts and of a change in torch
_ABOUT_THEMSELVES = ("torchao", "torch.utils._pytree")


def debugging() -> bool:
    """Whether ``LEVI_FAST_DEBUG`` asks for tracebacks and everybody's warnings."""
    return os.environ.get("LEVI_FAST_DEBUG", "") not in ("", "0")


def quiet_imports() -> None:
    """Keep to themselves, unless :func:`debugging`, what libraries log about their own parts when imported."""
    if not debugging():
        for name in _ABOUT_THEMSELVES:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Inside the ``with`` block the collector is off; from its end on it passes over all there is by then.

    For imports alone, as early as can be: garbage that is there at the end stays. Where nothing was left to import,
    the collector goes on as before.
    """
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
