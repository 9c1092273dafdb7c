"""The shape arithmetic of cnnlstm_fast/spec.py and of csrc/block_description.cpp, and what both refuse."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import SEED, needs_extension

from cnnlstm_fast.ops.conv_block import PLANS, forward_op, keeps_codes
from cnnlstm_fast.spec import (
    ACTIVATION_NUMBERS,
    ACTIVATIONS,
    MOST_ELEMENTS,
    block_sizes,
    codes_shape,
    raw_shape,
)

pytestmark = needs_extension

#: Elements up to which a result is computed, of an accepted call.
_COMPUTED = 2**16


def _draw(rng: random.Random) -> dict:
    """The arguments of a block, one in three with something that may be wrong."""
    groups = rng.choice((1, 1, 1, 2, 3))
    c, co = groups * rng.choice((1, 2, 5)), groups * rng.choice((1, 4, 11, 16))
    kernel = [rng.randint(1, 4) for _ in range(2)]
    x = [rng.randint(0, 3), c, *(rng.randint(1, 12) for _ in range(2))]
    conv = [rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 3), rng.randint(0, 3)]
    conv += [rng.randint(1, 2), rng.randint(1, 2), groups, *rng.choice(((), (), (rng.randint(0, 2), 1)))]
    pool: list[int] = []
    if rng.random() < 0.7:
        window = rng.choice((1, 2, 3, 4, 5, 7)), rng.choice((1, 2, 3, 4, 13))
        pool = [*window, rng.randint(1, 4), rng.randint(1, 4), *(rng.randint(0, k // 2) for k in window)]
        pool += [rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 1)]
    activation = rng.choice(list(ACTIVATIONS.values()))
    call = dict(
        x_shape=x, weight_shape=[co, c // groups, *kernel], conv=conv, pool=pool, activation=activation,
        act=[0.5] * ACTIVATION_NUMBERS.get(activation, 0), order=rng.sample(range(4), 4),
    )  # fmt: skip
    if rng.random() < 0.3:
        name = rng.choice([name for name, value in call.items() if isinstance(value, list) and value])
        at = rng.randrange(len(call[name]))
        if rng.random() < 0.2:
            del call[name][at]
        elif name != "act":
            call[name][at] = rng.choice((-1, 0, 1, 2, 5, 16, 255, 2**20, 2**31 - 1, 2**31, MOST_ELEMENTS + 1))
            if name.endswith("shape"):
                call[name][at] = abs(call[name][at])
    elif rng.random() < 0.05:
        call["activation"] = rng.choice((-1, len(ACTIVATIONS)))
    return call


def _expanded(shape: list[int]) -> torch.Tensor:
    return torch.zeros(()).expand(shape)


def test_python_and_the_kernels_agree_on_sizes():
    rng = random.Random(SEED)
    computed = refused = 0
    for _ in range(1500):
        call = _draw(rng)
        try:
            _, size = block_sizes(**call)
        except RuntimeError as error:
            size, said = None, str(error)
        x, weight = _expanded(call["x_shape"]), _expanded(call["weight_shape"])
        args = call["conv"], call["activation"], call["act"], call["pool"], call["order"]
        plan = PLANS[rng.choice(("direct", "chunked"))]
        if size is None:
            with pytest.raises(RuntimeError):
                print("refused here, not by the op:", call, said)
                forward_op(x, weight, None, *args, plan, True)
            refused += 1
            continue
        n, co = x.shape[0], weight.shape[0]
        expected = raw_shape(call["order"], n, co, size)
        work = max(n, 1) * co * max(map(max, (x.shape[1:], weight.shape[1:], size))) ** 2
        if work > _COMPUTED:
            continue
        out, codes, _ = forward_op(x, weight, None, *args, plan, True)
        pool = call["pool"]
        window = pool[0] * pool[1] if pool else 1
        coded = codes_shape(window, n, co, size) if keeps_codes(call["activation"], pool) else [0]
        assert (list(out.shape), list(codes.shape)) == (expected, coded), call
        computed += 1
    assert computed > 500 and refused > 120, (computed, refused)


@pytest.mark.parametrize("window", [(1, 14), (1, 15), (2, 127), (1, 255)])
def test_windows_of_codes(window):
    """A code takes half a byte up to a window of 14 elements, a byte up to 254, and there are none above."""
    pool = [*window, *window, 0, 0, 1, 1, 0]
    call = dict(conv=[1, 1, 0, 0, 1, 1, 1], activation=0, act=[], pool=pool, order=[0, 1, 2, 3])
    x, weight = torch.randn(2, 3, 4, 300), torch.randn(17, 3, 1, 1)
    args = call["conv"], call["activation"], call["act"], call["pool"], call["order"]
    if window[0] * window[1] > 254:
        with pytest.raises(RuntimeError, match="more than 254"):
            block_sizes(x.shape, weight.shape, **call)
        with pytest.raises(RuntimeError, match="more than 254"):
            forward_op(x, weight, None, *args, PLANS["direct"], True)
        return
    _, size = block_sizes(x.shape, weight.shape, **call)
    _, codes, _ = forward_op(x, weight, None, *args, PLANS["direct"], True)
    assert list(codes.shape) == codes_shape(window[0] * window[1], 2, 17, size)
    assert codes.shape[-1] == (8 if window == (1, 14) else 16)


def test_plans_have_the_same_numbers():
    assert {name: i for i, name in enumerate(torch.ops.cnnlstm_fast.conv_plans(), 1)} == PLANS
