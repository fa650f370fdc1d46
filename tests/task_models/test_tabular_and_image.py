"""Tabular and image models: unknown categories, sizes, batch independence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from levi_fast.task_models import ImageTaskModel, TableTaskModel, TabularTaskModel


def test_unknown_category_starts_neutral_and_can_be_learned() -> None:
    model = TabularTaskModel(1, [5], view_width=4, dropout=0.0)
    embedding = model.embeddings[0]
    assert isinstance(embedding, nn.Embedding)
    assert not embedding.weight[0].any()
    assert embedding.weight[1].any()
    model(numeric=torch.ones(2, 1), categorical=torch.tensor([[0], [0]])).sum().backward()
    assert embedding.weight.grad is not None and embedding.weight.grad[0].any()


def test_index_beyond_the_cardinality_raises() -> None:
    model = TabularTaskModel(0, [3, 5], view_width=4)
    with pytest.raises(IndexError):
        model(categorical=torch.tensor([[3, 0]]))


def test_absent_kinds_may_be_left_out_and_needed_ones_not() -> None:
    assert TabularTaskModel(2, view_width=4)(numeric=torch.zeros(3, 2)).shape == (3, 4)
    assert TabularTaskModel(0, [2], view_width=4)(categorical=torch.zeros(3, 1).long()).shape == (3, 4)
    with pytest.raises(ValueError, match=r"numeric: expected a tensor of shape \[any, 2\], got None"):
        TabularTaskModel(2, view_width=4)()
    with pytest.raises(ValueError, match=r"categorical: expected shape \[any, 1\], got \[3, 2\]"):
        TabularTaskModel(0, [2], view_width=4)(categorical=torch.zeros(3, 2).long())


def test_table_concatenates_its_parts_views() -> None:
    model = TableTaskModel({"vocab_size": 9, "view_width": 3}, {"num_numeric": 2, "view_width": 5}).eval()
    ids, numeric = torch.randint(0, 9, (4, 6)), torch.randn(4, 2)
    view = model(input_ids=ids, numeric=numeric)
    assert model.view_width == 8 and model.text is not None and model.tabular is not None
    assert torch.equal(view[:, :3], model.text(ids))
    assert torch.equal(view[:, 3:], model.tabular(numeric))
    with pytest.raises(ValueError, match="input_ids: expected a tensor"):
        model(numeric=numeric)


@pytest.mark.parametrize("size", [(8, 8), (8, 31), (64, 64), (65, 200), (224, 224)])
def test_image_sizes(size: tuple[int, int]) -> None:
    view = ImageTaskModel(widths=[8, 8], view_width=4)(torch.randn(2, 3, *size))
    assert view.shape == (2, 4) and view.isfinite().all()


def test_large_images_are_averaged_down() -> None:
    torch.manual_seed(0)
    model = ImageTaskModel(widths=[8, 8], view_width=4, max_size=16).eval()
    small = torch.randn(2, 3, 16, 12)
    large = small.repeat_interleave(4, dim=2)
    torch.testing.assert_close(model(large), model(small))


def test_image_errors() -> None:
    model = ImageTaskModel(widths=[8], view_width=4)
    with pytest.raises(ValueError, match="pixel_values: expected both sides >= 8, got 7 x 20"):
        model(torch.zeros(1, 3, 7, 20))
    with pytest.raises(ValueError, match=r"pixel_values: expected shape \[any, 3, any, any\], got \[1, 1, 8, 8\]"):
        model(torch.zeros(1, 1, 8, 8))


def test_image_model_holds_no_batch_statistics() -> None:
    model = ImageTaskModel(widths=[8, 16], view_width=4)
    assert not list(model.buffers())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
