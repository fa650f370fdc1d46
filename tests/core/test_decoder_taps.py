"""Taps of an encoder-decoder's decoder, and of both stacks: T5 and BART."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from levi_fast import ActivationCache, LeviConfig, LeviModel, TapExtractor, get_levi_model, load_backbone


def t5() -> nn.Module:
    from transformers import T5Config, T5Model

    return T5Model(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def bart() -> nn.Module:
    from transformers import BartConfig, BartModel

    return BartModel(
        BartConfig(
            vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        )
    )  # fmt: skip


@pytest.fixture(params=[t5, bart])
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param().eval()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    ids = torch.randint(3, 50, (3, 6), generator=generator)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def hidden_states(backbone: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Every layer's output of encoder and decoder by transformers itself, and the decoder's mask."""
    given = inputs()
    start = backbone.config.decoder_start_token_id
    shifted = torch.cat([torch.full((3, 1), start), given["input_ids"][:, :-1]], dim=1)
    mask = torch.cat([torch.ones(3, 1, dtype=torch.int64), given["attention_mask"][:, :-1]], dim=1)
    seen: dict[int, Tensor] = {}
    blocks = [*block_list(backbone.get_encoder()), *block_list(backbone.get_decoder())]
    handles = [
        block.register_forward_hook(
            lambda _m, _i, output, place=place: seen.__setitem__(
                place, output if isinstance(output, Tensor) else output[0]
            )
        )
        for place, block in enumerate(blocks)
    ]
    with torch.no_grad():
        backbone(**given, decoder_input_ids=shifted, decoder_attention_mask=mask)
    for handle in handles:
        handle.remove()
    encoders = len(block_list(backbone.get_encoder()))
    return [seen[i] for i in range(encoders)], [seen[i] for i in range(encoders, len(blocks))], mask


def block_list(stack: Any) -> list[nn.Module]:
    return list(stack.block if hasattr(stack, "block") else stack.layers)


def pooled(states: list[Tensor], mask: Tensor) -> list[Tensor]:
    return [(state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) for state in states]


def test_taps_are_the_pooled_hidden_states_of_each_stack(backbone: nn.Module) -> None:
    encoder, decoder, mask = hidden_states(backbone)
    expected = pooled(encoder, inputs()["attention_mask"]), pooled(decoder, mask)
    for layers, taps, wanted in (
        (None, "all", expected[0]),
        ("encoder", "all", expected[0]),
        ("decoder", "all", expected[1]),
        ("encoder+decoder", "all", [*expected[0], *expected[1]]),
        ("encoder+decoder", [1, 3], [expected[0][1], expected[1][1]]),
        ("decoder", "last", expected[1][-1:]),
    ):
        found = TapExtractor(backbone, taps, layers=layers)(**inputs())
        torch.testing.assert_close(torch.stack(list(found)), torch.stack(wanted), msg=f"{layers} {taps}")


def test_nothing_above_the_last_tap_runs_in_either_stack(backbone: nn.Module) -> None:
    ran: list[int] = []
    blocks = [*block_list(backbone.get_encoder()), *block_list(backbone.get_decoder())]
    for place, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, place=place: ran.append(place))
    TapExtractor(backbone, [0, 3], layers="encoder+decoder")(**inputs())
    assert ran == [0, 1, 2, 3]
    ran.clear()
    TapExtractor(backbone, [0], layers="encoder+decoder")(**inputs())
    assert ran == [0]


def test_given_decoder_inputs_are_taken(backbone: nn.Module) -> None:
    extractor = TapExtractor(backbone, "last", layers="decoder")
    own = {"decoder_input_ids": torch.randint(3, 50, (3, 2))}
    assert not torch.equal(extractor(**inputs(), **own)[0], extractor(**inputs())[0])


def test_a_model_with_decoder_taps_trains_saves_and_loads(backbone: nn.Module, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path / "base")
    config = LeviConfig(num_labels=3, hidden_width=8, backbone_layers="encoder+decoder")
    torch.manual_seed(0)
    model = get_levi_model(load_backbone(str(tmp_path / "base")), config)
    assert model.config.tap_layers == [0, 1, 2, 3, 4]
    loss = model.train()(**inputs(), labels=torch.arange(3)).loss
    loss.backward()
    assert model.ensemble.tap_weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path / "model")
    loaded = LeviModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits)


def test_the_fingerprint_covers_what_the_taps_see(backbone: nn.Module) -> None:
    def fingerprint_of(layers: str | None, taps: Any) -> str:
        return str(
            get_levi_model(backbone, LeviConfig(backbone_layers=layers, taps=taps)).config.backbone_fingerprint
        )

    before = {key: fingerprint_of(*key) for key in ((None, "all"), ("decoder", "all"), ("decoder", (0,)))}
    with torch.no_grad():
        next(block_list(backbone.get_decoder())[-1].parameters()).add_(1.0)
    after = {key: fingerprint_of(*key) for key in before}
    assert after[(None, "all")] == before[(None, "all")]
    assert after[("decoder", (0,))] == before[("decoder", (0,))]
    assert after[("decoder", "all")] != before[("decoder", "all")]


def test_decoder_taps_are_cached(backbone: nn.Module, tmp_path: Path) -> None:
    rows = [{"input_ids": inputs()["input_ids"][0], "attention_mask": inputs()["attention_mask"][0]}]
    extractor = TapExtractor(backbone, "all", layers="encoder+decoder")
    cache = ActivationCache.build(tmp_path / "cache", extractor, rows)
    direct = extractor(input_ids=rows[0]["input_ids"][None], attention_mask=rows[0]["attention_mask"][None])
    torch.testing.assert_close(cache["data"][torch.tensor([0])], torch.cat(list(direct), dim=1))


def test_stacks_that_are_not_there_are_refused(build_backbone: Callable[..., nn.Module], backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match="layers: BertModel is no encoder-decoder, and has no 'decoder'"):
        TapExtractor(build_backbone("bert"), layers="decoder")
    backbone.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_input_ids: expected some"):
        TapExtractor(backbone, layers="decoder")(**inputs())
