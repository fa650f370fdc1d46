"""Makes transformers' Auto classes find saved LEVI folders once ``levi_fast`` is imported.

``AutoConfig``, ``AutoModel`` and ``AutoModelFor{Sequence,Token,Image}Classification`` learn of LEVI whichever of the
two packages is imported first, and ``import levi_fast`` alone still loads neither transformers nor torch:
transformers' registry is told when it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def register_when_imported() -> None:
    """Register LEVI with the Auto classes: those already imported at once, the others right after their import."""
    waiting = {name: register for name, register in _REGISTER.items() if name not in sys.modules}
    for name in _REGISTER.keys() - waiting.keys():
        _REGISTER[name]()
    if waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(waiting))


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from levi_fast.config import LeviConfig

    AutoConfig.register(LeviConfig.model_type, LeviConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from levi_fast.config import LeviConfig
    from levi_fast.modeling import LeviModel

    for auto in (
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForImageClassification,
    ):
        auto.register(LeviConfig, LeviModel, exist_ok=True)


_REGISTER: dict[str, Callable[[], None]] = {CONFIGS: _register_config, MODELS: _register_models}


class _AfterImport(MetaPathFinder):
    """Calls a function after a module's first import; finds nothing itself."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        then = self.waiting.pop(fullname)  # gone before the search below, which comes through here again
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenLoader(spec.loader, then)
        return spec


class _ThenLoader(Loader):
    """A module's own loader, with one more call after it."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then()

    def __getattr__(self, name: str) -> Any:  # is_package, get_source and the like
        return getattr(self.loader, name)
