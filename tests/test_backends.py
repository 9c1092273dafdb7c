"""``cnnlstm_fast.backends``: the switch that forbids convolutions by transforms."""

from __future__ import annotations

import copy
import runpy

import pytest
import torch
from helpers import needs_extension
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block

pytestmark = needs_extension

CASES = {
    "winograd": (lambda: [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], (2, 64, 28, 28)),
    "fft": (lambda: [nn.Conv2d(32, 32, (21, 11), padding=(10, 5)), nn.Hardtanh(0, 20)], (1, 32, 81, 100)),
}
transforms = pytest.mark.parametrize("plan", CASES)


@pytest.fixture
def forbidden(monkeypatch):
    monkeypatch.setattr(cf.backends, "allow_transforms", False)


@transforms
@pytest.mark.parametrize("grad", [False, True])
def test_no_transform_is_chosen(plan, grad, monkeypatch):
    layers, shape = CASES[plan]
    model, x = cf.Sequential(*layers()), torch.rand(shape)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # set and taken back, whatever was remembered meanwhile
            monkeypatch.setattr(cf.backends, "allow_transforms", True)
            assert cf.explain(model, x).stages[1].plan == plan
            monkeypatch.setattr(cf.backends, "allow_transforms", False)
            stage = cf.explain(model, x).stages[1]
            assert stage.plan not in CASES and "allow_transforms is False" in stage.reason


@transforms
def test_one_that_is_asked_for_is_refused(plan, forbidden):
    layers, shape = CASES[plan]
    conv = layers()[0]
    with pytest.raises(ValueError, match=r"cannot run here: .*allow_transforms is False"):
        conv_block(torch.rand(shape), conv.weight, conv.bias, padding=conv.padding, plan=plan)


@transforms
def test_an_accelerated_model_obeys_at_once(plan, monkeypatch):
    """After many calls, when it has learnt how its blocks run."""
    layers, shape = CASES[plan]
    plain = nn.Sequential(*layers()).eval()
    fast, x = cf.accelerate(copy.deepcopy(plain)), torch.rand(shape)
    ran = []
    with torch.no_grad():
        for allowed in (True, False, True):
            monkeypatch.setattr(cf.backends, "allow_transforms", allowed)
            for _ in range(3):
                result = fast(x)
            ran.append(result)
        torch.testing.assert_close(ran[1], plain(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(ran[0], ran[2]) and not torch.equal(ran[0], ran[1])


def test_the_environment_sets_the_default(monkeypatch):
    """The module is run anew: what it holds in this process is not changed."""
    for value, expected in ((None, True), ("1", True), ("0", False)):
        if value is None:
            monkeypatch.delenv("CNNLSTM_FAST_ALLOW_TRANSFORMS", raising=False)
        else:
            monkeypatch.setenv("CNNLSTM_FAST_ALLOW_TRANSFORMS", value)
        assert runpy.run_path(cf.backends.__file__)["allow_transforms"] is expected
