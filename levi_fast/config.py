"""``LeviConfig``: one dataclass says all about a LEVI model; transformers saves and loads it as config.json."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from levi_fast.backbone_training import BACKBONE_TRAINING, check_lora
from levi_fast.config_checks import check_levi_config
from levi_fast.errors import DataError
from levi_fast.quantization import QUANTIZED, check_backbone_dtype
from levi_fast.reference import ACTIVATIONS, OBJECTIVES, PROBLEM_TYPES
from levi_fast.taps import POOLINGS

HEADS = ("layerwise", "concatenated", "output-ensemble")


class LeviConfig(PreTrainedConfig):
    """Configuration of a :class:`levi_fast.LeviModel`. All arguments are keywords.

    Args:
        backbone: where the frozen backbone comes from: a hub id or a folder. Set by ``get_levi_model`` from the
            backbone itself; a saved folder never holds an absolute path.
        backbone_fingerprint: digest of the backbone's weights, checked on load; set by ``get_levi_model``.
        backbone_dtype: "float32", "bfloat16", "int8" or "int4" (see :mod:`levi_fast.quantization`), as which a
            backbone that is given by name is loaded; None keeps the checkpoint's. Set by ``get_levi_model`` from the
            backbone.
        backbone_training: "frozen", "lora" (adapters trained with the ensemble; needs peft) or "full" (the whole
            backbone as far as the last tap).
        lora: settings of "lora": "r", "lora_alpha", "lora_dropout", "target_modules" (names of linear layers; None is
            peft's choice for the architecture), see :data:`levi_fast.backbone_training.LORA`.
        backbone_layers: dotted name of the backbone's module list of layers, where it cannot be found by itself; of
            an encoder-decoder also "encoder" (the default), "decoder" or "encoder+decoder", see
            :class:`levi_fast.TapExtractor`.
        taps: "all", "last", "mid" (20 to 80 % of the depth), "even:k", a list of layer indices (0 is the
            first layer's output, negatives count from the end), or "none": no backbone, the task model alone.
            "cka:k", "gradnorm" and "probe" are resolved from the training data by ``levi-fast train`` and
            ``compare``, see docs/taps.md.
        tap_selection: of taps that data resolved: the selector, its choice, its scores; set with ``taps``.
        tap_layers, tap_widths: what ``taps`` resolved to, and the widths D_l; set by ``get_levi_model``.
        head: what stands on taps and view: "layerwise" (LEVI), or a baseline's: "concatenated" (one layer on all taps
            side by side, no view) or "output-ensemble" (a linear probe and the task model, outputs averaged).
        selected_features: "concatenated" head: how many features of the taps are read; None reads all.
        pooling: over tokens: "mean", "cls" (first kept token) or "last" (last kept token); "token" for none: taps,
            view and logits are per token (token classification), labels [B, T] with -100 where none is wanted.
        hidden_width: H of the adapting layers, or None for linear ones.
        activation: of the adapting layers: "gelu", "relu", "silu" or "tanh".
        normalize: LayerNorm without affine parameters on taps and view.
        mix: "mean" or "learned" (a softmax over layers; needs an objective that trains it, see below).
        dropout: on the adapting layers' hidden activations.
        objective: "per_layer" (mean of every layer's loss), "ensemble" (loss of the mixed prediction) or
            "both" (their mean). "per_layer" alone gives learned mixing weights no gradient and is refused then.
        label_smoothing: in [0, 1): that share of a label's weight goes evenly to all classes while training (Szegedy
            et al., 2016), in every layer's loss. Trainer's ``label_smoothing_factor`` instead takes its loss from the
            logits, whatever ``objective`` says.
        view_dropout: probability of zeroing an example's whole view while training.
        view_loss: weight of the loss of ``y(0, view)``, the prediction with the taps zeroed, which is added while
            training, so that the view answers by itself too; 0 leaves it out. Of the "layerwise" head, where it has
            taps and a view.
        standalone_view: a second task model with a head of its own is trained beside LEVI on the same batches, and
            its prediction is ``y(0, view)`` in place of the ensemble's. Of the "layerwise" head, where it has taps
            and a view. ``levi-fast train`` sets it, and keeps the second model only where it gets a weight.
        blend, view_blend: weights a and b in [0, 1], used in eval mode: the prediction is
            ``(1 - b) ((1 - a) y(tap, view) + a y(tap, 0)) + b y(0, view)``. Chosen on in-distribution validation data
            by ``levi-fast train``.
        task_model: specification for ``levi_fast.task_models.build_task_model``, {"type": "custom"} for a module
            of the user's own, None for no view.
        view_width: V; set from the task model.
        target_mean, target_std: regression: the loss is taken on ``(label - mean) / std``, and logits come back
            in the label's own units.
        num_labels, id2label, label2id, problem_type: transformers' own meaning.

    Raises:
        ValueError: for a value outside its range; the message names the argument.
    """

    model_type = "levi"
    # What Trainer leaves out of predictions, so that compute_metrics gets the logits alone (and layer_logits is
    # [L, B, C]: its first axis is no batch to concatenate over).
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "layer_logits", "logits_without_view", "logits_with_view", "logits_without_taps",
    ]  # fmt: skip

    backbone: str | None = None
    backbone_fingerprint: str | None = None
    backbone_dtype: str | None = None
    backbone_training: str = "frozen"
    lora: dict[str, Any] | None = None
    backbone_layers: str | None = None
    taps: str | list[int] = "all"
    tap_selection: dict[str, Any] | None = None
    tap_layers: list[int] | None = None
    tap_widths: list[int] | None = None
    head: str = "layerwise"
    selected_features: int | None = None
    pooling: str = "mean"
    hidden_width: int | None = 256
    activation: str = "gelu"
    normalize: bool = True
    mix: str = "mean"
    dropout: float = 0.0
    objective: str = "per_layer"
    label_smoothing: float = 0.0
    view_dropout: float = 0.5
    view_loss: float = 0.0
    standalone_view: bool = False
    blend: float = 0.0
    view_blend: float = 0.0
    task_model: dict[str, Any] | None = None
    view_width: int = 0
    target_mean: float = 0.0
    target_std: float = 1.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', after a look at types and sizes: the dictionary may come from anywhere.

        Raises:
            DataError: naming the field, what was expected and what came.
        """
        check_levi_config(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)
        except (TypeError, KeyError, AttributeError, OverflowError) as error:  # a type that no check above knows
            raise DataError(f"config.json: cannot be used: {str(error)[:500]}") from error
        except ValueError as error:
            raise DataError(f"config.json: {str(error)[:500]}") from error

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers 5.17 checks its own fields here, with an error that is no ValueError
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:
            raise ValueError(f"{name}: {error.__cause__ or error}") from error

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.taps, str):
            self.taps = list(self.taps)
        _require_one_of("head", self.head, HEADS)
        if self.selected_features is not None and self.head != "concatenated":
            raise ValueError("selected_features: only with head='concatenated'")
        _require_one_of("pooling", self.pooling, POOLINGS)
        _require_one_of("activation", self.activation, ACTIVATIONS)
        _require_one_of("mix", self.mix, ("mean", "learned"))
        _require_one_of("objective", self.objective, OBJECTIVES)
        check_backbone_dtype(self.backbone_dtype)
        _require_one_of("backbone_training", self.backbone_training, BACKBONE_TRAINING)
        if self.backbone_training == "lora":
            self.lora = check_lora(self.lora)
        elif self.lora is not None:
            raise ValueError(f"lora: only with backbone_training='lora', got {self.backbone_training!r}")
        if self.backbone_training != "frozen" and self.backbone_dtype in QUANTIZED:
            raise ValueError(f"backbone_training: an {self.backbone_dtype} backbone can only be 'frozen'")
        if self.backbone_training != "frozen" and self.taps == "none":
            raise ValueError("backbone_training: taps='none' leaves no backbone to train")
        if self.problem_type is not None:
            _require_one_of("problem_type", self.problem_type, PROBLEM_TYPES)
        for name in ("dropout", "view_dropout", "blend", "view_blend", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
        if self.hidden_width is not None and self.hidden_width < 1:
            raise ValueError(f"hidden_width: expected >= 1, or None for linear, got {self.hidden_width}")
        if self.dropout and self.hidden_width is None:
            raise ValueError(
                f"dropout: acts on hidden activations, and hidden_width=None has none; got {self.dropout}"
            )
        if self.label_smoothing == 1 or (self.label_smoothing and self.problem_type == "regression"):
            raise ValueError(
                f"label_smoothing: expected a number in [0, 1), and 0 for regression, got {self.label_smoothing}"
            )
        if self.mix == "learned" and self.objective == "per_layer":
            raise ValueError(
                "mix: 'learned' mixing weights get no gradient from objective='per_layer'; "
                "use objective='both' or 'ensemble', or mix='mean'"
            )
        weight = self.view_loss
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"view_loss: expected a number of at least 0, got {weight!r}")
        if self.standalone_view and self.view_loss:
            raise ValueError(
                f"view_loss: trains the ensemble to answer from the view, which standalone_view leaves to a model of "
                f"its own; expected 0 beside it, got {weight}"
            )
        if self.standalone_view and self.head != "layerwise":
            raise ValueError(f"standalone_view: only with head='layerwise', got {self.head!r}")
        if self.view_blend and self.head != "layerwise":
            raise ValueError(f"view_blend: only with head='layerwise', got {self.head!r}")
        if not self.target_std > 0:
            raise ValueError(f"target_std: expected > 0, got {self.target_std}")


def _require_one_of(name: str, value: Any, allowed: Any) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
