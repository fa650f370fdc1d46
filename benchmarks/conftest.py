"""Options and marks of benchmarks/test_kernels.py."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compiled", action="store_true", help="also torch.compile's contenders: up to a minute each")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "small: benchmarks on small inputs, in seconds each")
