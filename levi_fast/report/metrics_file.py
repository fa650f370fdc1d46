"""``metrics.json``: what a run reached, for programs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from levi_fast.storage import write_atomic

METRICS_FILE = "metrics.json"


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("levi_fast", "torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return found


def write_metrics(path: str | Path, document: Mapping[str, Any]) -> None:
    """Write the document as JSON, atomically; a figure that is not finite becomes null, which JSON can say."""
    write_atomic(path, json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
