"""``LeviModel``: a frozen backbone, a task model and the layer-wise ensemble as one transformers model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from levi_fast.backbone_training import (
    PREFIX,
    add_lora,
    drop_untrained,
    forgive_missing_untrained,
    train_up_to,
)
from levi_fast.backbones import BackboneRecord, backbone_name, load_backbone
from levi_fast.config import LeviConfig
from levi_fast.heads import build_head
from levi_fast.layers import keyword_names
from levi_fast.modules import EnsembleOutput, LayerwiseEnsemble
from levi_fast.objective import objective_loss
from levi_fast.offloading import is_placed, leave_backbone_alone
from levi_fast.quantization import backbone_dtype
from levi_fast.reference import blend, mixed
from levi_fast.saving import FolderModel, fingerprint_of
from levi_fast.standalone import StandaloneView
from levi_fast.taps import TapExtractor
from levi_fast.tokens import by_token, flat_tokens
from levi_fast.view import task_model_of, token_spec, view_width_for
from levi_fast.widths import measure_widths


@dataclass
class LeviOutput(ModelOutput):
    """What a :class:`LeviModel` returns; never the backbone's hidden states.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, C] ([B, T, C] with ``pooling="token"``, and so on); in eval mode blended with the predictions
            of taps alone and view alone by ``config.blend`` and ``config.view_blend``. For regression in the label's
            own units.
        layer_logits: [L, B, C], each adapting layer's prediction, blended likewise.
        logits_without_view: [B, C], the prediction with the view zeroed; in eval mode, where there is a view.
        logits_with_view: [B, C], the prediction before blending; likewise.
        logits_without_taps: [B, C], the view's own prediction: the standalone task model's where there is one; in
            eval mode, where the config gives it a loss or a weight.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    layer_logits: Tensor | None = None
    logits_without_view: Tensor | None = None
    logits_with_view: Tensor | None = None
    logits_without_taps: Tensor | None = None


class LeviModel(FolderModel):
    """LEVI (Roh et al., ICML 2024, arXiv 2402.04644) over any transformers backbone.

    Build one with :func:`get_levi_model`, or load one with :meth:`from_pretrained`. The backbone is frozen and
    stays in eval mode whatever ``train()`` says, unless ``config.backbone_training`` says otherwise. ``state_dict``
    and ``save_pretrained`` hold what is trained (ensemble, task model, adapters), never a frozen backbone's weights.

    Attributes:
        backbone: the pre-trained model, or None (``taps="none"``, or loaded to run on precomputed taps alone).
        extractor: reads the taps out of it, or None.
        task_model: the small model trained from scratch, or None.
        standalone: a second one with a head of its own (``config.standalone_view``), or None.
        ensemble: the :class:`levi_fast.LayerwiseEnsemble`, or what else ``config.head`` names.
    """

    config_class = LeviConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # tells Trainer that the loss is a mean over this batch
    supports_gradient_checkpointing = True

    def __init__(
        self, config: LeviConfig, backbone: nn.Module | None = None, task_model: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        if config.tap_widths is None:
            raise ValueError("config.tap_widths: expected the taps' widths; build a new model with get_levi_model")
        self.task_model = task_model if task_model is not None else task_model_of(config)
        self.ensemble = cast(LayerwiseEnsemble, build_head(config))
        self.backbone = backbone
        self.extractor: TapExtractor | None = None
        if backbone is not None:
            if config.backbone_training != "frozen" and is_placed(backbone):
                raise ValueError(
                    f"backbone: one that accelerate has placed or offloaded can only be frozen, and "
                    f"backbone_training is {config.backbone_training!r}"
                )
            if config.backbone_training == "lora":
                add_lora(backbone, cast(dict[str, Any], config.lora))
            self.extractor = TapExtractor(
                backbone,
                config.tap_layers if config.tap_layers is not None else config.taps,
                cast(Any, config.pooling),
                layers=config.backbone_layers,
                trained=config.backbone_training != "frozen",
            )
            if config.backbone_training == "full":
                train_up_to(backbone, self.extractor.blocks, self.extractor.layers[-1])
            if is_placed(backbone):
                leave_backbone_alone(self)  # each process has its own
        self._task_inputs, self._task_takes_all = keyword_names(self.task_model)
        self.standalone: StandaloneView | None = None
        if config.standalone_view:  # last, so that all else starts from the weights that it has without
            self.standalone = StandaloneView(config, self.task_model)
        self.post_init()
        self.register_state_dict_post_hook(drop_untrained)
        self.register_load_state_dict_post_hook(forgive_missing_untrained)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every part initialises itself, and the backbone must keep its weights."""

    def init_weights(self) -> None:
        """Nothing, for the same reason."""

    def train(self, mode: bool = True) -> Self:
        """Set the trained part's mode; a frozen backbone stays in eval mode, dropout and BatchNorm included."""
        super().train(mode)
        if self.backbone is not None and self.config.backbone_training == "frozen":
            self.backbone.eval()
        return self

    def gradient_checkpointing_enable(self, *arguments: Any, **keywords: Any) -> None:
        """Let a backbone that is trained compute its layers' activations again in the backward pass.

        Raises:
            ValueError: the backbone is frozen, and so keeps no activations.
        """
        if self.backbone is None or self.config.backbone_training == "frozen":
            raise ValueError("gradient checkpointing: the backbone is frozen and keeps no activations to save")
        cast(PreTrainedModel, self.backbone).gradient_checkpointing_enable(*arguments, **keywords)

    def gradient_checkpointing_disable(self) -> None:
        """Undo :meth:`gradient_checkpointing_enable`."""
        if isinstance(self.backbone, PreTrainedModel):
            self.backbone.gradient_checkpointing_disable()

    def load_state_dict(self, state_dict: Any, *arguments: Any, **keywords: Any) -> Any:
        """As ``nn.Module``'s; a state without the backbone's weights, as ``state_dict`` gives it, leaves it alone."""
        if self.config.backbone_training != "frozen" or any(name.startswith(PREFIX) for name in state_dict):
            return super().load_state_dict(state_dict, *arguments, **keywords)
        with self._without_backbone():  # a quantised layer raises where its weights are not there
            return super().load_state_dict(state_dict, *arguments, **keywords)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``cuda``, ``half`` and so on do; a backbone that accelerate has placed stays as it is."""
        if self.backbone is None or not is_placed(self.backbone):
            return super()._apply(fn, recurse)
        with self._without_backbone():
            return super()._apply(fn, recurse)

    @contextlib.contextmanager
    def _without_backbone(self) -> Iterator[None]:
        backbone, self.backbone = self.backbone, None
        try:
            yield
        finally:
            self.backbone = backbone

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        taps: Tensor | None = None,
        numeric: Tensor | None = None,
        categorical: Tensor | None = None,
        history_features: Tensor | None = None,
        history_ratings: Tensor | None = None,
        history_mask: Tensor | None = None,
        target_features: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> LeviOutput | tuple[Tensor, ...]:
        """Predict, and compute the loss where labels are given.

        Every input goes by its name to the backbone, to the task model, or to both.

        Args:
            labels: [B] int64 classes, [B, C] floats (multi-label), or [B] / [B, C] floats (regression); with
                ``pooling="token"`` [B, T] int64 classes, -100 where a token has none.
            taps: [B, sum_l D_l] ([B, T, sum_l D_l] with ``pooling="token"``), precomputed (see :meth:`extract_taps`):
                the backbone is not run.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: if neither backbone nor task model takes an input, a row is all padding, or labels do not
                fit ``num_labels`` and ``problem_type``; the message names the argument.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "pixel_values": pixel_values,
            "numeric": numeric,
            "categorical": categorical,
            "history_features": history_features,
            "history_ratings": history_ratings,
            "history_mask": history_mask,
            "target_features": target_features,
            **inputs,
        }
        given = {name: value for name, value in named.items() if value is not None}
        self._refuse_unknown(given)
        view, view_inputs = None, given
        if self.task_model is not None:
            if not self._task_takes_all:
                view_inputs = {name: value for name, value in given.items() if name in self._task_inputs}
            view = self.task_model(**view_inputs)
        shape = None  # [B, T] where every token is an example
        if self.config.pooling == "token":
            shape, taps, view, labels = flat_tokens(given, taps, view, labels)
        layer_taps = self._taps(given, taps, view)
        has_both = view is not None and any(self.ensemble.tap_widths)
        asks_zeroed = has_both and not self.training
        output: EnsembleOutput = self.ensemble(layer_taps, view, zeroed_view=asks_zeroed)
        with_view, alone = output.logits, None
        if has_both and self._asks_view_alone(labels):
            if self.standalone is not None:
                alone = self.standalone(view_inputs, by_token=shape is not None)
            else:
                alone = self.ensemble.without_taps(cast(Tensor, view))
        if asks_zeroed:
            output = blend(output, self.config.blend)
            output = output if alone is None else mixed(output, alone, self.config.view_blend)
        if labels is None and self.training and torch.is_grad_enabled() and self._has_more_than_one_loss():
            _warn_of_other_objective()
        loss = None if labels is None else self.loss(output, labels)
        if loss is not None and alone is not None and self.training:
            own = self.loss(alone, cast(Tensor, labels))
            loss = loss + (own if self.standalone is not None else self.config.view_loss * own)
        if shape is not None:
            output, with_view = by_token(output, shape), with_view.unflatten(-2, shape)
            alone = None if alone is None else by_token(alone, shape)
        result = LeviOutput(
            loss=cast(Any, loss),
            logits=self._in_label_units(output.logits),
            layer_logits=self._in_label_units(output.layer_logits),
            logits_without_view=self._in_label_units(output.logits_without_view),
            logits_with_view=self._in_label_units(with_view) if asks_zeroed else None,
            logits_without_taps=None if alone is None or self.training else self._in_label_units(alone.logits),
        )
        return result.to_tuple() if return_dict is False else result

    def extract_taps(self, **inputs: Any) -> Tensor:
        """Run the backbone alone: its taps [B, sum_l D_l] in its dtype, layer by layer; of tokens [B, T, sum_l D_l].

        Args:
            **inputs: the backbone's keyword arguments; others are ignored.

        Raises:
            ValueError: if this model has no backbone, or a row is all padding.
        """
        if self.extractor is None:
            raise ValueError("backbone: this model has none to extract taps from")
        accepted = {k: v for k, v in inputs.items() if v is not None and k in self.extractor.input_names}
        taps = torch.cat(list(self.extractor(**accepted)), dim=1)
        return taps.unflatten(0, tuple(inputs["input_ids"].shape)) if self.config.pooling == "token" else taps

    def _asks_view_alone(self, labels: Tensor | None) -> bool:
        """Whether y(0, view) is computed: for its loss, or for a prediction that weighs it or may."""
        config = self.config
        trained = config.view_loss > 0 or self.standalone is not None
        if self.training:
            return config.head == "layerwise" and trained and labels is not None
        return config.head == "layerwise" and (trained or config.view_blend > 0)

    def _has_more_than_one_loss(self) -> bool:
        """Whether the loss is another than that of the logits."""
        return self.config.objective != "ensemble" or self.standalone is not None

    def drop_standalone(self) -> None:
        """Let go of the standalone task model, whose prediction has no weight: what is saved and served is LEVI."""
        self.config = copy.copy(self.config)  # others may be built from the one it had
        self.standalone, self.config.standalone_view, self.config.view_blend = None, False, 0.0

    def loss(self, output: EnsembleOutput, labels: Tensor) -> Tensor:
        """LEVI's objective on the ensemble's raw outputs; sets ``config.problem_type`` by transformers' rule."""
        config = cast(LeviConfig, self.config)
        return objective_loss(output, labels, config, smoothing=config.label_smoothing if self.training else 0.0)

    def num_parameters_by_part(self) -> tuple[int, int]:
        """(trained, all) parameters, the backbone's included in the second."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return trained, sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, beside all there are."""
        trained, total = self.num_parameters_by_part()
        share = 100 * trained / total if total else 0.0
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}")

    def _taps(self, given: dict[str, Any], taps: Tensor | None, view: Tensor | None) -> Tensor | Sequence[Tensor]:
        widths = self.ensemble.tap_widths
        if not any(widths):  # taps="none"
            if view is None:
                raise ValueError("view: expected a task model, as taps='none' leaves nothing else")
            return [view.new_empty(view.shape[0], 0)]
        if taps is not None and self.training and self.config.backbone_training != "frozen":
            raise ValueError(
                f"taps: precomputed ones would leave the backbone as it is, and backbone_training is "
                f"{self.config.backbone_training!r}"
            )
        if taps is None:
            if self.extractor is None:
                raise ValueError("taps: expected precomputed taps, as this model was loaded without its backbone")
            accepted = {name: value for name, value in given.items() if name in self.extractor.input_names}
            return _as(self.extractor(**accepted), self.ensemble.bias)
        if taps.dim() != 2 or taps.shape[1] != sum(widths):
            raise ValueError(f"taps: expected [B, {sum(widths)}], got {list(taps.shape)}")
        taps = taps.to(self.ensemble.bias.dtype)
        if len(set(widths)) == 1:
            return taps.view(-1, len(widths), widths[0]).transpose(0, 1)
        return list(taps.split(widths, dim=1))

    def reads(self, name: str) -> bool:
        """Whether the backbone or the task model takes an input of this name; any other is refused."""
        # Without a backbone its inputs may still be in the batch; a tokenizer makes these three whatever is asked.
        if self._task_takes_all or name in ("input_ids", "attention_mask", "token_type_ids"):
            return True
        in_backbone = name == "pixel_values" if self.extractor is None else name in self.extractor.input_names
        return in_backbone or name in self._task_inputs

    def _refuse_unknown(self, given: dict[str, Any]) -> None:
        unknown = sorted(name for name in given if not self.reads(name))
        if unknown:
            raise ValueError(f"inputs: neither the backbone nor the task model takes {unknown}")

    def _in_label_units(self, logits: Any) -> Any:
        if logits is None or self.config.problem_type != "regression":
            return logits
        if self.config.target_mean == 0 and self.config.target_std == 1:
            return logits
        return logits * self.config.target_std + self.config.target_mean


def get_levi_model(
    backbone: nn.Module | str | BackboneRecord | None, config: LeviConfig, task_model: nn.Module | None = None
) -> LeviModel:
    """Wrap a backbone: freeze it, resolve the taps, build the ensemble (and the task model, if not given).

    Args:
        backbone: a transformers model (or any module with one stack of layers), a hub id or folder to load it
            from, or None with ``taps="none"``. It is frozen in place (or given adapters, or trained, by
            ``config.backbone_training``), not copied. A ``BackboneRecord`` gives a model without the backbone, for
            precomputed ``taps``, that is saved as if it had it.
        config: a :class:`LeviConfig`; a completed copy of it ends up as ``model.config``.
        task_model: a module that returns [B, V] from keyword tensors; None builds ``config.task_model``'s
            specification, or goes without a view where that is None too.

    Raises:
        ValueError: for a tap out of range, layers that cannot be found, or a task model of unknown width.
        DataError: if a backbone's name cannot be loaded.
    """
    config = copy.deepcopy(config)
    if task_model is not None:
        config.task_model = dict(getattr(task_model, "spec", None) or {"type": "custom"})
        config.view_width = view_width_for(task_model, config.view_width)
    elif config.task_model is not None:
        config.task_model = token_spec(config.task_model, config.pooling)
        task_model = cast(nn.Module, task_model_of(config))
        # With every default written out, so that a later release's other defaults do not change a saved model.
        config.task_model = dict(getattr(task_model, "spec", config.task_model))
        config.view_width = view_width_for(task_model, config.view_width)
    else:
        config.view_width = 0
    if config.standalone_view and (config.taps == "none" or task_model is None):
        raise ValueError("standalone_view: stands beside an ensemble of taps and a task model, and one is missing")
    if config.taps == "none":
        if task_model is None:
            raise ValueError("taps: 'none' leaves the task model alone, and there is none")
        config.tap_layers, config.tap_widths = None, [0]
        config.view_dropout = 0.0  # a dropped view would leave an example with nothing at all
        return LeviModel(config, None, task_model)
    if backbone is None:
        raise ValueError("backbone: expected a model or a name; only taps='none' goes without")
    if isinstance(backbone, BackboneRecord) and config.backbone_training != "frozen":
        raise ValueError(
            f"backbone: expected the backbone itself to train ({config.backbone_training}), got a record"
        )
    if isinstance(backbone, BackboneRecord):
        config.tap_layers, config.tap_widths = backbone.resolve(config.taps)
        config.backbone, config.backbone_dtype = backbone.name, backbone.dtype
        config.backbone_fingerprint = backbone.fingerprint
        return LeviModel(config, None, task_model)
    if isinstance(backbone, str):
        config.backbone = backbone
        backbone = load_backbone(backbone, dtype=config.backbone_dtype)
    else:
        config.backbone = backbone_name(backbone)
    extractor = TapExtractor(backbone, config.taps, cast(Any, config.pooling), layers=config.backbone_layers)
    config.tap_layers = extractor.layers
    config.tap_widths = measure_widths(extractor)
    config.backbone_dtype = backbone_dtype(backbone)
    config.backbone_fingerprint = fingerprint_of(extractor)
    return LeviModel(config, backbone, task_model)


@torch.compiler.disable
def _warn_of_other_objective() -> None:
    warnings.warn(
        "LeviModel was called in training mode without labels: a loss taken from its logits, as Trainer's "
        "label_smoothing_factor does, is objective='ensemble' whatever the config says, and leaves a standalone task "
        "model untrained; for smoothed labels in the configured objective set LeviConfig.label_smoothing",
        stacklevel=3,
    )


def _as(taps: Tensor | list[Tensor], other: Tensor) -> Tensor | list[Tensor]:
    """In another tensor's dtype, and on its device: that of an offloaded backbone may differ."""
    return taps.to(other) if isinstance(taps, Tensor) else [tap.to(other) for tap in taps]
