"""Finding a backbone's stack of layers, whatever the architecture calls it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

# Of an encoder-decoder: which stacks of layers are tapped.
STACKS = ("encoder", "decoder", "encoder+decoder")


def find_stacks(backbone: nn.Module, stack: str | None = None) -> tuple[nn.Module, list[nn.Module], int | None]:
    """What is to be run, its layers, and the index among these of the decoder's first one (None: there is none).

    Args:
        backbone: of an encoder-decoder the encoder alone is run, unless ``stack`` says otherwise.
        stack: one of :data:`STACKS`, or a dotted name for :func:`find_layers`.

    Raises:
        ValueError: a stack that the backbone does not have, or layers that cannot be found.
    """
    whole = _encoder_decoder(backbone)
    if whole is None and stack in STACKS and not hasattr(backbone, str(stack)):
        raise ValueError(f"layers: {type(backbone).__name__} is no encoder-decoder, and has no {stack!r}")
    if whole is None:
        return backbone, find_layers(backbone, stack), None
    if stack not in ("decoder", "encoder+decoder"):
        encoder = whole.get_encoder()
        return encoder, find_layers(encoder, None if stack == "encoder" else stack), None
    encoders = find_layers(whole.get_encoder()) if stack == "encoder+decoder" else []
    return whole, encoders + find_layers(whole.get_decoder()), len(encoders)


def with_decoder_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of an encoder-decoder with the decoder's own: the text behind a start token, without its last token.

    Args:
        model: its config names the start token.
        inputs: ``input_ids`` [B, T] and perhaps ``attention_mask`` [B, T]; given ``decoder_input_ids`` are kept.

    Raises:
        ValueError: no start token, or no ``input_ids`` to make the decoder's from.
    """
    if inputs.get("decoder_input_ids") is not None:
        return inputs
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    start = getattr(model.config, "decoder_start_token_id", None)
    if ids is None or start is None:
        raise ValueError(
            "decoder_input_ids: expected some, as there are no input_ids to make them from, or the config has no "
            "decoder_start_token_id"
        )
    # Padded, then cut: one place shorter, a text of one token would be empty for a moment, and torch.export makes of
    # an empty tensor a case of its own.
    shifted = {"decoder_input_ids": F.pad(ids, (1, 0), value=start)[:, : ids.shape[1]]}
    if mask is not None:
        shifted["decoder_attention_mask"] = F.pad(mask, (1, 0), value=1)[:, : mask.shape[1]]
    return {**inputs, **shifted}


def _encoder_decoder(backbone: nn.Module) -> Any:
    """The module that holds encoder and decoder, or None."""
    if not getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return None
    for candidate in (backbone, getattr(backbone, getattr(backbone, "base_model_prefix", ""), None)):
        if isinstance(candidate, nn.Module) and hasattr(candidate, "decoder") and hasattr(candidate, "encoder"):
            return candidate
    return None


def find_layers(backbone: nn.Module, path: str | None = None) -> list[nn.Module]:
    """The backbone's layers in the order they run.

    Looked for in this order: the module list at ``path``; the layer class that the transformers model itself
    names as the source of its hidden states; the module list as long as the config says there are layers (or
    stages).

    Args:
        backbone: the module to search.
        path: dotted name of the module list, e.g. "encoder.layer".

    Raises:
        ValueError: if ``path`` is no module list, or no single stack of layers can be found.
    """
    if path is not None:
        return _layers_at(backbone, path)
    for candidates in (_recorded_layers(backbone), _configured_layers(backbone)):
        if candidates:
            _refuse_shared(backbone, len(candidates))
            return candidates
    names = [f"{name} ({len(m)})" for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    raise ValueError(
        f"backbone: no single stack of layers found in {type(backbone).__name__}; "
        f"pass layers= with one of its module lists: {', '.join(names) or 'it has none'}"
    )


def _refuse_shared(backbone: nn.Module, found: int) -> None:
    """A model that runs the same layer several times (ALBERT) has no layer of its own to tap at each depth."""
    depth = getattr(getattr(backbone, "config", None), "num_hidden_layers", None)
    if isinstance(depth, int) and depth > found:
        raise ValueError(
            f"backbone: {type(backbone).__name__} runs {depth} layers, and only {found} of its own stand in a module "
            "list; layers that share weights cannot be tapped one by one"
        )


def stack_path(backbone: nn.Module, layers: Sequence[nn.Module]) -> str:
    """Dotted name of the module that directly holds ``layers`` ("" for the backbone itself)."""
    for name, module in backbone.named_modules():
        if any(child is layers[0] for child in module.children()):
            return name
    raise ValueError("layers: expected layers of this backbone")


def _layers_at(backbone: nn.Module, path: str) -> list[nn.Module]:
    try:
        found = backbone.get_submodule(path)
    except AttributeError:
        raise ValueError(f"layers: {type(backbone).__name__} has no module {path!r}") from None
    if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
        raise ValueError(f"layers: expected a non-empty ModuleList at {path!r}, got {type(found).__name__}")
    return list(found)


def _recorded_layers(backbone: nn.Module) -> list[nn.Module]:
    """Instances of the class that transformers records as ``hidden_states``, if they stand in one stack."""
    recorded: Any = (getattr(backbone, "_can_record_outputs", None) or {}).get("hidden_states")
    specifications = recorded if isinstance(recorded, list | tuple) else [recorded]
    classes = tuple(cls for spec in specifications if isinstance(cls := getattr(spec, "target_class", spec), type))
    if not classes:
        return []
    stacks = [
        list(module)
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(isinstance(m, classes) for m in module)
    ]
    return stacks[0] if len(stacks) == 1 else []


def _configured_layers(backbone: nn.Module) -> list[nn.Module]:
    """The shallowest module list as long as the config's number of layers or stages."""
    config = getattr(backbone, "config", None)
    expected = {
        len(value) if isinstance(value, list | tuple) else value
        for name in ("num_hidden_layers", "n_layer", "num_layers", "depths")
        if (value := getattr(config, name, None)) is not None
    }
    stacks = [
        (name.count("."), list(module))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in expected
    ]
    if not stacks and config is None:  # a plain module: accept its only list of layers
        stacks = [
            (name.count("."), list(module))
            for name, module in backbone.named_modules()
            if isinstance(module, nn.ModuleList) and len(module)
        ]
    if not stacks:
        return []
    depth = min(d for d, _ in stacks)
    shallowest = [layers for d, layers in stacks if d == depth]
    return shallowest[0] if len(shallowest) == 1 else []


def keyword_names(module: nn.Module | None) -> tuple[frozenset[str], bool]:
    """The names that a module's forward takes, and whether it takes any."""
    if module is None:
        return frozenset(), False
    parameters = inspect.signature(module.forward).parameters.values()
    names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)
