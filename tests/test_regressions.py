"""Faults that fuzzing, sanitizers, property tests or other versions of torch once found, by name."""

from __future__ import annotations

import math
import time

import pytest
import torch
from helpers import needs_extension

import cnnlstm_fast as cf

pytestmark = needs_extension

forward = torch.ops.cnnlstm_fast.conv_block
backward = torch.ops.cnnlstm_fast.conv_block_backward


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_of_any_size_are_finite(kind):
    """A gate between -88.72 and -88.38 was NaN: e^x as infinity times less than one."""
    gates = {"LSTM": 4, "GRU": 3}[kind]
    x = torch.cat([torch.linspace(-130, 130, 26001), torch.linspace(-89, -88, 20001)])
    function = getattr(cf.functional, kind.lower())
    params = [torch.ones(gates, 1), torch.zeros(gates, 1), torch.zeros(gates), torch.zeros(gates)]
    state = torch.full((1, len(x), 1), 0.5)
    hx = (state, state) if kind == "LSTM" else state
    out, _ = function(x.view(1, -1, 1), hx, params, plan="fused")
    doubles = [p.double() for p in params]
    hx = (state.double(), state.double()) if kind == "LSTM" else state.double()
    true, _ = getattr(cf.reference, kind.lower())(x.double().view(1, -1, 1), hx, doubles)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), true, rtol=1e-6, atol=1e-7)


def _codes_case(pool, code):
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(5, 3, 3, 3)
    conv = [1, 1, 1, 1, 1, 1, 1]
    out, codes, _ = forward(x, weight, None, conv, 1, [], pool, [0, 1, 2, 3], 1, True)
    return (
        torch.ones_like(out),
        x,
        weight,
        codes.fill_(code),
        conv,
        1,
        [],
        pool,
        [0, 1, 2, 3],
        1,
        True,
        True,
        True,
    )


@pytest.mark.parametrize("code", [0x00, 0x11, 0x99, 0xEE])
def test_codes_that_name_places_outside_are_refused(code):
    """The backward read and wrote at the places that saved winner codes name, whatever they were."""
    with pytest.raises(RuntimeError, match="names no place of the map"):
        backward(*_codes_case([3, 3, 2, 2, 1, 1, 1, 1, 0], code))


@pytest.mark.parametrize("code", [0x00, 0x33, 0xFF])
def test_codes_that_name_places_inside_are_taken(code):
    grads = backward(*_codes_case([2, 2, 2, 2, 0, 0, 1, 1, 0], code))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("padding", [2**31 - 1, 2**28, 2**24])
def test_a_huge_padding_is_refused_at_once(padding):
    """Looking at each of its pool windows in turn took minutes, and the sizes could overflow."""
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(5, 3, 3, 3)
    start = time.perf_counter()
    for plan in (1, 2):
        with pytest.raises(RuntimeError):
            conv, pool = [1, 1, padding, padding, 1, 1, 1], [2, 2, 3, 3, 0, 1, 2, 1, 1]
            forward(x, weight, None, conv, 1, [], pool, [0, 1, 2, 3], plan, True)
    assert time.perf_counter() - start < 5


def test_windows_meet_is_what_it_was():
    """The short way of finding windows without an element agrees with looking at all of them."""
    refused = taken = 0
    for size in (1, 2, 3, 5):
        for kernel in (1, 2, 3, 4):
            for stride in (1, 2, 3):
                for padding in range(kernel // 2 + 1):
                    for dilation in (1, 2, 5):
                        for ceil in (0, 1):
                            span = size + 2 * padding - dilation * (kernel - 1) - 1
                            windows = math.floor((span + ceil * (stride - 1)) / stride) + 1
                            if ceil and (windows - 1) * stride >= size + padding:
                                windows -= 1
                            if windows < 1:
                                continue
                            starts = [i * stride - padding for i in range(windows)]
                            meets = all(
                                any(0 <= s + j * dilation < size for j in range(kernel)) for s in starts
                            )
                            pool = [1, kernel, 1, stride, 0, padding, 1, dilation, ceil]
                            x, weight = torch.randn(1, 1, 1, size), torch.ones(1, 1, 1, 1)
                            try:
                                forward(
                                    x,
                                    weight,
                                    None,
                                    [1, 1, 0, 0, 1, 1, 1],
                                    0,
                                    [],
                                    pool,
                                    [0, 1, 2, 3],
                                    1,
                                    False,
                                )
                                assert meets, pool
                                taken += 1
                            except RuntimeError as error:
                                assert "meets no element" in str(error) and not meets, f"{error} {pool}"
                                refused += 1
    assert refused > 5 and taken > 100
