"""``levi-fast bench`` in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import pytest

from levi_fast.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench() -> Run:
    """``bench("growth", "--quick")``: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        status = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(["bench", *arguments])
            except SystemExit as end:
                status = int(end.code or 0)
        return status, out.getvalue(), err.getvalue()

    return run
