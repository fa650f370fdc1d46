"""What of the backbone is trained: nothing, LoRA adapters, or everything up to the last tap.

The paper's main variant keeps the backbone frozen; it also combines LEVI with one that was fine-tuned before, and
with LoRA (Roh et al., ICML 2024; Hu et al., LoRA, ICLR 2022). A backbone that was fine-tuned first is simply loaded
and frozen: see :func:`levi_fast.load_backbone`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

BACKBONE_TRAINING = ("frozen", "lora", "full")

# r and alpha as in Hu et al. for text classification; target_modules None is peft's own choice for the architecture,
# or every linear layer where it has none.
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": None}
PREFIX = "backbone."  # of its entries in a model's state dict

_LORA_TYPES = {"r": int, "lora_alpha": int | float, "lora_dropout": int | float}


def check_lora(lora: Any) -> dict[str, Any]:
    """LoRA's settings with every default written out.

    Raises:
        ValueError: an unknown setting or a value out of range; the message names it.
    """
    if lora is not None and not isinstance(lora, dict):
        raise ValueError(f"lora: expected a mapping with some of {', '.join(LORA)}, got {lora!r}")
    unknown = sorted(set(lora or {}) - set(LORA))
    if unknown:
        raise ValueError(f"lora: expected some of {', '.join(LORA)}, got {unknown[0]!r}")
    settings = {**LORA, **(lora or {})}
    for name, kind in _LORA_TYPES.items():
        if isinstance(settings[name], bool) or not isinstance(settings[name], kind):
            raise ValueError(f"lora: {name}: expected a number, got {settings[name]!r}")
    if settings["r"] < 1 or settings["lora_alpha"] <= 0 or not 0 <= settings["lora_dropout"] < 1:
        raise ValueError(f"lora: expected r >= 1, lora_alpha > 0 and lora_dropout in [0, 1), got {settings}")
    targets = settings["target_modules"]
    if targets is not None:
        if not isinstance(targets, list | tuple) or not all(isinstance(name, str) for name in targets) or not targets:
            raise ValueError(f"lora: target_modules: expected a list of module names, got {targets!r}")
        settings["target_modules"] = list(targets)
    return settings


def add_lora(backbone: nn.Module, settings: dict[str, Any]) -> None:
    """Put fresh adapters into a backbone's linear layers, in place; only they require gradients then.

    Raises:
        ImportError: peft is not installed.
        ValueError: the backbone has none of the target modules, or has adapters already.
    """
    if any("lora_" in name for name, _ in backbone.named_parameters()):
        raise ValueError("backbone: it has LoRA adapters already; merge them, or pass the backbone without them")
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    except ImportError as error:
        raise ImportError("backbone_training='lora' needs peft: pip install levi_fast[lora]") from error
    chosen = dict(settings)
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if (
        chosen["target_modules"] is None
        and getattr(getattr(backbone, "config", None), "model_type", None) not in known
    ):
        chosen["target_modules"] = "all-linear"
    try:
        inject_adapter_in_model(LoraConfig(**chosen), backbone)
    except ValueError as error:
        raise ValueError(f"lora: {error}; name the backbone's linear layers in lora['target_modules']") from error
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def train_up_to(backbone: nn.Module, blocks: Sequence[nn.Module], last_tap: int) -> None:
    """Let gradients into a whole backbone but for the layers above the last tap, which do not run."""
    backbone.requires_grad_(True)
    for block in blocks[last_tap + 1 :]:
        block.requires_grad_(False)


def without_untrained(state: dict[str, Any], backbone_training: str) -> dict[str, Any]:
    """The entries of a model's state that are saved: of the backbone only what is trained."""
    return {k: v for k, v in state.items() if not k.startswith(PREFIX) or _is_saved(k, backbone_training)}


def drop_untrained(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state dict hook of a LeviModel: take out what :func:`without_untrained` would."""
    training = cast(Any, module).config.backbone_training
    for name in [name for name in state if name.startswith(prefix + PREFIX)]:
        if not _is_saved(name, training):
            del state[name]


def forgive_missing_untrained(module: nn.Module, incompatible: Any) -> None:
    """A load hook of a LeviModel: what is not saved may be missing, and one name of a tensor that has two."""
    training = cast(Any, module).config.backbone_training
    missing = incompatible.missing_keys
    tensors = dict(module.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    missing[:] = [
        name
        for name in missing
        if PREFIX not in name or (_is_saved(name, training) and id(tensors.get(name)) not in loaded)
    ]


def _is_saved(name: str, backbone_training: str) -> bool:
    return backbone_training == "full" or (backbone_training == "lora" and is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a LoRA adapter's."""
    return ".lora_" in name
