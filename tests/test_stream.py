"""Streams of cf.LSTM and cf.GRU: step by step, as the whole sequence."""

from __future__ import annotations

import pytest
import torch
from helpers import needs_extension
from layers import assert_same, pair, r
from sequences import kinds

import cnnlstm_fast as cf


def stream_layers():
    for kind in ("LSTM", "GRU"):
        for more in ({}, {"num_layers": 3}, {"bias": False}, {"batch_first": True, "num_layers": 2}):
            yield kind, more
    yield "LSTM", {"proj_size": 3, "num_layers": 2}


@pytest.mark.parametrize("kind, more", stream_layers())
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=needs_extension), torch.float64, torch.bfloat16]
)
@pytest.mark.parametrize("inputs, hidden, batch", [(5, 7, 1), (17, 40, 3), (9, 16, 66)])
def test_step_by_step_equals_the_whole_sequence(kind, more, dtype, inputs, hidden, batch):
    layer = getattr(cf, kind)(inputs, hidden, dtype=dtype, **more)
    x = r(7, batch, inputs).to(dtype)
    reset = torch.rand(7, batch) < 0.2
    rows = more.get("num_layers", 1)
    hx = tuple(r(rows, batch, w).to(dtype) for w in (more.get("proj_size", hidden), hidden))
    hx = hx if kind == "LSTM" else hx[1]
    with torch.no_grad():
        whole, last = (
            layer(x.transpose(0, 1), hx, reset=reset.T) if layer.batch_first else layer(x, hx, reset=reset)
        )
    whole = whole.transpose(0, 1) if layer.batch_first else whole
    stream = layer.stream(batch, hx)
    steps = torch.stack([stream(xt, reset=rt) for xt, rt in zip(x, reset, strict=True)])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6  # bfloat16 rounds the state between calls
    assert_same((steps, stream.state), (whole, last), tolerance)


@needs_extension
@kinds
def test_large_streams_on_threads(kind):
    layer = getattr(cf, kind)(33, 520)
    x = r(4, 1, 33)
    with torch.no_grad():
        whole, last = layer(x)
    stream = layer.stream()
    assert_same((torch.stack([stream(xt) for xt in x]), stream.state), (whole, last), 1e-6)


@kinds
def test_streams_keep_to_themselves(kind):
    layer, _ = pair(kind, num_layers=2)
    one, other = layer.stream(2), layer.stream(2)
    x = r(4, 2, 5)
    first = [one(xt) for xt in x]
    kept = [y.clone() for y in first]
    state = one.state
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert_same(tuple(other(xt) for xt in x), tuple(first), 0)  # the weights of when it was made
    one.start()
    assert_same(tuple(one(xt) for xt in x), tuple(kept), 0)  # anew
    assert_same(tuple(first), tuple(kept), 0)
    one.start(state)
    assert_same(one.state, state, 0)
    assert not first[0].requires_grad


def test_stream_errors():
    layer, _ = pair("LSTM")
    with pytest.raises(ValueError, match="bidirectional LSTM cannot stream"):
        cf.LSTM(5, 7, bidirectional=True).stream()
    with pytest.raises(ValueError, match="batch=0"):
        layer.stream(0)
    with pytest.raises(ValueError, match=r"c_0 of shape \(1, 2, 6\)"):
        layer.stream(2, (r(1, 2, 7), r(1, 2, 6)))
    with pytest.raises(TypeError, match="pair"):
        layer.stream(2, r(1, 2, 7))
    stream = layer.stream(2)
    with pytest.raises(ValueError, match=r"\(2, 6\), expected \(2, 5\)"):
        stream(r(2, 6))
    with pytest.raises(TypeError, match="float64"):
        stream(r(2, 5).double())
    with pytest.raises(ValueError, match=r"reset of shape \(3,\)"):
        stream(r(2, 5), reset=torch.zeros(3, dtype=torch.bool))
