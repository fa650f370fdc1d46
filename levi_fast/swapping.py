"""Putting the drop-in into a user's model, and taking it out again."""

from __future__ import annotations

from torch import nn

from levi_fast import modules, reference


def swap(module: nn.Module, undo: bool = False) -> int:
    """Replace every reference ensemble inside ``module`` by the fast drop-in, in place.

    A replacement holds the very same Parameter objects, options, mode (train or eval) and hooks, so optimizers,
    ``state_dict`` and training go on unchanged. An ensemble that stands in several places stays one module.
    Only ensembles of exactly the replaced class are touched: a user's own subclass computes what it likes.

    Args:
        module: any module that contains ensembles.
        undo: replace the drop-ins by reference ensembles instead.

    Returns:
        How many ensembles were replaced, each counted once.

    Raises:
        ValueError: if ``module`` itself is an ensemble to replace. A module cannot be replaced inside itself: pass
            the module that holds it, or build a :class:`levi_fast.LayerwiseEnsemble` and ``load_state_dict``.
    """
    fast, plain = modules.LayerwiseEnsemble, reference.LayerwiseEnsemble
    old: type[nn.Module] = fast if undo else plain
    new: type[nn.Module] = plain if undo else fast
    if type(module) is old:
        raise ValueError(
            f"module: expected a module that contains ensembles, got the {old.__module__}.{old.__qualname__} itself; "
            "swap works inside its argument, so pass the module that holds it"
        )
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child is not None and type(child) is old:
                if child not in replaced:
                    replaced[child] = _recast(child, new)
                parent._modules[name] = replaced[child]
    return len(replaced)


def _recast(ensemble: nn.Module, new: type[nn.Module]) -> nn.Module:
    """A module of class ``new`` that shares every parameter, option and hook with ``ensemble``."""
    twin = new.__new__(new)
    twin.__dict__.update(ensemble.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):  # own tables, same tensors
        twin.__dict__[registry] = dict(ensemble.__dict__[registry])
    return twin
