"""``LayerwiseEnsemble``: the drop-in for :class:`levi_fast.reference.LayerwiseEnsemble`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from levi_fast import functional, reference
from levi_fast.reference import EnsembleOutput

__all__ = ["EnsembleOutput", "LayerwiseEnsemble"]


class LayerwiseEnsemble(reference.LayerwiseEnsemble):
    """LEVI's layer-wise ensemble with the reference's constructor, parameters and results, computed at once.

    It inherits construction, initialisation and checks from the reference, so that a ``state_dict`` fits both;
    the computation is :func:`levi_fast.functional.layerwise_ensemble`'s. With the same seed, view dropout
    draws the same examples as the reference; hidden dropout draws other units with the same probability.
    """

    def forward(
        self,
        taps: Tensor | Sequence[Tensor],
        view: Tensor | None = None,
        *,
        zeroed_view: bool = False,
    ) -> EnsembleOutput:
        """As :meth:`levi_fast.reference.LayerwiseEnsemble.forward`: taps [L, B, D] or L × [B, D_l], view [B, V].

        Raises:
            ValueError: if a shape does not fit the constructor's widths; the message names the argument.
        """
        reference.check_ensemble_inputs(taps, view, self.tap_widths, self.view_width)
        keep = None if view is None else self.draw_view_keep(view.shape[0], view.device)
        return self._computed(taps, self.tap_weight, view, keep, zeroed_view)

    def without_taps(self, view: Tensor) -> EnsembleOutput:
        """As :meth:`levi_fast.reference.LayerwiseEnsemble.without_taps`; the taps' product is left out."""
        reference.check_view(view, self.view_width, view.shape[0])
        layers, width = self.bias.shape
        taps = self.bias.new_empty(layers, view.shape[0], 0)
        none = self.tap_weight.new_empty(0, width)  # not a slice: its gradient would be zeros of the whole weight
        return self._computed(taps, none, view, None, False)

    def _computed(
        self,
        taps: Tensor | Sequence[Tensor],
        tap_weight: Tensor,
        view: Tensor | None,
        view_keep: Tensor | None,
        zeroed_view: bool,
    ) -> EnsembleOutput:
        return EnsembleOutput(
            *functional.checked_ensemble(
                taps,
                view,
                tap_weight,
                self.view_weight,
                self.bias,
                self.output_weight,
                self.output_bias,
                None if self.mix_logits is None else self.mix_logits.softmax(0),
                self.activation,
                self.normalize,
                view_keep,
                self.dropout if self.training else 0.0,
                zeroed_view,
            )
        )
