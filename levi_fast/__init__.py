"""LEVI fine-tuning, fast: a frozen transformer, tapped at several layers, joined with a small task model.

Names are loaded when first used, so that ``import levi_fast`` costs next to nothing. transformers' Auto classes find
saved LEVI folders from then on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from levi_fast.auto import register_when_imported

if TYPE_CHECKING:
    from levi_fast.backbones import DEFAULT_BACKBONE, load_backbone, load_tokenizer
    from levi_fast.cache import ActivationCache, CacheMismatchError
    from levi_fast.config import LeviConfig
    from levi_fast.errors import BackboneMismatchError, DataError
    from levi_fast.kernels import backend_report, use_backend
    from levi_fast.modeling import LeviModel, LeviOutput, get_levi_model
    from levi_fast.modules import EnsembleOutput, LayerwiseEnsemble
    from levi_fast.swapping import swap
    from levi_fast.taps import TapExtractor
    from levi_fast.task_models import build_task_model

__version__ = "0.1.0"

_HOME = {
    "DEFAULT_BACKBONE": "backbones",
    "load_backbone": "backbones",
    "load_tokenizer": "backbones",
    "ActivationCache": "cache",
    "CacheMismatchError": "cache",
    "LeviConfig": "config",
    "BackboneMismatchError": "errors",
    "DataError": "errors",
    "backend_report": "kernels",
    "use_backend": "kernels",
    "LeviModel": "modeling",
    "LeviOutput": "modeling",
    "get_levi_model": "modeling",
    "EnsembleOutput": "modules",
    "LayerwiseEnsemble": "modules",
    "swap": "swapping",
    "TapExtractor": "taps",
    "build_task_model": "task_models",
}
_MODULES = {"functional", "reference"}

__all__ = [  # noqa: RUF022 (grouped as a reader meets them)
    "LeviConfig",
    "LeviModel",
    "LeviOutput",
    "get_levi_model",
    "TapExtractor",
    "ActivationCache",
    "LayerwiseEnsemble",
    "EnsembleOutput",
    "swap",
    "build_task_model",
    "load_backbone",
    "load_tokenizer",
    "DEFAULT_BACKBONE",
    "DataError",
    "CacheMismatchError",
    "BackboneMismatchError",
    "backend_report",
    "use_backend",
    "functional",
    "reference",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"levi_fast.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"levi_fast.{name}")
    else:
        raise AttributeError(f"module 'levi_fast' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})


register_when_imported()
