"""``cf.accelerate`` on models of the field: results, gradients, and the blocks that it finds."""

import copy

import pytest
import torch
from accelerated import results, settle
from field_models import FIELD, freshen, more_inputs
from helpers import assert_close_as_torch
from public_models import PUBLIC
from torch import nn

import cnnlstm_fast as cf

pytestmark = pytest.mark.usefixtures("always_worth_it")


def to_double(inputs):
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


def decided_inputs(model: nn.Module, make, draws: int = 20):
    """Inputs and a gradient for which rounding changes no activation's side and no pool's winner.

    Elsewhere PyTorch's own ways send gradients to different places. Judged in float64 by nudging
    the input by a few float32 roundings.
    """
    twin = copy.deepcopy(model).double()
    for _ in range(draws):
        inputs = make()
        with torch.no_grad():
            grad = torch.randn_like(copy.deepcopy(model)(*inputs))
        true = results(copy.deepcopy(twin), to_double(inputs), grad)
        for _ in range(3):
            nudged = to_double(inputs)
            nudged = (nudged[0] * (1 + 4e-7 * torch.randn_like(nudged[0])), *nudged[1:])
            other = results(copy.deepcopy(twin), nudged, grad)
            if any((other[n] - t).norm() > 2e-4 * t.norm() + 1e-12 for n, t in true.items()):
                break
        else:
            return inputs, grad
    raise AssertionError("no inputs found that rounding leaves alone")


def assert_like_eager(fast: nn.Module, model: nn.Module, inputs, grad) -> None:
    """Output, gradients and what is left in the buffers, by the numbers rule; ``model`` is the eager twin.

    Small models amplify a rounding error or two by luck, so PyTorch's ways include inputs one rounding off.
    """
    ways = []
    for _ in range(8):
        nudged = inputs[0] * (1 + 6e-8 * torch.randn_like(inputs[0], dtype=torch.float64))
        twin = copy.deepcopy(model)
        ways.append(
            results(twin, (nudged.to(inputs[0].dtype), *inputs[1:]), grad) | dict(twin.named_buffers())
        )
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for onednn in (True, False):
            twin = copy.deepcopy(model)
            for m in twin.modules():
                if isinstance(m, nn.Conv2d):
                    m.to(memory_format=memory_format)
            with torch.backends.mkldnn.flags(enabled=onednn):
                try:
                    ways.append(results(twin, inputs, grad) | dict(twin.named_buffers()))
                except RuntimeError:  # a view of its own that channels_last does not allow
                    assert memory_format is torch.channels_last
    twin = copy.deepcopy(model).double()
    true = results(twin, to_double(inputs), grad) | dict(twin.named_buffers())
    mine = results(fast, inputs, grad) | dict(fast.named_buffers())
    assert mine.keys() == true.keys()
    for name, got in mine.items():
        if not true[name].is_floating_point():
            assert torch.equal(got, true[name]), name
        elif name.endswith("bias") and grad is not None and true[name].norm() < 1e-12 < grad.norm():
            # The gradient of a bias before a norm: zero, and what is found is the rounding of sums.
            rounding = max(way[name].norm() for way in ways)
            assert got.norm() <= 1e-5 * grad.norm() + 2 * rounding, name
        else:
            assert_close_as_torch(got, [way[name] for way in ways], true[name], name)


@pytest.mark.some(5)
@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", [*FIELD, *PUBLIC])
def test_field_models(name, mode):
    kind, options = FIELD[name] if name in FIELD else (PUBLIC[name], {})
    model = freshen(kind(**kind.small, **options)).train(mode == "train")
    for m in model.modules():
        if isinstance(m, (nn.Dropout, nn.Dropout2d)):
            m.eval()
    fast = cf.accelerate(copy.deepcopy(model))
    state = copy.deepcopy(fast.state_dict())
    for shape in kind.inputs:

        def make(shape=shape):
            x = torch.randn(shape)
            return (x, *more_inputs(kind, x))

        inputs, grad = decided_inputs(model, make)
        for _ in range(2):
            results(fast, inputs, grad)
        fast.load_state_dict(state)
        assert_like_eager(fast, model, inputs, grad)
        fast.load_state_dict(state)
        with torch.no_grad():
            for _ in range(2):
                fast(*inputs)
            fast.load_state_dict(state)
            got = fast(*inputs)
            true = copy.deepcopy(model).double()(*to_double(inputs))
            assert_close_as_torch(got, [copy.deepcopy(model)(*inputs)], true, "without gradients")
        fast.load_state_dict(state)


#: Blocks that a call of each model runs, by (norm, activation, pool).
FOUND = {
    "crnn": [
        (None, "ReLU", "MaxPool2d"), (None, "ReLU", "MaxPool2d"), ("BatchNorm2d", "ReLU", None),
        (None, "ReLU", "MaxPool2d"), ("BatchNorm2d", "ReLU", None), (None, "ReLU", "MaxPool2d"),
        ("BatchNorm2d", "ReLU", None),
    ],
    "vgg_ocr": [("BatchNorm2d", "ReLU", "MaxPool2d")] * 4,
    "video": [("BatchNorm2d", "ReLU", None)] * 16,
    "speech": [("BatchNorm2d", "Hardtanh", None)] * 2,
    "masked_speech": [(None, None, None)] * 2,
    "atari": [(None, "ReLU", None)] * 3,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FIELD)
def test_what_is_found_in_field_models(name, mode, blocks):
    kind, options = FIELD[name]
    fast = cf.accelerate(kind(**kind.small, **options)).train(mode == "train")
    x = torch.randn(kind.inputs[0])
    inputs = (x, *more_inputs(kind, x))
    settle(fast, *inputs)
    blocks.clear()
    fast(*inputs)
    assert blocks == FOUND[name]
