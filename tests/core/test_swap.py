"""swap: the same parameters under the other class, there and back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import levi_fast
from levi_fast import reference


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = reference.LayerwiseEnsemble([6, 6], 3, 2, hidden_width=5, mix="learned")
        self.alias = self.head
        self.others = nn.ModuleList([reference.LayerwiseEnsemble([4], 0, 1, hidden_width=None)])


def test_swap_shares_parameters_and_undo_goes_back():
    model = Holder().eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    taps, view = torch.randn(2, 4, 6), torch.randn(4, 3)
    expected = model.head(taps, view).logits
    names = dict(model.named_parameters())
    assert levi_fast.swap(model) == 2 and levi_fast.swap(model) == 0
    assert type(model.head) is levi_fast.LayerwiseEnsemble and model.alias is model.head and not model.head.training
    assert all(p is names[name] for name, p in model.named_parameters())
    torch.testing.assert_close(model.head(taps, view).logits, expected)
    model.head(taps, view).logits.sum().backward()
    optimizer.step()
    moved = model.head(taps, view).logits
    assert not torch.equal(moved, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.head(taps, view).logits, moved)
    assert levi_fast.swap(model, undo=True) == 2 and type(model.head) is reference.LayerwiseEnsemble
    torch.testing.assert_close(model.head(taps, view).logits, moved)
    assert all(p is names[name] for name, p in model.named_parameters())


def test_an_ensemble_itself_cannot_be_swapped():
    with pytest.raises(ValueError, match="pass the module that holds it"):
        levi_fast.swap(reference.LayerwiseEnsemble([4], 0, 1))
