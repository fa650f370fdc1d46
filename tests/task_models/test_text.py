"""Text: padding changes nothing, token dropout works as documented."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from levi_fast.task_models import TextTaskModel
from levi_fast.task_models.base import masked_mean
from levi_fast.task_models.text import drop_tokens, mean_embedding

ENCODERS = pytest.mark.parametrize("encoder", ["pooled", "transformer"])


def make(encoder: str, **settings: object) -> TextTaskModel:
    torch.manual_seed(0)
    return TextTaskModel(30, embedding_dim=16, view_width=8, encoder=encoder, **settings)  # type: ignore[arg-type]


@ENCODERS
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(encoder: str, side: str) -> None:
    model = make(encoder).eval()
    ids = torch.randint(1, 30, (4, 6))
    mask = torch.ones(4, 6, dtype=torch.long)
    junk, empty = torch.randint(0, 30, (4, 5)), torch.zeros(4, 5, dtype=torch.long)
    order = (0, 1) if side == "right" else (1, 0)
    padded_ids = torch.cat([(ids, junk)[i] for i in order], dim=1)
    padded_mask = torch.cat([(mask, empty)[i] for i in order], dim=1)
    torch.testing.assert_close(model(padded_ids, padded_mask), model(ids, mask), rtol=1e-5, atol=1e-6)


@ENCODERS
@pytest.mark.parametrize("training", [False, True])
def test_row_of_padding_is_finite_and_reads_nothing(encoder: str, training: bool) -> None:
    model = make(encoder, dropout=0.0).train(training)
    ids = torch.randint(1, 30, (3, 6))
    mask = torch.tensor([[1] * 6, [0] * 6, [1, 1, 0, 0, 0, 0]])
    view = model(ids, mask)
    view.square().sum().backward()
    assert view.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    changed = ids.clone()
    changed[1] = 7
    torch.testing.assert_close(model(changed, mask)[1], model(ids, mask)[1])


def test_zero_length_batch_of_text_is_finite() -> None:
    for encoder in ("pooled", "transformer"):
        model = make(encoder)
        assert model(torch.zeros(2, 0, dtype=torch.long)).isfinite().all()


@ENCODERS
def test_pad_token_id_stands_in_for_the_mask(encoder: str) -> None:
    model = make(encoder, pad_token_id=0).eval()
    ids = torch.tensor([[3, 4, 0, 0], [5, 0, 0, 0]])
    torch.testing.assert_close(model(ids), model(ids, (ids != 0).long()))
    assert not torch.allclose(model(ids), make(encoder).eval()(ids))


@ENCODERS
def test_token_dropout_acts_in_training_only(encoder: str) -> None:
    model = make(encoder, token_dropout=0.5, dropout=0.0)
    ids = torch.randint(1, 30, (4, 12))
    first, second = model(ids), model(ids)
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    without = make(encoder, token_dropout=0.0, dropout=0.0)
    torch.testing.assert_close(without(ids), model(ids))


def test_dropped_tokens_are_left_out_of_the_mean_not_zeroed() -> None:
    """With one token type, dropping tokens must not change the mean; zeroing them would shrink it."""
    model = make("pooled", token_dropout=0.5, dropout=0.0)
    ids = torch.full((16, 10), 5)
    torch.testing.assert_close(model(ids), model.eval()(ids), rtol=1e-4, atol=1e-5)


def test_dropped_tokens_reach_no_other_token_through_attention() -> None:
    model = make("transformer", token_dropout=0.9, dropout=0.0)
    ids = torch.randint(1, 30, (1, 4))
    for seed in range(5):
        model.zero_grad()
        torch.manual_seed(seed)
        kept = drop_tokens(torch.ones_like(ids, dtype=torch.bool), 0.9)[0]
        torch.manual_seed(seed)
        model(ids).sum().backward()
        grad = model.token_embedding.weight.grad
        assert grad is not None
        touched = {int(token) for token in grad.abs().sum(1).nonzero()}
        assert touched == {int(token) for token in ids[0][kept]}


def test_drop_tokens_rate_and_survivor() -> None:
    torch.manual_seed(0)
    mask = torch.ones(400, 50, dtype=torch.bool)
    mask[:, 30:] = False
    kept = drop_tokens(mask, 0.3)
    assert not kept[:, 30:].any()
    assert kept[:, :30].float().mean().item() == pytest.approx(0.7, abs=0.02)
    nearly_all = drop_tokens(mask, 0.999)
    assert nearly_all.any(dim=1).all()
    counts = nearly_all[:, :30].sum(0)
    assert (counts > 0).sum() > 25  # the survivor is a random token, not always the first
    assert not drop_tokens(torch.zeros(2, 4, dtype=torch.bool), 0.5).any()


def test_transformer_reads_the_order_and_pooled_does_not() -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    pooled, transformer = make("pooled").eval(), make("transformer").eval()
    torch.testing.assert_close(pooled(ids), pooled(ids.flip(1)))
    assert not torch.allclose(transformer(ids), transformer(ids.flip(1)), atol=1e-4)


def test_errors_name_the_argument() -> None:
    model = make("transformer", max_positions=4)
    with pytest.raises(ValueError, match="input_ids: expected at most max_positions=4 tokens, got 5"):
        model(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 3\], got \[1, 2\]"):
        model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[any, any\], got \[3\]"):
        model(torch.ones(3, dtype=torch.long))


def test_pooled_text_has_no_length_limit() -> None:
    assert make("pooled", max_positions=4)(torch.ones(1, 9, dtype=torch.long)).shape == (1, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_embedding_is_the_mean_of_the_embeddings(dtype: torch.dtype) -> None:
    """Values and gradients against float64; at most twice the error of the plain form in the same dtype."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (5, 200), generator=generator)
    kept = torch.rand(5, 200, generator=generator) < 0.5
    kept[3] = False
    weight = torch.randn(40, 16, generator=generator).to(dtype)
    upstream = torch.randn(5, 16, generator=generator).to(dtype)

    def run(plain: bool, as_dtype: torch.dtype) -> list[torch.Tensor]:
        own = weight.to(as_dtype).requires_grad_()
        mean = masked_mean(F.embedding(ids, own), kept) if plain else mean_embedding(ids, kept, own)
        mean.backward(upstream.to(as_dtype))
        assert own.grad is not None
        return [mean.detach(), own.grad]

    exact = run(True, torch.float64)
    for found, usual, right in zip(run(False, dtype), run(True, dtype), exact, strict=True):
        error, allowed = (found.double() - right).abs().max(), (usual.double() - right).abs().max()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * right.abs().max(), (error, allowed)
    assert torch.equal(run(False, dtype)[0][3], torch.zeros(16, dtype=dtype))
