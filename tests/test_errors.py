"""What a person can get wrong in functional.conv_block: what was got, what was expected, what to do."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import plans
from torch import nn

from cnnlstm_fast.functional import conv_block

r = torch.randn


def images(**change):
    return dict(x=r(2, 4, 9, 8), weight=r(6, 4, 3, 3), bias=r(6)) | change


def signals(**change):
    return dict(x=r(2, 4, 9), weight=r(6, 4, 3), bias=r(6)) | change


# name -> (arguments, exception, words that the message must hold: got, expected, mend)
WRONG = {
    "clips": (images(x=r(2, 10, 4, 9, 8)), ValueError, ["(2, 10, 4, 9, 8)", "N, C, H, W", "TimeDistributed"]),
    "a matrix": (images(x=r(9, 8)), ValueError, ["(9, 8)", "(N, C, H, W)"]),
    "an image for a signal weight": (signals(x=r(2, 4, 9, 8)), ValueError, ["(2, 4, 9, 8)", "(N, C, L)"]),
    "a conv3d's weight": (images(weight=r(6, 4, 3, 3, 3)), ValueError, ["(6, 4, 3, 3, 3)", "KH, KW"]),
    "a matrix as weight": (images(weight=r(6, 4)), ValueError, ["(6, 4)", "KH, KW"]),
    "channels last in shape": (images(x=r(2, 9, 8, 4)), ValueError, ["9 channels", "expects 4"]),
    "too many channels": (images(x=r(2, 5, 9, 8)), ValueError, ["5 channels", "expects 4"]),
    "unbatched of other channels": (images(x=r(5, 9, 8)), ValueError, ["5 channels", "expects 4"]),
    "channels for groups": (images(groups=2), ValueError, ["4 channels", "groups=2", "expects 8"]),
    "groups that divide not": (images(weight=r(6, 1, 3, 3), groups=4), ValueError, ["groups=4", "6 output"]),
    "groups of zero": (images(groups=0), ValueError, ["groups=0", "6 output"]),
    "groups of another type": (images(groups=1.0), (TypeError, ValueError), ["groups=1.0"]),
    "no output channels": (images(weight=r(0, 4, 3, 3), bias=r(0)), ValueError, ["(0, 4, 3, 3)"]),
    "an empty kernel": (images(weight=r(6, 4, 0, 3)), ValueError, ["(6, 4, 0, 3)"]),
    "bias of another length": (images(bias=r(5)), ValueError, ["(5,)", "(6,)"]),
    "bias of rank 2": (images(bias=r(6, 1)), ValueError, ["(6, 1)", "(6,)"]),
    "bias that is a flag": (images(bias=True), TypeError, ["bool", "bias"]),
    "an array": (images(x=[[1.0]]), TypeError, ["list", "tensor"]),
    "a module as weight": (images(weight=nn.Conv2d(4, 6, 3)), TypeError, ["Conv2d", "tensor"]),
    "a byte image": (images(x=torch.ones(2, 4, 9, 8, dtype=torch.uint8)), (TypeError, ValueError),
                     ["uint8", "float32"]),
    "double input": (images(x=r(2, 4, 9, 8).double()), (TypeError, ValueError), ["float64", "float32"]),
    "double bias": (images(bias=r(6).double()), (TypeError, ValueError), ["float64", "float32"]),
    "a small image": (images(x=r(2, 4, 2, 8)), ValueError, ["2x8", "3x3", "larger input"]),
    "a small signal": (signals(x=r(2, 4, 2)), ValueError, ["2", "3", "larger input"]),
    "a small image, dilated": (images(dilation=5), ValueError, ["9x8", "3x3", "dilation"]),
    "an empty image": (images(x=r(2, 4, 0, 8), padding=3), ValueError, ["0x8"]),
    "a small map": (images(pool=nn.MaxPool2d(7)), ValueError, ["7x6", "7x7", "smaller pool"]),
    "a small dilated map": (images(pool=nn.MaxPool2d(3, dilation=4)), ValueError, ["7x6", "smaller pool"]),
    "stride of zero": (images(stride=0), ValueError, ["stride=0", "at least 1"]),
    "negative stride": (images(stride=(1, -1)), ValueError, ["stride=(1, -1)", "at least 1"]),
    "three strides": (images(stride=(1, 1, 1)), ValueError, ["stride=(1, 1, 1)", "2 ints"]),
    "two strides for a signal": (signals(stride=(1, 1)), ValueError, ["stride=(1, 1)", "1 int"]),
    "no strides": (images(stride=()), ValueError, ["stride=()", "2 ints"]),
    "a fractional stride": (images(stride=1.5), (TypeError, ValueError), ["stride=1.5", "int"]),
    "fractional strides": (images(stride=(1, 1.5)), (TypeError, ValueError), ["stride=(1, 1.5)", "int"]),
    "a stride in words": (images(stride="2"), (TypeError, ValueError), ["stride='2'", "int"]),
    "stride of None": (images(stride=None), (TypeError, ValueError), ["stride=None", "int"]),
    "negative padding": (images(padding=-1), ValueError, ["padding=-1", "at least 0"]),
    "padding by a wrong word": (images(padding="full"), ValueError, ["padding='full'", "'same' or 'valid'"]),
    "same padding with a stride": (images(padding="same", stride=2), ValueError, ["same", "stride"]),
    "dilation of zero": (images(dilation=0), ValueError, ["dilation=0", "at least 1"]),
    "an unknown activation": (images(activation="rellu"), ValueError, ["'rellu'", "torch.nn.functional"]),
    "a name that is no activation": (images(activation="conv2d"), ValueError, ["'conv2d'"]),
    "a module's name": (images(activation="ReLU"), ValueError, ["'ReLU'"]),
    "a function": (images(activation=torch.relu), TypeError, ["activation", "nn module"]),
    "an activation's class": (images(activation=nn.ReLU), TypeError, ["activation", "nn module"]),
    "a list of activations": (images(activation=["relu"]), TypeError, ["['relu']", "nn module"]),
    "a number as pool": (images(pool=2), TypeError, ["2", "nn pooling module"]),
    "a pool's class": (images(pool=nn.MaxPool2d), TypeError, ["MaxPool2d", "nn pooling module"]),
    "a signal's pool on images": (images(pool=nn.MaxPool1d(2)), ValueError, ["MaxPool1d", "MaxPool2d"]),
    "pool padding over half": (images(pool=nn.MaxPool2d(2, padding=2)), ValueError, ["padding of 2", "half"]),
    "pool stride of zero": (images(pool=nn.MaxPool2d(2, 0)), ValueError, ["stride=0", "at least 1"]),
    "pool kernel of zero": (images(pool=nn.MaxPool2d(0)), ValueError, ["kernel_size=0", "at least 1"]),
    "a pool that gives indices": (images(pool=nn.MaxPool2d(2, return_indices=True)), ValueError,
                                  ["return_indices"]),
    "a name as norm": (images(norm="batch"), TypeError, ["'batch'", "BatchNorm"]),
    "a norm of other channels": (images(norm=nn.BatchNorm2d(5)), ValueError, ["5", "6"]),
    "an unknown layout": (images(layout="nhwc"), ValueError, ["'nhwc'", "channels_last", "rows_time_major"]),
    "no layout": (images(layout=None), (TypeError, ValueError), ["None", "channels_last"]),
    "an unknown plan": (images(plan="fast"), ValueError, ["'fast'", "auto", "direct", "chunked", "fft"]),
    "no plan": (images(plan=None), (TypeError, ValueError), ["None", "auto"]),
}  # fmt: skip


@pytest.mark.parametrize("plan", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, plan):
    arguments, error, words = WRONG[name]
    arguments = {"plan": plan} | arguments
    with pytest.raises(Exception) as caught:
        conv_block(arguments.pop("x"), arguments.pop("weight"), **arguments)
    message = str(caught.value)
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing, f"no word of {missing} in: {message}"


#: Wrong calls for which PyTorch has no counterpart: names of our own, or classes where it wants modules.
OURS = {
    "an unknown activation", "a name that is no activation", "a module's name", "a function",
    "an activation's class", "a pool's class", "a pool that gives indices", "an unknown layout", "no layout",
    "an unknown plan", "no plan",
}  # fmt: skip


def plain(
    x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, norm=None, activation="relu", pool=None
):
    """The block as PyTorch's own calls."""
    conv = F.conv1d if getattr(weight, "ndim", 4) == 3 else F.conv2d
    y = conv(x, weight, bias, stride, padding, dilation, groups)
    y = y if norm is None else norm(y)
    y = activation(y) if callable(activation) or isinstance(activation, list) else getattr(F, activation)(y)
    return y if pool is None else pool(y)


@pytest.mark.parametrize("name", sorted(WRONG.keys() - OURS))
def test_the_error_is_pytorchs_too(name):
    """Code that catches what PyTorch raises for a wrong call catches ours."""
    arguments = WRONG[name][0]
    with pytest.raises(Exception) as theirs:
        plain(**arguments)
    with pytest.raises((ValueError, TypeError)) as ours:
        conv_block(**arguments)
    assert isinstance(ours.value, theirs.type), f"{ours.typename} is no {theirs.typename}"


# ------------------------------------------------------------- plans that cannot run

REFUSED = {
    "float64": (dict(x=r(2, 4, 9, 8).double(), weight=r(6, 4, 3, 3).double()), "float64"),
    "float16": (dict(x=r(2, 4, 9, 8).half(), weight=r(6, 4, 3, 3).half()), "float16"),
    "an activation": (images(activation="softsign"), "softsign"),
    "an activation module": (images(activation=nn.Softsign()), "Softsign"),
    "a parametric activation": (images(activation=nn.PReLU()), "PReLU"),
    "a pool": (images(pool=nn.LPPool2d(2, 2)), "LPPool2d"),
    "a norm": (images(norm=nn.InstanceNorm2d(6)), "InstanceNorm2d"),
    "a norm of another rank": (images(norm=nn.SyncBatchNorm(6).eval()), "SyncBatchNorm"),
    "a large window": (images(x=r(2, 4, 30, 30), pool=nn.MaxPool2d(17)), "window of 289 elements"),
}


@pytest.mark.parametrize("plan", ["direct", "chunked", "fft"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_cannot_run_says_why(name, plan):
    """And how to go on; automatically chosen, the same call runs."""
    arguments, reason = REFUSED[name]
    sentence = f'plan="{plan}" cannot run here: .*{re.escape(reason)}.*plan="auto"'
    with pytest.raises(ValueError, match=sentence):
        conv_block(**arguments, plan=plan)
    assert conv_block(**arguments).shape == conv_block(**arguments, plan="reference").shape


@plans
def test_a_refused_call_changes_nothing(plan):
    """After an error the next call is right."""
    with pytest.raises(ValueError):
        conv_block(r(2, 5, 9, 8), r(6, 4, 3, 3), plan=plan)
    x, weight = r(2, 4, 9, 8), r(6, 4, 3, 3)
    torch.testing.assert_close(conv_block(x, weight, plan=plan), conv_block(x, weight, plan="reference"))
