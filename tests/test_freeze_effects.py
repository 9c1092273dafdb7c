"""``cf.freeze``: what models do but compute: write to inputs, hand them back, draw random numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from helpers import needs_extension
from torch import Tensor, nn

import cnnlstm_fast as cf

pytestmark = needs_extension


class Of(nn.Module):
    """A convolution that a function may use."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.function = function

    def forward(self, *args):
        return self.function(self.conv, *args)


def given(strides: str) -> Tensor:
    """An input (3, 4, 5) that lies in memory as ``strides`` says."""
    return {
        "contiguous": lambda: torch.randn(3, 4, 5),
        "transposed": lambda: torch.randn(3, 5, 4).transpose(1, 2),
        "with gaps": lambda: torch.randn(3, 4, 10)[..., ::2],
        "expanded": lambda: torch.randn(1, 4, 5).expand(3, 4, 5),
    }[strides]()


def memory(x: Tensor, results) -> list[tuple[int, int, tuple[int, ...]]]:
    """Which of the input and the results each result is first, whose memory it has, and its strides."""
    tensors = [x, *(leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor))]
    places = [t.untyped_storage().data_ptr() for t in tensors]
    return [
        (next(i for i, other in enumerate(tensors) if other is t), places.index(place), t.stride())
        for t, place in zip(tensors, places, strict=True)
    ]


RETURNS = {
    "the input": lambda conv, x: {"y": conv(x), "a": x},
    "parts of it": lambda conv, x: (x[:1], *x.split(2), x.transpose(0, 1)),
    "a copy of a part": lambda conv, x: (conv(x), x.split(2)[0].clone(), x.unbind(0)[1].clone()),
    "two copies": lambda conv, x: ((y := conv(x)).clone(), y.clone()),
    "itself and a copy": lambda conv, x: ((y := conv(x)), y.clone()),
    "itself twice": lambda conv, x: ((y := conv(x) + 1), y, y.flatten(1)),
    "no dropout": lambda conv, x: (F.dropout(x, 0.5, False), F.dropout(y := conv(x), 0.5, False), y),
    "a copy of its order": lambda conv, x: (conv(x).contiguous(), x.contiguous(), x.reshape(-1)),
    "nothing": lambda conv, x: None,
}


@torch.no_grad()
@pytest.mark.some(12)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "with gaps", "expanded"])
@pytest.mark.parametrize("name", RETURNS)
def test_results_lie_in_memory_as_the_models(name, strides):
    model = Of(RETURNS[name]).eval()
    frozen = cf.freeze(model, torch.randn(2, 4, 6))
    x = given(strides)
    for _ in range(2):
        expected, got = model(x), frozen(x)
        assert memory(x, got) == memory(x, expected)
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
            assert a is b is None or torch.allclose(a, b, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("what", ["a parameter", "a part of one", "a constant"])
def test_a_caller_may_write_to_results_that_are_constants(what):
    of = {
        "a parameter": lambda conv: conv.bias, "a part of one": lambda conv: conv.weight[:1],
        "a constant": lambda conv: torch.arange(3),
    }[what]  # fmt: skip
    model = Of(lambda conv, x: (conv(x), of(conv))).eval()
    frozen = cf.freeze(model, torch.randn(2, 4, 6))
    x = torch.randn(3, 4, 5)
    assert len(frozen._versions) == 1
    expected = [t.clone() for t in model(x)]
    frozen(x)[1].zero_()
    for a, b in zip(frozen(x), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


WRITES = {
    "first": lambda conv, x: conv(x.neg_()),
    "to a part": lambda conv, x: (x[:, :2].add_(1), conv(x))[1],
    "last": lambda conv, x: (conv(x), x.mul_(2))[0],
    "and raises": lambda conv, x: conv(x.neg_().unsqueeze(0)),
    "at one size": lambda conv, x: conv(x.neg_()) if x.shape[0] == 1 else conv(x),
    "and branches": lambda conv, x: conv(x.add_(1)) if conv(x).sum() > -1e9 else x,
}


@torch.no_grad()
@pytest.mark.some(6)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "with gaps"])
@pytest.mark.parametrize("name", WRITES)
def test_inputs_are_written_to_once(name, strides):
    """By a call as the model writes to them, and by nothing else: not while it is frozen, nor tried."""
    model = Of(WRITES[name]).eval()
    example = torch.randn(2, 4, 6)
    kept = example.clone()
    if name == "and raises":
        with pytest.raises(RuntimeError):
            cf.freeze(model, example)
        frozen = cf.freeze(model, example[0])
    else:
        frozen = cf.freeze(model, example)
    assert torch.equal(example, kept)
    for x in (given(strides), given(strides), given(strides)[:1]):
        before, theirs = x.clone(), x.clone()
        try:
            expected = model(theirs)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                frozen(x)
        else:
            assert torch.allclose(frozen(x), expected, atol=1e-5)
        assert torch.equal(x, theirs) and torch.equal(x, before) == (name == "at one size" and len(x) == 3)


@torch.no_grad()
def test_another_input_is_not_written_to_while_sizes_are_tried():
    model = Of(lambda conv, x, sums: conv(x) + sums.add_(1)).eval()
    sums = torch.zeros(2, 1, 1)
    cf.freeze(model, torch.randn(1, 4, 6), sums)
    assert not sums.any()


@torch.no_grad()
def test_a_dict_among_the_arguments_is_written_to():
    def function(conv, batch):
        batch["features"] = conv(batch["x"])
        return batch["features"].sum()

    model = Of(function).eval()
    example = {"x": torch.randn(2, 4, 6)}
    frozen = cf.freeze(model, example)
    assert list(example) == ["x"]
    batch = {"x": torch.randn(3, 4, 5)}
    expected = model(dict(batch))
    assert torch.allclose(frozen(batch), expected, atol=1e-5) and list(batch) == ["x", "features"]


@torch.no_grad()
def test_branches_on_strides():
    model = Of(lambda conv, x: conv(x) if x.is_contiguous() else -conv(x)).eval()
    frozen = cf.freeze(model, torch.randn(2, 4, 6))
    for strides in ("contiguous", "transposed", "with gaps"):
        x = given(strides)
        assert torch.allclose(frozen(x), model(x), atol=1e-5)


@torch.no_grad()
def test_random_numbers_are_the_models():
    """Those of a dropout that does not ask whether the model trains, at sizes seen for the first time too."""
    model = Of(lambda conv, x: F.dropout(conv(x), 0.5)).eval()
    torch.manual_seed(3)
    frozen = cf.freeze(model, torch.randn(1, 4, 6))
    for size in (6, 6, 7):
        x = torch.randn(1, 4, size)
        torch.manual_seed(4)
        expected = model(x)
        torch.manual_seed(4)
        assert torch.allclose(frozen(x), expected, atol=1e-5)
    training = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Dropout())
    frozen = cf.freeze(training, x)
    assert training.training and torch.allclose(frozen(x), training.eval()(x), atol=1e-5)


@torch.no_grad()
def test_a_program_of_larger_sizes_that_does_not_hold_for_the_example():
    """A batch of 1 is captured as one of 2, whose strides decide what 1 leaves open."""
    model = nn.Sequential(nn.Conv2d(4, 3, 3), nn.MaxPool2d(2)).eval()
    tagger = Of(lambda _, x: model(x).transpose(1, 2).flatten(2)).eval()
    frozen = cf.freeze(tagger, torch.randn(1, 4, 10, 6))
    for size in ((1, 4, 10, 6), (3, 4, 10, 6), (1, 4, 9, 12)):
        x = torch.randn(size)
        assert torch.allclose(frozen(x), tagger(x), atol=1e-5)
    assert frozen._versions, frozen.why_not
