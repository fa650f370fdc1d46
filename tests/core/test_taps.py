"""Taps are the layers' own outputs, pooled, with the backbone frozen and nothing run above the last one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from levi_fast import TapExtractor
from levi_fast.layers import find_layers
from levi_fast.selection import resolve_taps
from levi_fast.taps import pool
from levi_fast.widths import measure_widths

TEXT_BACKBONES = ["bert", "distilbert", "t5_encoder", "t5", "gpt2", "llama"]
IMAGE_BACKBONES = ["vit", "swin", "convnext"]


def block_outputs(backbone: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every layer's output of one whole forward, collected by hooks of this test's own."""
    runner = backbone.get_encoder() if type(backbone).__name__ == "T5Model" else backbone
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, out: outputs.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        for layer in find_layers(runner)
    ]
    with torch.no_grad():
        runner(**inputs)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("name", TEXT_BACKBONES + IMAGE_BACKBONES)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_taps_are_the_pooled_layer_outputs(build_backbone, inputs_for, name, pooling):
    backbone, inputs = build_backbone(name), inputs_for(name)
    taps = TapExtractor(backbone, "all", pooling)(**inputs)
    mask = inputs.get("attention_mask")
    outputs = block_outputs(backbone, inputs)
    assert len(taps) == len(outputs) == 3
    for tap, hidden in zip(taps, outputs, strict=True):
        hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        for row in range(len(hidden)):
            tokens = hidden[row] if mask is None else hidden[row][mask[row].bool()]
            expected = {"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[-1]}[pooling]
            torch.testing.assert_close(tap[row], expected, rtol=1e-5, atol=1e-6)


class Stack(nn.Module):
    """A backbone of plain layers, whatever their widths and dtypes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x.to(next(layer.parameters()).dtype))
        return x


def test_equal_taps_are_rows_of_one_bank_and_others_stand_alone():
    x = torch.randn(3, 5, 4)
    equal = TapExtractor(Stack(nn.Linear(4, 6), nn.Linear(6, 6)))(x=x)
    assert isinstance(equal, torch.Tensor) and equal.shape == (2, 3, 6)
    unequal = TapExtractor(Stack(nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 6)))(x=x)
    assert [tap.shape[1] for tap in unequal] == [6, 7, 6]
    assert all(tap.untyped_storage().nbytes() == 4 * tap.numel() for tap in unequal)  # not a row of something larger
    mixed = TapExtractor(Stack(nn.Linear(4, 6).bfloat16(), nn.Linear(6, 6)))(x=x)
    assert mixed.dtype == torch.float32  # nothing is rounded to the first layer's dtype


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "vit"])
def test_taps_are_transformers_hidden_states(build_backbone, inputs_for, name):
    backbone, inputs = build_backbone(name), inputs_for(name)
    with torch.no_grad():
        hidden = backbone(**inputs, output_hidden_states=True).hidden_states
    taps = TapExtractor(backbone, [0, 1], "cls")(**inputs)
    torch.testing.assert_close(taps, torch.stack([hidden[1][:, 0], hidden[2][:, 0]]))


@pytest.mark.parametrize("name", TEXT_BACKBONES)
def test_padding_on_either_side_changes_nothing(build_backbone, name):
    # Where absolute positions count from the first column, left padding is another input.
    sides = ["right"] if name in ("bert", "distilbert", "gpt2") else ["right", "left"]
    backbone = build_backbone(name)
    ids = torch.tensor([[5, 6, 7, 8]])
    for pooling in ("mean", "cls", "last"):
        extractor = TapExtractor(backbone, "all", pooling)
        alone = extractor(input_ids=ids, attention_mask=torch.ones_like(ids))
        for side in sides:
            pad = torch.zeros(1, 3, dtype=ids.dtype)
            parts = (ids, pad) if side == "right" else (pad, ids)
            marks = (torch.ones_like(ids), pad) if side == "right" else (pad, torch.ones_like(ids))
            padded = extractor(input_ids=torch.cat(parts, 1), attention_mask=torch.cat(marks, 1))
            torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TEXT_BACKBONES + IMAGE_BACKBONES)
def test_nothing_runs_above_the_last_tap(build_backbone, inputs_for, name):
    backbone = build_backbone(name)
    extractor = TapExtractor(backbone, [0])
    ran = []
    for module_name, module in extractor.runner.named_modules():
        module.register_forward_hook(lambda _m, _i, _o, n=module_name: ran.append(n))
    extractor(**inputs_for(name))
    above = {id(m) for layer in extractor.blocks[1:] for m in layer.modules()}
    names_above = {n for n, m in extractor.runner.named_modules() if id(m) in above}
    assert ran and not names_above & set(ran)
    assert "" not in ran  # the backbone's own forward, with its final norm and pooler, never ended


def test_hidden_states_are_let_go_layer_by_layer(build_backbone, inputs_for):
    backbone = build_backbone("bert", num_hidden_layers=6)
    alive: list[weakref.ref] = []
    most = 0

    def watch(_module, _inputs, output):
        nonlocal most
        gc.collect()
        alive.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))
        most = max(most, sum(ref() is not None for ref in alive))

    for layer in backbone.encoder.layer:
        layer.register_forward_hook(watch)
    taps = TapExtractor(backbone)(**inputs_for("bert"))
    assert taps.shape[0] == 6 and most <= 2  # a layer's output, and the one it was computed from
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_backbone_stays_frozen_in_eval_mode(inputs_for):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(7), nn.Dropout(0.5))])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    backbone = Normed().train()
    extractor = TapExtractor(backbone)
    x = torch.randn(3, 7, 4)
    backbone.train()
    first = extractor(x=x)
    mean = backbone.layers[0][1].running_mean.clone()
    backbone.train()
    assert torch.equal(extractor(x=x), first) and torch.equal(backbone.layers[0][1].running_mean, mean)
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert not first.requires_grad


def test_output_hidden_states_in_the_config_is_overruled(build_backbone, inputs_for):
    backbone = build_backbone("bert")
    expected = TapExtractor(backbone)(**inputs_for("bert"))
    backbone.config.output_hidden_states = True
    backbone.config.output_attentions = False
    assert torch.equal(TapExtractor(backbone)(**inputs_for("bert")), expected)


def test_no_hooks_are_left_behind_even_after_an_error(build_backbone, inputs_for):
    backbone = build_backbone("bert")
    extractor = TapExtractor(backbone)
    extractor(**inputs_for("bert"))
    with pytest.raises(IndexError):
        extractor(input_ids=torch.tensor([[999]]), attention_mask=torch.ones(1, 1))
    assert not any(m._forward_hooks for m in backbone.modules())


def test_an_all_padding_row_is_refused_by_number(build_backbone):
    extractor = TapExtractor(build_backbone("bert"))
    with pytest.raises(ValueError, match=r"only padding in rows \[1\]"):
        extractor(input_ids=torch.ones(2, 3).long(), attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match="expected the hidden states' 5 positions, got 4"):
        pool(torch.zeros(2, 5, 3), torch.ones(2, 4), "mean")


def test_widths_are_known_before_any_data(build_backbone):
    expected = {"bert": [16] * 3, "t5": [16] * 3, "vit": [16] * 3, "swin": [16, 32, 32], "convnext": [8, 12, 16]}
    for name, widths in expected.items():
        assert measure_widths(TapExtractor(build_backbone(name))) == widths


@pytest.mark.parametrize(
    ("taps", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("last", [6]),
        ("even:1", [6]),
        ("even:2", [3, 6]),
        ("even:7", [0, 1, 2, 3, 4, 5, 6]),
        ([3, 0, -1], [0, 3, 6]),
    ],
)
def test_tap_forms(taps, layers):
    assert resolve_taps(taps, 7) == layers


@pytest.mark.parametrize("count", range(1, 41))
def test_even_taps_are_distinct_and_end_at_the_last_layer(count):
    for total in range(count, 41):
        layers = resolve_taps(f"even:{count}", total)
        assert len(set(layers)) == count and layers == sorted(layers) and layers[-1] == total - 1 and layers[0] >= 0


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ([7], r"taps\[0\]: 7 is out of range for a backbone of 7 layers"),
        ([0, -8], r"taps\[1\]: -8 is out of range"),
        ([1, 1], "each layer once"),
        ([6, -1], "each layer once"),
        ([], "empty list"),
        ([1.5], r"taps\[0\]: expected an integer"),
        ("even:0", "k from 1 to 7"),
        ("even:8", "k from 1 to 7"),
        ("even:x", "got 'even:x'"),
        ("first", "got 'first'"),
    ],
)
def test_bad_taps_are_named(taps, message):
    with pytest.raises(ValueError, match=message):
        resolve_taps(taps, 7)


def test_layers_that_cannot_be_found_or_are_shared_are_explained(build_backbone):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(ValueError, match=r"pass layers= .*left \(1\), right \(1\)"):
        find_layers(Two())
    assert len(find_layers(Two(), "right")) == 1
    with pytest.raises(ValueError, match="no module 'middle'"):
        find_layers(Two(), "middle")
    with pytest.raises(ValueError, match="pooling: expected one of mean, cls, last, token, got 'max'"):
        TapExtractor(build_backbone("bert"), pooling="max")
    from transformers import AlbertConfig, AlbertModel

    shared = AlbertModel(
        AlbertConfig(
            vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32,
            num_hidden_layers=3,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 layers, and only 1 of its own"):
        TapExtractor(shared)
