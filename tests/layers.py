"""What the tests of cf.LSTM and cf.GRU share: a layer beside its plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

import cnnlstm_fast as cf

both = [(kind, more) for kind in ("LSTM", "GRU") for more in ({}, {"bidirectional": True, "num_layers": 2})]
layers = pytest.mark.parametrize("kind, more", [*both, ("LSTM", {"proj_size": 3})])


def pair(kind: str, inputs: int = 5, hidden: int = 7, **more):
    """A fast layer and its plain twin of the same weights."""
    twin = getattr(nn, kind)(inputs, hidden, **more)
    ours = getattr(cf, kind)(inputs, hidden, **more)
    ours.load_state_dict(twin.state_dict())
    return ours, twin


def assert_same(got, expected, tolerance: float = 1e-5) -> None:
    """Results of layers, nested or packed, and their dtypes and shapes."""
    if isinstance(expected, rnn.PackedSequence):
        assert isinstance(got, rnn.PackedSequence)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            mine, theirs = getattr(got, name), getattr(expected, name)
            assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs)), name
        got, expected = got.data, expected.data
    if isinstance(expected, tuple):
        assert type(got) is tuple and len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert_same(g, e, tolerance)
    else:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


r = torch.randn
