"""layerwise_ensemble on GPUs, backward: how the kernels of ensemble_backward_kernels_triton.py are launched, and why.

With g_l = dloss/dy_l + m_l dloss/dy the gradient of a layer's prediction (formed on load, never written):

    d_l            = (g_l O_l) * drop * act'(before_l)              [B, K]   all layers in one launch
    output_weight  = g_l^T drop(act(before_l)),   output_bias = sum_b g_l
    tap_weight     = norm(tap_l)^T d_l,           bias        = sum_b d_l    read off the same tiles
    view_weight    = norm(view)^T d_l
    view           = norm'(sum_l d_l V_l^T),      tap_l       = norm'(d_l W_l^T)   only where asked
    mix_weights    = sum_bc dloss/dy * y_l

``before`` is all that the forward saves: the activation and its derivative are taken again on load. A sum over many
examples with few output tiles is cut into parts that a last launch adds in their order; no atomics, so the same
inputs give the same bits. Transposed operands are read transposed from memory, never transposed in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from levi_fast.kernels.ensemble_backward_kernels_triton import (
    hidden_grad_kernel,
    input_grad_kernel,
    input_weight_grad_kernel,
    mix_grad_kernel,
    mixed_grad_kernel,
    norm_backward_kernel,
    output_weight_grad_kernel,
    sum_parts_kernel,
)
from levi_fast.kernels.ensemble_tiles_triton import Taps, dot_precision, locate, row_stats
from levi_fast.kernels.launch_configs import ProductConfig, RowConfig, ceil_div, device_traits, power_of_two, tuned_or
from levi_fast.kernels.layerwise_ensemble_triton import dropout_scale

# Bits of ``needs``, in the order of the results.
NEEDS = ("view", "tap_weight", "view_weight", "bias", "output_weight", "output_bias", "mix_weights", "taps")
_ELEMENTS = 1024  # of one program of an elementwise launch


def _sum_parts(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, in order."""
    if partial.shape[0] == 1 and partial.dtype == dtype:
        return partial[0]
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    sum_parts_kernel[(ceil_div(out.numel(), _ELEMENTS),)](
        partial, out, out.numel(), partial.shape[0], BLOCK=_ELEMENTS
    )
    return out


def _launch(config: ProductConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _tiles(m: int, n: int, config: ProductConfig) -> int:
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)


def _part_length(length: int, config: ProductConfig) -> int:
    return max(ceil_div(ceil_div(length, config.splits), config.block_k), 1) * config.block_k


class _Backward:
    """The launches of one backward pass, with what they share."""

    def __init__(
        self,
        taps: Taps,
        view: Tensor | None,
        view_keep: Tensor | None,
        mix_weights: Tensor | None,
        hidden_keep: Tensor | None,
        like: Tensor,
        batch: int,
        outputs: int,
        width: int,
        activation: int,
        normalize: bool,
        dropout: float,
    ) -> None:
        self.taps, self.view, self.mix_weights = taps, view, mix_weights
        self.view_keep = None if view_keep is None else view_keep.contiguous().view(torch.uint8)
        self.hidden_keep = None if hidden_keep is None else hidden_keep.contiguous().view(torch.uint8)
        self.like, self.batch, self.outputs, self.width = like, batch, outputs, width
        self.activation, self.normalize, self.scale = activation, normalize, dropout_scale(dropout)
        self.layers, self.traits = taps.layers, device_traits(like.device)
        self.precision = dot_precision(like.dtype)
        self._stats: Tensor | None = None

    @property
    def stats(self) -> Tensor:
        """LayerNorm's statistics, found at their first use."""
        if self._stats is None:
            self._stats = row_stats(self.taps, self.view, self.batch) if self.normalize else self.like
        return self._stats

    def config(self, kernel: str, batches: int, m: int, n: int, k: int, most_stages: int = 4) -> ProductConfig:
        itemsize = self.like.element_size()
        heuristic = ProductConfig.from_tile_heuristic(self.traits, batches, m, n, k, itemsize, most_stages)
        return tuned_or(heuristic, self.traits, kernel, self.like.dtype, L=batches, M=m, N=n, K=k)

    def _grads(self, grad: Tensor | None, layer_grad: Tensor | None) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
        pointers = tuple(self.like if t is None else t for t in (grad, layer_grad, self.mix_weights))
        flags = {
            "HAS_GRAD": grad is not None,
            "HAS_LAYER_GRAD": layer_grad is not None,
            "HAS_MIX": self.mix_weights is not None,
        }
        return pointers, flags

    def before_grad(
        self, grad: Tensor | None, layer_grad: Tensor | None, before: Tensor, output_weight: Tensor | None
    ) -> Tensor:
        """``d_l`` [L, B, K]."""
        pointers, flags = self._grads(grad, layer_grad)
        if output_weight is None and grad is None and layer_grad is not None:
            return layer_grad
        out = self.like.new_empty((self.layers, self.batch, self.width))
        if output_weight is None:
            mixed_grad_kernel[(ceil_div(self.batch * self.outputs, _ELEMENTS), self.layers)](
                *pointers, out, self.batch, self.outputs, self.layers, **flags, BLOCK=_ELEMENTS
            )
            return out
        config = self.config("hidden_grad", self.layers, self.batch, self.width, self.outputs)
        hidden_grad_kernel[(_tiles(self.batch, self.width, config), self.layers)](
            *pointers,
            output_weight.contiguous(),
            before,
            self.like if self.hidden_keep is None else self.hidden_keep,
            out,
            self.batch,
            self.width,
            self.outputs,
            self.layers,
            self.scale,
            ACTIVATION=self.activation,
            **flags,
            HAS_KEEP=self.hidden_keep is not None,
            PRECISION=self.precision,
            **_launch(config),
        )
        return out

    def output_grads(self, sets: Sequence[tuple[Tensor | None, Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
        """Gradients of output_weight [C, L, H] and output_bias [L, C], summed over (grad, layer_grad, before)."""
        config = self.config("output_weight_grad", self.layers, self.outputs, self.width, self.batch)
        length = _part_length(self.batch, config)
        parts = ceil_div(self.batch, length)
        dtype = torch.float32 if parts * len(sets) > 1 else self.like.dtype
        weight = self.like.new_empty((parts * len(sets), self.outputs, self.layers, self.width), dtype=dtype)
        bias = self.like.new_empty((parts * len(sets), self.layers, self.outputs), dtype=dtype)
        for index, (grad, layer_grad, before) in enumerate(sets):
            pointers, flags = self._grads(grad, layer_grad)
            output_weight_grad_kernel[(_tiles(self.outputs, self.width, config), self.layers, parts)](
                *pointers,
                before,
                self.like if self.hidden_keep is None else self.hidden_keep,
                weight,
                bias,
                self.batch,
                self.width,
                self.outputs,
                self.layers,
                length,
                index * parts,
                self.scale,
                ACTIVATION=self.activation,
                **flags,
                HAS_KEEP=self.hidden_keep is not None,
                PRECISION=self.precision,
                **_launch(config),
            )
        return _sum_parts(weight, self.like.dtype), _sum_parts(bias, self.like.dtype)

    def input_weight_grads(self, d: Tensor, *, of_view: bool) -> tuple[Tensor, Tensor]:
        """Gradients of tap_weight [sum D_l, K] and bias [L, K]; for the view, of view_weight [V, L, K]."""
        view = self.view if of_view else None
        widest = max(self.taps.widths) if view is None else view.shape[1]
        shape = (sum(self.taps.widths), self.width) if view is None else (widest, self.layers, self.width)
        # Rows that do not start on 32 bytes are read in small pieces; Triton 3.6 spills four stages of them on sm_80.
        stages = 3 if widest % 16 else 4
        config = self.config("input_weight_grad", self.layers, max(widest, 1), self.width, self.batch, stages)
        length = _part_length(self.batch, config)
        parts = ceil_div(self.batch, length)
        dtype = torch.float32 if parts > 1 else self.like.dtype
        weight = self.like.new_empty((parts, *shape), dtype=dtype)
        bias = self.like.new_empty((parts, self.layers, self.width), dtype=dtype)
        keep = None if view is None else self.view_keep
        constants = dict(self.taps.constants)
        if view is not None:
            constants = {"HAS_TABLE": False, "ALIGNED": False, "UNIT": view.stride(1) == 1}
        input_weight_grad_kernel[(_tiles(max(widest, 1), self.width, config), self.layers, parts)](
            self.taps.bank if view is None else view,
            self.taps.table if view is None else view,
            self.stats,
            self.like if keep is None else keep,
            d,
            weight,
            bias,
            self.batch,
            widest,
            self.width,
            self.layers,
            *(self.taps.strides if view is None else (0, *view.stride())),
            length,
            weight[0].numel(),
            **constants,
            IS_VIEW=view is not None,
            HAS_KEEP=keep is not None,
            NORMALIZE=self.normalize,
            PRECISION=self.precision,
            **_launch(config),
        )
        return _sum_parts(weight, self.like.dtype), _sum_parts(bias, self.like.dtype)

    def view_grad(self, d: Tensor, view_weight: Tensor) -> Tensor:
        """Gradient of the view [B, V]."""
        assert self.view is not None
        width = self.view.shape[1]
        config = self.config("view_grad", 1, self.batch, width, self.layers * self.width)
        a_part = ceil_div(self.layers, min(config.splits, self.layers))
        parts = ceil_div(self.layers, a_part)
        partial = self.like.new_empty((parts, self.batch, width), dtype=torch.float32)
        input_grad_kernel[(_tiles(self.batch, width, config), parts)](
            d,
            d,
            view_weight.contiguous(),
            partial,
            self.batch,
            width,
            self.width,
            self.layers,
            a_part,
            width,
            HAS_TABLE=False,
            IS_VIEW=True,
            PRECISION=self.precision,
            **_launch(config),
        )
        out = torch.empty_like(self.view, memory_format=torch.contiguous_format)
        constants = {"HAS_TABLE": False, "ALIGNED": False, "UNIT": self.view.stride(1) == 1}
        here = Taps(self.view, self.view, (width,), (0, self.view.stride(0), self.view.stride(1)), constants)
        there = Taps(out, out, (width,), (0, 0, 0), constants)
        self._norm_backward(partial, here, there, width, self.view_keep)
        return out

    def tap_grads(self, d: Tensor, tap_weight: Tensor, taps: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the taps, shaped as they came."""
        total, widest = sum(self.taps.widths), max(self.taps.widths)
        grads = [torch.empty_like(tap, memory_format=torch.contiguous_format) for tap in taps]
        if not widest:
            return grads
        config = self.config("tap_grad", self.layers, self.batch, widest, self.width)
        partial = self.like.new_empty((1, self.batch, total), dtype=torch.float32)
        has_table = self.taps.constants["HAS_TABLE"]
        input_grad_kernel[(_tiles(self.batch, widest, config), self.layers)](
            d,
            self.taps.table,
            tap_weight.contiguous(),
            partial,
            self.batch,
            widest,
            self.width,
            self.layers,
            1,
            total,
            HAS_TABLE=has_table,
            IS_VIEW=False,
            PRECISION=self.precision,
            **_launch(config),
        )
        there = locate(grads)
        aligned = self.taps.constants["ALIGNED"] and there.constants["ALIGNED"]
        here = Taps(
            self.taps.bank,
            self.taps.table,
            self.taps.widths,
            self.taps.strides,
            {**self.taps.constants, "ALIGNED": aligned},
        )
        self._norm_backward(partial, here, there, total, None)
        return grads

    def _norm_backward(self, partial: Tensor, here: Taps, there: Taps, row_length: int, keep: Tensor | None) -> None:
        widest = max(here.widths)
        heuristic = RowConfig.from_row_heuristic(self.traits, self.batch * here.layers, widest)
        block = power_of_two(widest)  # the whole row: its three sums need it at once
        rows = max(1, min(heuristic.rows, 2048 // block))
        norm_backward_kernel[(ceil_div(self.batch, rows), here.layers)](
            partial,
            here.bank,
            here.table,
            self.like if keep is None else keep,
            there.bank,
            there.table,
            self.batch,
            widest,
            partial.shape[0],
            row_length,
            *here.strides,
            **here.constants,
            HAS_KEEP=keep is not None,
            NORMALIZE=self.normalize,
            ROWS=rows,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )

    def mix_grad(self, sets: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """Gradient of mix_weights [L], summed over (grad, layer_logits)."""
        size = self.batch * self.outputs
        length = ceil_div(ceil_div(size, 64), _ELEMENTS) * _ELEMENTS
        parts = ceil_div(size, length)
        partial = self.like.new_empty((parts * len(sets), self.layers), dtype=torch.float32)
        for index, (grad, layer_logits) in enumerate(sets):
            mix_grad_kernel[(parts, self.layers)](
                grad, layer_logits, partial, size, self.layers, length, index * parts, BLOCK=_ELEMENTS
            )
        return _sum_parts(partial, dtype)


def backward(
    grad_logits: Tensor | None,
    grad_layer_logits: Tensor | None,
    grad_logits_zeroed: Tensor | None,
    grad_layer_logits_zeroed: Tensor | None,
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    output_weight: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    layer_logits: Tensor | None,
    layer_logits_zeroed: Tensor | None,
    before: Tensor,
    before_zeroed: Tensor,
    activation: int,
    normalize: bool,
    dropout: float,
    needs: int,
) -> list[Tensor]:
    """The op ``levi_fast::layerwise_ensemble_backward`` on the device of ``taps``; see its schema for the arguments.

    Returns:
        Gradients in the order of :data:`NEEDS` (the taps' last, one a tap), empty where not asked.
    """
    wanted = {name for bit, name in enumerate(NEEDS) if needs >> bit & 1}
    located = locate(taps)
    layers, batch, width = located.layers, taps[0].shape[-2], tap_weight.shape[1]
    outputs = width if output_weight is None else output_weight.shape[0]

    def contiguous(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    gradients = (
        (contiguous(grad_logits), contiguous(grad_layer_logits), before, layer_logits),
        (contiguous(grad_logits_zeroed), contiguous(grad_layer_logits_zeroed), before_zeroed, layer_logits_zeroed),
    )
    sets = [s for s in gradients if s[0] is not None or s[1] is not None]
    results: dict[str, Tensor] = {}
    tap_grads: list[Tensor] = []
    if sets and batch:
        run = _Backward(
            located, view, view_keep, contiguous(mix_weights), hidden_keep, tap_weight, batch, outputs, width,
            activation, normalize, dropout,
        )  # fmt: skip
        if mix_weights is not None and "mix_weights" in wanted:
            mixed = [(s[0], s[3]) for s in sets if s[0] is not None and s[3] is not None]
            if mixed:
                results["mix_weights"] = run.mix_grad(mixed, mix_weights.dtype)
        if output_weight is not None and wanted & {"output_weight", "output_bias"}:
            results["output_weight"], results["output_bias"] = run.output_grads([s[:3] for s in sets])
        first_product = {"view", "tap_weight", "view_weight", "bias", "taps"} & wanted
        grads = [run.before_grad(*s[:3], output_weight) for s in sets] if first_product else []
        both = grads[0] + grads[1] if len(grads) == 2 else grads[0] if grads else None
        if both is not None and wanted & {"tap_weight", "bias"}:
            results["tap_weight"], results["bias"] = run.input_weight_grads(both, of_view=False)
        if both is not None and view is not None and view_weight is not None and sets[0] is gradients[0]:
            if "view_weight" in wanted:
                results["view_weight"], _ = run.input_weight_grads(grads[0], of_view=True)
            if "view" in wanted:
                results["view"] = run.view_grad(grads[0], view_weight)
        if both is not None and "taps" in wanted:
            tap_grads = run.tap_grads(both, tap_weight, taps)
    if not tap_grads:
        tap_grads = [torch.zeros_like(tap) if "taps" in wanted else tap.new_empty(0) for tap in taps]
    shapes = {
        "view": None if view is None else view.shape,
        "tap_weight": tap_weight.shape,
        "view_weight": None if view_weight is None else view_weight.shape,
        "bias": (layers, width),
        "output_weight": None if output_weight is None else output_weight.shape,
        "output_bias": None if output_weight is None else (layers, outputs),
        "mix_weights": None if mix_weights is None else mix_weights.shape,
    }
    ordered = []
    for name, shape in shapes.items():
        if name not in wanted or shape is None:
            ordered.append(tap_weight.new_empty(0))
        else:  # zeros: no gradient came down, or no example did
            dtype = mix_weights.dtype if name == "mix_weights" and mix_weights is not None else tap_weight.dtype
            ordered.append(results[name] if name in results else tap_weight.new_zeros(shape, dtype=dtype))
    return [*ordered, *tap_grads]
