"""``cf.freeze`` on models of the field: results at the sizes of freezing and at others, in pieces too."""

from __future__ import annotations

import copy

import pytest
import torch
from field_models import FIELD, freshen, more_inputs
from helpers import assert_close_as_torch, needs_extension
from public_models import PUBLIC
from torch import nn

import cnnlstm_fast as cf

pytestmark = needs_extension

#: Models whose program depends on values, or is of Python's own: frozen in pieces.
IN_PIECES = {"speech", "masked_speech"}


def to_double(inputs):
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


def ways_of(model: nn.Module, inputs) -> list[torch.Tensor]:
    """PyTorch's results, and those for inputs one rounding off: small models amplify a rounding by luck."""
    ways = [model(*inputs)]
    for _ in range(8):
        nudged = inputs[0].double() * (1 + 6e-8 * torch.randn_like(inputs[0], dtype=torch.float64))
        ways.append(model(nudged.to(inputs[0].dtype), *inputs[1:]))
    return ways


def inputs_of(kind, shape):
    x = torch.randn(shape)
    return (x, *more_inputs(kind, x))


@pytest.mark.first
@pytest.mark.some(2)
@pytest.mark.parametrize("name", [*FIELD, *PUBLIC])
@torch.no_grad()
def test_models_of_the_field(name):
    kind, options = FIELD[name] if name in FIELD else (PUBLIC[name], {})
    model = freshen(kind(**kind.small, **options)).eval()
    before = copy.deepcopy(model.state_dict())
    frozen = cf.freeze(model, *inputs_of(kind, kind.inputs[0]))
    assert frozen.state_dict().keys() == before.keys()
    for shape in kind.inputs:
        for batch in (shape[0], 1, shape[0] + 2):
            inputs = inputs_of(kind, (batch, *shape[1:]))
            try:
                expected = model(*inputs)
            except RuntimeError:  # a size that the model does not take
                with pytest.raises((RuntimeError, ValueError)):
                    frozen(*inputs)
                continue
            got = frozen(*inputs)
            assert got.stride() == expected.stride() or 1 in got.shape
            true = copy.deepcopy(model).double()(*to_double(inputs))
            assert_close_as_torch(got, ways_of(model, inputs), true, f"{name}, {shape}, batch {batch}")
            assert torch.equal(got, frozen(*inputs))
    assert bool(frozen._versions) != (name in IN_PIECES), frozen.why_not
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.some(3)
@pytest.mark.parametrize("kind", ["Simple", "1DConv", "TimeDistributed"])
@pytest.mark.parametrize("whose", [cf, cf.reference])
@torch.no_grad()
def test_the_three_systems(kind, whose):
    model = getattr(whose, f"CNN_LSTM_{kind}")(
        2, 11, 2, 5, **({"image_size": (8, 6)} if "Time" in kind else {})
    )
    model.eval()
    frames = kind == "TimeDistributed"
    example = torch.randn(1, 3, 2, 8, 6) if frames else torch.randn(1, 2, 8, 6)
    frozen = cf.freeze(model, example)
    assert len(frozen._versions) == 1, frozen.why_not
    shapes = [(4, 3), (1, 1), (2, 9)] if frames else [(4,), (1,), (7,)]
    for lead in shapes:
        for size in [(8, 6)] if frames else [(8, 6), (11, 5), (2, 30)]:
            x = torch.randn(*lead, 2, *size)
            true = copy.deepcopy(model).double()(x.double())
            assert_close_as_torch(frozen(x), ways_of(model, (x,)), true, str(x.shape))
    assert len(frozen._versions) == 1
