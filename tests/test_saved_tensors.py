"""What may change in place between a block's forward and its backward: whatever PyTorch's own lets change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_extension, plans
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block

pytestmark = needs_extension

ACTIVATIONS = {
    "none": None,
    "ReLU": nn.ReLU(),
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "Hardtanh": nn.Hardtanh(),
}


def gradients(run, tensors, norm, needs, changed):
    """The gradients that ``needs`` names, or the error, where ``changed`` changes behind the forward."""
    moved, leaves = {}, {}
    for name, t in tensors.items():
        leaves[name] = t.clone().requires_grad_(name in needs)
        moved[name] = leaves[name] * 1
    norm = copy.deepcopy(norm)
    if norm is not None:
        norm.requires_grad_("norm" in needs)
    out = run(*moved.values(), norm)
    with torch.no_grad():
        moved[changed].add_(1)
    try:
        out.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return [t.grad for t in (*leaves.values(), *(() if norm is None else norm.parameters()))]


@plans
@pytest.mark.parametrize("normed", [None, "eval", "train"])
def test_gradients_enabled_in_inference_mode(normed, plan):
    """Autograd records nothing there, so nothing is saved: inference tensors could not be."""
    norm = None if normed is None else nn.BatchNorm2d(6).train(normed == "train")
    weight, bias = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(6))
    model = cf.accelerate(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2)))
    lstm = cf.LSTM(4, 3)
    with torch.inference_mode(), torch.enable_grad():
        x = torch.randn(2, 3, 8, 6) * 1
        got = conv_block(x, weight, bias, norm=copy.deepcopy(norm), activation="silu", plan=plan)
        y = F.conv2d(x, weight, bias)
        expected = F.silu(y if norm is None else norm(y))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert got.requires_grad == expected.requires_grad
        for _ in range(3):
            assert not model(x).requires_grad
        assert not lstm(torch.randn(5, 2, 4))[0].requires_grad


@plans
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2)], ids=["no pool", "pool"])
@pytest.mark.parametrize("normed", ["no norm", "eval", "train"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "needs", ["x", "weight", "bias", "norm", "x norm", "weight bias", "x weight bias norm"]
)
def test_what_changes_before_the_backward(needs, activation, normed, pool, plan):
    norm = None if normed == "no norm" else nn.BatchNorm2d(6).train(normed == "train")
    needs = [name for name in needs.split() if norm is not None or name != "norm"]
    act = ACTIVATIONS[activation]
    if not needs:
        return

    def eager(x, weight, bias, norm):
        y = F.conv2d(x, weight, bias, padding=1)
        for step in (norm, act, pool):
            y = y if step is None else step(y)
        return y

    def ours(x, weight, bias, norm):
        return conv_block(x, weight, bias, padding=1, norm=norm, activation=act, pool=pool, plan=plan)

    tensors = {"x": torch.randn(2, 3, 8, 6), "weight": torch.randn(6, 3, 3, 3), "bias": torch.randn(6)}
    for changed in tensors:
        expected = gradients(eager, tensors, norm, needs, changed)
        found = gradients(ours, tensors, norm, needs, changed)
        if isinstance(expected, str):
            continue  # what PyTorch refuses may work
        assert not isinstance(found, str), f"{changed}: {found}"
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-4, msg=lambda m, c=changed: f"{c}: {m}"
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hooks_on_saved_tensors_free_the_input(activation):
    """Where hooks keep something else, as checkpoints do, a block holds its input by no other way."""
    conv = nn.Conv2d(3, 6, 3)
    x = torch.randn(2, 3, 8, 6, requires_grad=True) * 1
    alive = weakref.ref(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = conv_block(x, conv.weight, conv.bias, activation=ACTIVATIONS[activation], plan="direct")
    del x
    gc.collect()
    assert alive() is None
    y.sum().backward()
