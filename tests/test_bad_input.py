"""Wrong calls of everything public: each says what was got, what was expected and what to do.

Those of ``functional.conv_block`` alone stand in test_errors.py; those of the ops themselves, which no
person calls, in test_wrong_calls.py and in the fuzzer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from typer.testing import CliRunner

import cnnlstm_fast as cf
from cnnlstm_fast.cli import app

r = torch.randn
SHAPE = (ValueError, RuntimeError)


def parameters(kind="LSTM", inputs=5, hidden=7, **options):
    return list(getattr(nn, kind)(inputs, hidden, **options).parameters())


def lstm(x=None, hx=None, params=None, **options):
    return lambda: cf.functional.lstm(
        r(6, 3, 5) if x is None else x, hx, parameters() if params is None else params, **options
    )


def gru(x=None, hx=None, params=None, **options):
    return lambda: cf.functional.gru(
        r(6, 3, 5) if x is None else x, hx, parameters("GRU") if params is None else params, **options
    )


def layer(*args, kind="LSTM", call=(), **options):
    return lambda: getattr(cf, kind)(5, 7, **options)(*args, **dict(call))


def chain(x, *modules):
    return lambda: cf.Sequential(*modules)(x)


def frames(x, module, **options):
    return lambda: cf.TimeDistributed(module, **options)(x)


def without(model, key):
    state = model.state_dict()
    del state[key]
    return lambda: model.load_state_dict(state)


def with_value(model, key, value):
    return lambda: model.load_state_dict(model.state_dict() | {key: value})


CONV = (3, 4, 3)
SYSTEMS = {
    "simple": lambda **k: cf.CNN_LSTM_Simple(3, 8, 1, 10, **k),
    "1d": lambda **k: cf.CNN_LSTM_1DConv(3, 8, 1, 10, **k),
    "distributed": lambda **k: cf.CNN_LSTM_TimeDistributed(3, 8, 1, 10, image_size=(8, 8), **k),
}
PACKED = pack_padded_sequence(r(6, 3, 5), torch.tensor([6, 2, 1]))

# name -> (the call, exceptions, words that the message must hold: got, expected, mend)
WRONG = {
    # functional.lstm and functional.gru
    "lstm: an image": (lstm(r(2, 3, 8, 8)), ValueError, ["(2, 3, 8, 8)", "(T, B, I)", "flatten"]),
    "lstm: a vector": (lstm(r(5)), ValueError, ["(5,)", "(T, B, I)"]),
    "lstm: a list": (lstm([[1.0]]), TypeError, ["list", "tensor"]),
    "lstm: other features": (lstm(r(6, 3, 12544)), ValueError, ["5 features", "12544", "input_size=12544"]),
    "lstm: no steps": (lstm(r(0, 3, 5)), ValueError, ["(0, 3, 5)", "at least one step"]),
    "lstm: double input": (lstm(r(6, 3, 5).double()), TypeError, ["float64", "float32", ".to("]),
    "lstm: whole numbers": (lstm(torch.ones(6, 3, 5, dtype=torch.int64)), TypeError, ["int64", "float32"]),
    "lstm: one state": (lstm(hx=r(1, 3, 7)), TypeError, ["pair", "(h_0, c_0)", "(1, 3, 7)"]),
    "lstm: three states": (lstm(hx=(r(1, 3, 7),) * 3), TypeError, ["pair", "(h_0, c_0)"]),
    "lstm: states that are lists": (lstm(hx=([0.0], [0.0])), TypeError, ["tensor", "list"]),
    "lstm: batch-first states": (
        lstm(hx=(r(3, 1, 7),) * 2),
        ValueError,
        ["(3, 1, 7)", "(1, 3, 7)", "batch-first"],
    ),
    "lstm: states of other units": (lstm(hx=(r(1, 3, 8),) * 2), ValueError, ["(1, 3, 8)", "(1, 3, 7)"]),
    "lstm: one parameter missing": (lstm(params=parameters()[:3]), ValueError, ["3 parameters", "4", "w_hh"]),
    "lstm: one layer too many": (lstm(num_layers=2), ValueError, ["4 parameters", "8", "2 layers"]),
    "lstm: a GRU's parameters": (lstm(params=parameters("GRU")), ValueError, ["(21, 5)", "4 * hidden"]),
    "lstm: parameters in another order": (lstm(params=parameters()[::-1]), ValueError, ["(28,)"]),
    "lstm: a parameter of another shape": (
        lstm(params=[*parameters()[:3], r(27)]),
        ValueError,
        ["(27,)", "(28,)", "7 hidden units"],
    ),
    "lstm: a parameter of None": (lstm(params=[*parameters()[:3], None]), TypeError, ["NoneType", "tensor"]),
    "lstm: dropout over 1": (lstm(dropout=1.5), ValueError, ["1.5", "0 to 1"]),
    "lstm: negative dropout": (lstm(dropout=-0.1), ValueError, ["-0.1", "0 to 1"]),
    "lstm: a word for dropout": (lstm(dropout="a"), TypeError, ["str", "number"]),
    "lstm: no layers": (lstm(num_layers=0), ValueError, ["num_layers=0", "1 or more"]),
    "lstm: neither layers nor parameters": (lstm(params=[], num_layers=0), ValueError, ["num_layers=0"]),
    "lstm: fewer layers than none": (
        lstm(params=[], num_layers=-1),
        ValueError,
        ["num_layers=-1", "1 or more"],
    ),
    "lstm: half a layer": (lstm(num_layers=1.5), TypeError, ["float", "whole number"]),
    "lstm: a word for layers": (lstm(num_layers="1"), TypeError, ["str", "whole number"]),
    "lstm: a negative projection": (lstm(proj_size=-1), ValueError, ["proj_size=-1", "0 or more"]),
    "lstm: no features": (
        lstm(r(6, 3, 0), params=[r(28, 0), *parameters()[1:]]),
        ValueError,
        ["no features", "at least one"],
    ),
    "lstm: no hidden units": (
        lstm(params=[r(0, 5), r(0, 0), r(0), r(0)]),
        ValueError,
        ["(0, 5)", "4 * hidden"],
    ),
    "lstm: a generator of parameters": (
        lambda: cf.functional.lstm(r(6, 3, 5), None, nn.LSTM(5, 7).parameters()),
        TypeError,
        ["generator", "list of tensors"],
    ),
    "lstm: a tensor for parameters": (lstm(params=r(28, 5)), TypeError, ["(28, 5)", "list of tensors"]),
    "lstm: a state elsewhere": (
        lstm(hx=(r(1, 3, 7).to("meta"), r(1, 3, 7))),
        SHAPE,
        ["on cpu", "state is on meta", ".to("],
    ),
    "lstm: parameters elsewhere, with lengths": (
        lstm(params=[p.to("meta") for p in parameters()], lengths=[6, 2, 1]),
        SHAPE,
        ["on cpu", "parameters are on meta", ".to("],
    ),
    "gru: no layers": (gru(params=[], num_layers=0), ValueError, ["num_layers=0", "1 or more"]),
    "lstm: an unknown plan": (lstm(plan="direct"), ValueError, ["'direct'", "fused", "reference"]),
    "lstm: the library with resets": (
        lstm(plan="library", reset=torch.zeros(6, 3).bool()),
        ValueError,
        ["library", "reset", "auto"],
    ),
    "lstm: resets as numbers": (
        lstm(reset=torch.zeros(6, 3)),
        TypeError,
        ["float32", "bool", "reset.bool()"],
    ),
    "lstm: resets as a list": (lstm(reset=[[True]]), TypeError, ["list", "bool tensor"]),
    "lstm: resets transposed": (lstm(reset=torch.zeros(3, 6).bool()), ValueError, ["(3, 6)", "(6, 3)"]),
    "lstm: resets of one sequence": (lstm(reset=torch.zeros(6).bool()), ValueError, ["(6,)", "(6, 3)"]),
    "lstm: negative lengths": (lstm(lengths=[6, -1, 2]), ValueError, ["-1", "0 to 6", "clamp"]),
    "lstm: lengths over the steps": (lstm(lengths=[6, 7, 2]), ValueError, ["7", "0 to 6", "clamp"]),
    "lstm: huge lengths": (lstm(lengths=torch.tensor([6, 2**62, 2])), ValueError, [str(2**62), "0 to 6"]),
    "lstm: fractional lengths": (lstm(lengths=torch.tensor([6.0, 1, 2])), TypeError, ["float32", "long()"]),
    "lstm: flags as lengths": (lstm(lengths=torch.ones(3).bool()), TypeError, ["bool", "integers"]),
    "lstm: two lengths for three": (lstm(lengths=[6, 2]), ValueError, ["(2,)", "(3,)", "each sequence"]),
    "lstm: one length for all": (lstm(lengths=6), ValueError, ["()", "(3,)"]),
    "lstm: lengths in words": (lstm(lengths="six"), TypeError, ["str", "integers"]),
    "gru: a pair of states": (gru(hx=(r(1, 3, 7),) * 2), TypeError, ["tensor", "tuple"]),
    "gru: an LSTM's parameters": (gru(params=parameters()), ValueError, ["(28, 5)", "3 * hidden"]),
    "gru: states of other layers": (gru(hx=r(2, 3, 7)), ValueError, ["(2, 3, 7)", "(1, 3, 7)"]),
    "gru: states of another dtype": (gru(hx=r(1, 3, 7).half()), TypeError, ["float16", "float32"]),
    # modules
    "LSTM: a clip": (layer(r(2, 3, 1, 8, 8)), SHAPE, ["(2, 3, 1, 8, 8)", "flatten"]),
    "LSTM: channels first": (layer(r(3, 5, 6), batch_first=True), SHAPE, ["5 features", "6"]),
    "LSTM: packed and lengths": (
        layer(PACKED, call={"lengths": torch.tensor([1, 1, 1])}),
        ValueError,
        ["PackedSequence", "pad_packed"],
    ),
    "LSTM: packed of other features": (
        layer(pack_padded_sequence(r(6, 3, 4), torch.tensor([6, 2, 1]))),
        SHAPE,
        ["5 features", "4"],
    ),
    "LSTM: no hidden units": (lambda: cf.LSTM(5, 0), ValueError, ["hidden_size"]),
    "LSTM: fractional units": (lambda: cf.LSTM(5, 7.0), TypeError, ["hidden_size", "int"]),
    "LSTM: no layers": (lambda: cf.LSTM(5, 7, num_layers=0), ValueError, ["num_layers"]),
    "LSTM: too wide a projection": (lambda: cf.LSTM(5, 7, proj_size=7), ValueError, ["proj_size"]),
    "LSTM: too much dropout": (lambda: cf.LSTM(5, 7, dropout=2), ValueError, ["dropout"]),
    "LSTM.like a GRU": (lambda: cf.LSTM.like(nn.GRU(5, 7)), TypeError, ["GRU", "nn.LSTM"]),
    "LSTM.like a Linear": (lambda: cf.LSTM.like(nn.Linear(5, 7)), TypeError, ["Linear", "nn.LSTM"]),
    "GRU: a projection": (lambda: cf.GRU(5, 7, proj_size=3), ValueError, ["proj_size", "LSTM"]),
    "GRU: a pair of states": (
        layer(r(6, 3, 5), (r(1, 3, 7),) * 2, kind="GRU"),
        TypeError,
        ["tensor", "tuple"],
    ),
    "Sequential: other channels": (
        chain(r(2, 4, 9, 9), nn.Conv2d(*CONV), nn.ReLU()),
        ValueError,
        ["4 channels", "expects 3"],
    ),
    "Sequential: a clip": (
        chain(r(2, 5, 3, 9, 9), nn.Conv2d(*CONV), nn.ReLU()),
        ValueError,
        ["(2, 5, 3, 9, 9)", "TimeDistributed"],
    ),
    "Sequential: a small image": (
        chain(r(2, 3, 2, 2), nn.Conv2d(*CONV), nn.ReLU()),
        ValueError,
        ["2x2", "3x3", "larger input"],
    ),
    "Sequential: a small map": (
        chain(r(2, 3, 4, 4), nn.Conv2d(*CONV), nn.MaxPool2d(3)),
        ValueError,
        ["2x2", "3x3", "smaller pool"],
    ),
    "Sequential: bytes": (
        chain(torch.ones(2, 3, 9, 9, dtype=torch.uint8), nn.Conv2d(*CONV)),
        TypeError,
        ["uint8", "float32", ".to("],
    ),
    "Sequential: doubles": (
        chain(r(2, 3, 9, 9).double(), nn.Conv2d(*CONV), nn.ReLU()),
        TypeError,
        ["float64", "float32"],
    ),
    "Sequential: a function": (lambda: cf.Sequential(torch.relu), TypeError, ["Module"]),
    "TimeDistributed: no module": (lambda: cf.TimeDistributed(torch.relu), TypeError, ["nn.Module"]),
    "TimeDistributed: one step": (
        frames(r(2, 3, 8, 8), nn.Conv2d(*CONV)),
        ValueError,
        ["(2, 3, 8, 8)", "(B, T, C, H, W)", "unsqueeze(1)"],
    ),
    "TimeDistributed: time first": (
        frames(r(2, 3, 8, 8), nn.Conv2d(*CONV), batch_first=False),
        ValueError,
        ["(T, B, C, H, W)", "unsqueeze(0)"],
    ),
    "TimeDistributed: a list": (frames([1], nn.Conv2d(*CONV)), TypeError, ["list", "tensor"]),
    "TimeDistributed: a vector": (frames(r(5), nn.Linear(5, 2)), ValueError, ["(5,)", "(B, T, *step)"]),
    "TimeDistributed: an LSTM inside": (
        frames(r(2, 4, 6, 3), nn.LSTM(3, 4)),
        TypeError,
        ["LSTM", "tuple", "wrap"],
    ),
    "TimeDistributed: steps vanish": (
        frames(r(2, 5, 3), nn.Unflatten(0, (1, 10)), flatten=False),
        ValueError,
        ["(1, 10, 3)", "10 results"],
    ),
    "TimeDistributed: channels last": (
        frames(r(2, 4, 8, 8, 3), nn.Sequential(nn.Conv2d(*CONV), nn.ReLU())),
        ValueError,
        ["8 channels", "expects 3"],
    ),
    # the three systems
    "systems: frames of another size": (
        lambda: SYSTEMS["distributed"]()(r(2, 4, 3, 28, 28)),
        ValueError,
        ["1024", "12544", "image_size=(28, 28)"],
    ),
    "systems: an image for a clip": (
        lambda: SYSTEMS["distributed"]()(r(4, 3, 8, 8)),
        ValueError,
        ["(4, 3, 8, 8)", "(B, T, C, H, W)", "unsqueeze"],
    ),
    "systems: a clip for an image": (lambda: SYSTEMS["simple"]()(r(2, 4, 3, 8, 8)), SHAPE, ["2, 4, 3, 8, 8"]),
    "systems: grey images": (
        lambda: SYSTEMS["simple"]()(r(2, 1, 8, 8)),
        ValueError,
        ["1 channels", "expects 3"],
    ),
    "systems: grey images, 1d": (
        lambda: SYSTEMS["1d"]()(r(2, 1, 8, 8)),
        ValueError,
        ["1 channels", "expects 3"],
    ),
    "systems: tiny images": (
        lambda: SYSTEMS["1d"]()(r(2, 3, 1, 1)),
        ValueError,
        ["1x1", "2x2", "larger input"],
    ),
    "systems: bytes": (
        lambda: SYSTEMS["simple"]()(torch.ones(2, 3, 8, 8).byte()),
        TypeError,
        ["uint8", "float32"],
    ),
    "systems: no units": (lambda: cf.CNN_LSTM_Simple(3, 0, 1, 10), ValueError, ["hidden_size"]),
    "systems: no layers": (lambda: cf.CNN_LSTM_Simple(3, 8, 0, 10), ValueError, ["num_layers"]),
    # explain
    "explain: a function": (lambda: cf.explain(torch.relu, r(2)), TypeError, ["nn.Module"]),
    "explain: inputs only": (lambda: cf.explain(r(2, 3, 8, 8)), TypeError, ["Tensor", "nn.Module"]),
    # state dicts
    "state: a key missing": (
        without(SYSTEMS["simple"](), "lstm.weight_hh_l0"),
        RuntimeError,
        ["lstm.weight_hh_l0"],
    ),
    "state: a key too many": (
        with_value(SYSTEMS["1d"](), "cnn.9.weight", r(1)),
        RuntimeError,
        ["cnn.9.weight"],
    ),
    "state: another size": (
        with_value(SYSTEMS["distributed"](), "lstm.weight_ih_l0", r(32, 12544)),
        RuntimeError,
        ["lstm.weight_ih_l0", "12544", "1024"],
    ),
    "state: a string": (
        with_value(cf.LSTM(5, 7), "weight_ih_l0", "weights"),
        RuntimeError,
        ["weight_ih_l0", "str"],
    ),
    "state: a list": (lambda: cf.GRU(5, 7).load_state_dict([1, 2]), TypeError, ["dict", "list"]),
}


def test_there_are_enough():
    assert len(WRONG) >= 60


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, error, words = WRONG[name]
    with pytest.raises(Exception) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing, f"no word of {missing} in: {message}"


# ------------------------------------------------------------- PyTorch's own errors


class Folded(nn.Module):
    """What :class:`cf.TimeDistributed` does, as people write it."""

    def __init__(self, module, batch_first=True, flatten=True):
        super().__init__()
        self.module, self.flatten = module, flatten

    def forward(self, x):
        y = self.module(x.flatten(0, 1))
        return (y.flatten(1) if self.flatten else y).unflatten(0, x.shape[:2])


def both(kind, *args, **options):
    """The plain module and ours, each made and called."""
    return [
        lambda: getattr(nn, kind)(5, 7, **options)(*args),
        lambda: getattr(cf, kind)(5, 7, **options)(*args),
    ]


def made(kind, *args, **options):
    return [lambda: getattr(nn, kind)(*args, **options), lambda: getattr(cf, kind)(*args, **options)]


def chains(x, *modules):
    return [lambda: nn.Sequential(*modules, nn.ReLU())(x), lambda: cf.Sequential(*modules, nn.ReLU())(x)]


def steps(x, module, **options):
    return [lambda: Folded(module, **options)(x), lambda: cf.TimeDistributed(module, **options)(x)]


def systems(name, x):
    kwargs = {"image_size": (8, 8)} if name == "TimeDistributed" else {}
    return [
        lambda: getattr(cf.reference, f"CNN_LSTM_{name}")(3, 8, 1, 10, **kwargs)(x),
        lambda: getattr(cf, f"CNN_LSTM_{name}")(3, 8, 1, 10, **kwargs)(x),
    ]


def conv(**options):
    return nn.Conv2d(*CONV, **options)


LONGS, HALF = torch.ones(1, 3, 7, dtype=torch.int64), r(1, 3, 7).half()
OF_DOUBLES = pack_padded_sequence(r(6, 3, 5).double(), torch.tensor([6, 2, 1]))

#: name -> (a call of plain PyTorch, the same of ours)
SAME = {
    "an image": both("LSTM", r(2, 3, 8, 8)),
    "a vector": both("GRU", r(5)),
    "a list": both("LSTM", [[1.0]]),
    "nothing": both("GRU", None),
    "other features": both("LSTM", r(6, 3, 12)),
    "other features, one sequence": both("GRU", r(6, 4)),
    "no steps": both("LSTM", r(0, 3, 5)),
    "doubles": both("LSTM", r(6, 3, 5).double()),
    "whole numbers": both("GRU", torch.ones(6, 3, 5, dtype=torch.int64)),
    "one state": both("LSTM", r(6, 3, 5), r(1, 3, 7)),
    "one state in a tuple": both("LSTM", r(6, 3, 5), (r(1, 3, 7),)),
    "three states": both("LSTM", r(6, 3, 5), (r(1, 3, 7),) * 3),
    "states that are lists": both("LSTM", r(6, 3, 5), ([0.0], [0.0])),
    "batch-first states": both("LSTM", r(6, 3, 5), (r(3, 1, 7),) * 2),
    "states without a batch": both("LSTM", r(6, 3, 5), (r(1, 7),) * 2),
    "states with a batch too many": both("LSTM", r(6, 5), (r(1, 3, 7),) * 2),
    "double states": both("LSTM", r(6, 3, 5), (r(1, 3, 7).double(),) * 2),
    "whole states": both("LSTM", r(6, 3, 5), (LONGS,) * 2),
    "a pair for a GRU": both("GRU", r(6, 3, 5), (r(1, 3, 7),) * 2),
    "other layers": both("GRU", r(6, 3, 5), r(2, 3, 7)),
    "half states": both("GRU", r(6, 3, 5), HALF),
    "packed, other features": both("LSTM", pack_padded_sequence(r(6, 3, 4), torch.tensor([6, 2, 1]))),
    "packed, other states": both("LSTM", PACKED, (r(1, 2, 7),) * 2),
    "packed doubles": both("GRU", OF_DOUBLES),
    "no units": made("LSTM", 5, 0),
    "fractional units": made("GRU", 5, 7.0),
    "no layers": made("LSTM", 5, 7, num_layers=0),
    "a wide projection": made("LSTM", 5, 7, proj_size=7),
    "much dropout": made("GRU", 5, 7, dropout=2),
    "a GRU's projection": made("GRU", 5, 7, proj_size=3),
    "no sizes": made("LSTM"),
    "other channels": chains(r(2, 4, 9, 9), conv()),
    "a clip": chains(r(2, 5, 3, 9, 9), conv()),
    "a small image": chains(r(2, 3, 2, 2), conv()),
    "an empty image": chains(r(2, 3, 0, 9), conv()),
    "a small map": chains(r(2, 3, 4, 4), conv(), nn.MaxPool2d(3)),
    "a small map, averaged": chains(r(2, 3, 4, 4), conv(), nn.ReLU(), nn.AvgPool2d(3)),
    "bytes": chains(torch.ones(2, 3, 9, 9).byte(), conv()),
    "double images": chains(r(2, 3, 9, 9).double(), conv()),
    "complex images": chains(r(2, 3, 9, 9) + 1j, conv()),
    "a list of images": chains([1], conv()),
    "an image for a signal": chains(r(2, 3, 9, 9), nn.Conv1d(*CONV)),
    "a norm of other channels": chains(r(2, 3, 9, 9), conv(), nn.BatchNorm2d(5)),
    "a norm of one value": chains(r(1, 3, 3, 3), conv(), nn.BatchNorm2d(4)),
    "a norm without a batch": chains(r(3, 9, 9), conv(), nn.BatchNorm2d(4)),
    "a signal's norm": chains(r(2, 3, 9, 9), conv(), nn.BatchNorm1d(4)),
    "a padded pool": chains(r(2, 3, 9, 9), conv(), nn.ReLU(), nn.MaxPool2d(2, padding=2)),
    "a stride of zero": chains(r(2, 3, 9, 9), conv(stride=0)),
    "negative padding": chains(r(2, 3, 9, 9), conv(padding=-1)),
    "one step": steps(r(2, 3, 8, 8), conv()),
    "a step too many": steps(r(2, 3, 3, 3, 8, 8), conv()),
    "steps in a list": steps([1], conv()),
    "steps without features": steps(r(5), nn.Linear(5, 2)),
    "a number": steps(torch.tensor(1.0), conv()),
    "a tuple for each step": steps(r(2, 4, 6, 3), nn.LSTM(3, 4)),
    "steps vanish": steps(r(2, 5, 3), nn.Unflatten(0, (1, 10)), flatten=False),
    "channels last": steps(r(2, 4, 8, 8, 3), nn.Sequential(conv(), nn.ReLU())),
    "double steps": steps(r(2, 4, 3, 8, 8).double(), conv()),
    **{
        f"{name}: {what}": systems(name, x)
        for name in ("Simple", "1DConv", "TimeDistributed")
        for what, x in {
            "grey": r(2, 1, 8, 8), "grey clips": r(2, 4, 1, 8, 8), "tiny": r(2, 3, 1, 1),
            "tiny clips": r(2, 4, 3, 1, 1), "bytes": torch.ones(2, 3, 8, 8).byte(), "a list": [1],
            "byte clips": torch.ones(2, 4, 3, 8, 8).byte(), "large clips": r(2, 4, 3, 28, 28),
            "one image": r(3, 8, 8), "doubles": r(2, 3, 8, 8).double(),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_error_is_pytorchs_too(name):
    """Code that catches what PyTorch raises for a wrong call catches ours."""
    plain, ours = SAME[name]
    with pytest.raises(Exception) as theirs:
        plain()
    with pytest.raises(Exception) as mine:
        ours()
    assert isinstance(mine.value, theirs.type), f"{mine.typename} is no {theirs.typename}"
    assert isinstance(mine.value, (ValueError, TypeError)) or mine.type is theirs.type


# ------------------------------------------------------------- after the constructor


def test_parameters_replaced_by_something_else():
    """A module whose weight somebody exchanged says so at the next call, and never reads past it."""
    conv = nn.Conv2d(3, 4, 3)
    model = cf.Sequential(conv, nn.ReLU())
    conv.weight = nn.Parameter(r(4, 3, 3))
    with pytest.raises(SHAPE, match="3"):
        model(r(2, 3, 8, 8))
    conv.weight = nn.Parameter(r(4, 3, 3, 3))
    conv.bias = nn.Parameter(r(5))
    with pytest.raises(SHAPE, match=r"\(5,\).*\(4,\)"):
        model(r(2, 3, 8, 8))
    lstm = cf.LSTM(5, 7)
    lstm.weight_hh_l0 = nn.Parameter(r(28, 6))
    with pytest.raises(SHAPE, match=r"\(28, 6\).*\(28, 7\)"):
        lstm(r(6, 3, 5))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_failed_load_changes_no_shape(name):
    """After a refused state dict the model still runs, and a right one loads."""
    model = SYSTEMS[name]()
    good = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        model.load_state_dict({k: v[:1] for k, v in good.items()})
    model.load_state_dict(good)
    x = r(2, 4, 3, 8, 8) if name == "distributed" else r(2, 3, 8, 8)
    assert model(x).shape == (2, 10)


# ------------------------------------------------------------- command line

MODEL = "cnnlstm_fast:CNN_LSTM_Simple(3, 8, 1, 2)"
COMMANDS = {
    "no such command": (["explore"], 2, ["explore"]),
    "no such option": (["doctor", "--quick"], 2, ["--quick"]),
    "no model": (["explain", "--input", "1x3x8x8"], 2, ["MODULE:FACTORY"]),
    "no input": (["explain", MODEL], 2, ["--input"]),
    "no module": (["explain", "nowhere.to.find:Model", "--input", "1x3x8x8"], 2, ["nowhere"]),
    "no such name": (["explain", "cnnlstm_fast:CNN_GRU", "--input", "1x3x8x8"], 2, ["CNN_GRU"]),
    "no colon": (["explain", "cnnlstm_fast", "--input", "1x3x8x8"], 2, ["MODULE:FACTORY"]),
    "code instead of literals": (
        ["explain", "cnnlstm_fast:CNN_LSTM_Simple(__import__('os').getpid(), 8, 1, 2)", "--input", "1"],
        2,
        ["MODULE:FACTORY(literals)"],
    ),
    "not a model": (["explain", "cnnlstm_fast:__doc__.upper()", "--input", "1"], 2, ["nn.Module"]),
    "arguments missing": (
        ["explain", "cnnlstm_fast:CNN_LSTM_Simple(3)", "--input", "1"],
        2,
        ["lstm_hidden_size"],
    ),
    "a size in words": (["explain", MODEL, "--input", "small"], 2, ["small", "8x3x28x28"]),
    "a negative size": (["explain", MODEL, "--input", "1x-3x8x8"], 2, ["1x-3x8x8", "8x3x28x28"]),
    "a size of nothing": (["explain", MODEL, "--input", ""], 2, ["8x3x28x28"]),
    "no such device": (["explain", MODEL, "--input", "1x3x8x8", "--device", "abacus"], 2, ["abacus"]),
    "a shape that does not fit": (["explain", MODEL, "--input", "1x4x8x8"], 1, ["4 channels", "3"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_commands(name):
    """The exit code, the words, and no traceback."""
    args, code, words = COMMANDS[name]
    done = CliRunner().invoke(app, args, env={"COLUMNS": "500", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    missing = [word for word in words if word not in done.output]
    assert not missing, f"no word of {missing} in: {done.output}"
