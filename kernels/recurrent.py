"""Recurrent layers in Triton: LSTM and GRU with resets and lengths, one launch for all their steps.

For direction d, sequence b and step t, with ``gx = x W_ih^T`` of all steps from one library product,
``h, c`` the state before the step (zero where reset[t], the initial state at a sequence's first step):

    LSTM   i, f, g, o = sigma, sigma, tanh, sigma of gx + b_ih + h W_hh^T + b_hh
           c' = f c + i g,  h' = o tanh(c')
    GRU    r, z = sigma of gx + b_ih + h W_hh^T + b_hh,  v = h W_hn^T + b_hn
           n = tanh(gx_n + b_in + r v),  h' = n + z (h - n)

A step at or past a sequence's length gives zero and leaves the state alone; the reverse direction so
starts at each sequence's own end. The backward kernel walks the steps the other way and stores what
reaches the gates; products over all steps, again the library's, make the parameters' gradients of it.

A program owns BM sequences of one direction and loops over time, so that programs need not wait for
each other. Where RESIDENT, the state stays in registers and the recurrent weights of all gates, padded
to BN units, in shared memory; loads run a step ahead where the registers allow it (AHEAD). Otherwise
the weights stream from the cache, BK by BN a time, and the state goes through memory that only this
program touches, ordered by a barrier.

A sequence's results do not depend on the others', and every sum has a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cnnlstm_fast.kernels.checks import check_layer, check_layer_backward
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.ops.recurrent import saved_shape

#: The values of ``mode``.
LSTM, GRU = 0, 1

#: Recurrent weights of one direction of up to so many bytes stay on chip; half as many where rows are
#: padded, because the masks take registers.
RESIDENT_BYTES = 2**17

#: Sequences of a program: the fewest rows of a product.
SEQUENCES = 16

# The interpreter holds bfloat16 as raw bits, which its product would take for integers.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """tanh to about 2 ulp: near zero by its series, since 1 - 2 / (exp(2x) + 1) cancels there."""
    s = x * x
    series = 0.13333333 + s * (-0.053968254 + s * (0.021869488 - s * 0.0088632355))
    near = x + x * s * (-0.33333333 + s * series)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def _load_tile(rows, u, row_ok, H: tl.constexpr):
    """Units ``u`` of the rows at pointers ``rows``, zeros where not ``row_ok``: [BM, BN]."""
    return tl.load(rows[:, None] + u[None, :], mask=row_ok[:, None] & (u < H)[None, :], other=0.0)


@triton.jit
def _store_tile(rows, u, row_ok, values, H: tl.constexpr):
    ok = row_ok[:, None] & (u < H)[None, :]
    tl.store(rows[:, None] + u[None, :], values.to(rows.dtype.element_ty), mask=ok)


@triton.jit
def _store_gates(rows, u, row_ok, s0, s1, s2, s3, H: tl.constexpr, APART: tl.constexpr):
    _store_tile(rows, u, row_ok, s0, H)
    _store_tile(rows + APART, u, row_ok, s1, H)
    _store_tile(rows + 2 * APART, u, row_ok, s2, H)
    _store_tile(rows + 3 * APART, u, row_ok, s3, H)


@triton.jit
def _load_gates(rows, u, row_ok, H: tl.constexpr, APART: tl.constexpr, GATES: tl.constexpr):
    """A tile of every gate, which lie APART elements; of three gates the last one twice."""
    g0 = _load_tile(rows, u, row_ok, H)
    g1 = _load_tile(rows + APART, u, row_ok, H)
    g2 = _load_tile(rows + 2 * APART, u, row_ok, H)
    g3 = g2
    if GATES == 4:
        g3 = _load_tile(rows + 3 * APART, u, row_ok, H)
    return g0, g1, g2, g3


@triton.jit
def _load_lengths(lengths_ptr, b, b_ok, T):
    """Lengths of sequences ``b``, none of them negative or beyond the last step whatever is given."""
    length = tl.load(lengths_ptr + b, mask=b_ok, other=0)
    return tl.minimum(tl.maximum(length, 0), T).to(tl.int32)


@triton.jit
def _load_reset(reset_ptr, b, t, r_t, r_b, active, HAS_RESET: tl.constexpr):
    """Which sequences restart before step ``t``; a step past a sequence's end restarts nothing."""
    restart = b < 0
    if HAS_RESET:
        restart = tl.load(reset_ptr + t * r_t + b * r_b, mask=active, other=0) != 0
    return restart


@triton.jit
def _load_weight(
    w_ptr, gate, j0, k0, H: tl.constexpr, KEPT_H: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    FLOAT32_PRODUCT: tl.constexpr,
):  # fmt: skip
    """w[gate, j0 + j, k0 + k]: [BJ, BK]."""
    j = j0 + tl.arange(0, BJ)
    k = k0 + tl.arange(0, BK)
    ok = (j < H)[:, None] & (k < KEPT_H)[None, :]
    w = tl.load(w_ptr + (gate * H + j)[:, None] * KEPT_H + k[None, :], mask=ok, other=0.0)
    if FLOAT32_PRODUCT:
        w = w.to(tl.float32)
    return w


@triton.jit
def _load_biases(
    bi_ptr, bh_ptr, u, H: tl.constexpr, GATES: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr
):
    """What is added to every gate: LSTM (i, f, g, o); GRU (r, z, n's own, v)."""
    b0 = tl.full((BN,), 0.0, tl.float32)
    b1 = b0
    b2 = b0
    b3 = b0
    if HAS_BIAS:
        ok = u < H
        b0 = _load_bias(bi_ptr + u, ok) + _load_bias(bh_ptr + u, ok)
        b1 = _load_bias(bi_ptr + H + u, ok) + _load_bias(bh_ptr + H + u, ok)
        b2 = _load_bias(bi_ptr + 2 * H + u, ok)
        if GATES == 4:
            b2 += _load_bias(bh_ptr + 2 * H + u, ok)
            b3 = _load_bias(bi_ptr + 3 * H + u, ok) + _load_bias(bh_ptr + 3 * H + u, ok)
        else:
            b3 = _load_bias(bh_ptr + 2 * H + u, ok)
    return b0, b1, b2, b3


@triton.jit
def _load_bias(pointers, ok):
    return tl.load(pointers, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _cell(
    a0, a1, a2, a3, g0, g1, g2, g3, b0, b1, b2, b3, h, c, active, out_rows, saved_rows, u, b_ok,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A tile's step from the products ``a``, inputs ``g`` and biases ``b``: stores it, returns (h', c')."""
    a0 += g0.to(tl.float32) + b0[None, :]
    a1 += g1.to(tl.float32) + b1[None, :]
    if GATES == 4:
        s0 = _sigmoid(a0)
        s1 = _sigmoid(a1)
        s2 = _tanh(a2 + (g2.to(tl.float32) + b2[None, :]))
        s3 = _sigmoid(a3 + (g3.to(tl.float32) + b3[None, :]))
        new_c = s1 * c + s0 * s2
        new_h = s3 * _tanh(new_c)
        if KEEP:
            _store_tile(saved_rows + 4 * KEPT_H, u, active, new_c, H)
        c = tl.where(active[:, None], new_c, c)
    else:
        s0 = _sigmoid(a0)
        s1 = _sigmoid(a1)
        s3 = a2 + b3[None, :]
        s2 = _tanh(g2.to(tl.float32) + b2[None, :] + s0 * s3)
        new_h = s2 + s1 * (h - s2)
    if KEEP:
        _store_gates(saved_rows, u, active, s0, s1, s2, s3, H, KEPT_H)
    _store_tile(out_rows, u, b_ok, tl.where(active[:, None], new_h, 0.0), H)
    return tl.where(active[:, None], new_h, h), c


@triton.jit(do_not_specialize=["T", "B", "UNITS"])
def forward_kernel(
    gx_ptr, w_ptr, bi_ptr, bh_ptr, h0_ptr, c0_ptr, reset_ptr, lengths_ptr,
    out_ptr, hn_ptr, cn_ptr, saved_ptr, state_ptr,
    T, B, UNITS, x_t, x_b, o_t, o_b, r_t, r_b,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    KEEP: tl.constexpr, RESIDENT: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out, the final states and what backward reads, of BM sequences in one direction.

    gx (T, B by strides, DIRECTIONS * GATES * H), w (DIRECTIONS, GATES * H, KEPT_H), biases
    (DIRECTIONS, GATES * H), states (DIRECTIONS, B, H), saved (DIRECTIONS, T, B, 4 gates and an LSTM's c,
    KEPT_H), state (2, DIRECTIONS, B, H) the passing h where weights stream. UNITS is H, as an argument
    because the assembler unrolls constant loops until the registers are gone.
    """
    SAVED: tl.constexpr = 5 if GATES == 4 else 4
    pid = tl.program_id(0)
    direction = (pid % DIRECTIONS).to(tl.int64)
    reverse = direction == 1
    b = (pid // DIRECTIONS * BM + tl.arange(0, BM)).to(tl.int64)
    b_ok = b < B
    length = tl.where(b_ok, T, 0)
    steps = T
    if HAS_LENGTHS:
        length = _load_lengths(lengths_ptr, b, b_ok, T)
        steps = tl.reduce(length, 0, _maximum)

    gx_rows = gx_ptr + direction * (GATES * H) + b * x_b
    out_rows = out_ptr + direction * H + b * o_b
    saved_step = B.to(tl.int64) * (SAVED * KEPT_H)
    saved_rows = saved_ptr + direction * T * saved_step + b * (SAVED * KEPT_H)
    state_rows = direction * (B * H) + b * H
    w_ptr += direction * (GATES * H * KEPT_H)
    bi_ptr += direction * (GATES * H)
    bh_ptr += direction * (GATES * H)

    if RESIDENT:
        u = tl.arange(0, BN)
        w0 = tl.trans(_load_weight(w_ptr, 0, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
        w1 = tl.trans(_load_weight(w_ptr, 1, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
        w2 = tl.trans(_load_weight(w_ptr, 2, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
        w3 = w2
        if GATES == 4:
            w3 = tl.trans(_load_weight(w_ptr, 3, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
        h = tl.full((BM, BN), 0.0, tl.float32)
        c = h
        if HAS_STATE:
            h = _load_tile(h0_ptr + state_rows, u, b_ok, H).to(tl.float32)
            if GATES == 4:
                c = _load_tile(c0_ptr + state_rows, u, b_ok, H).to(tl.float32)
        t = tl.where(reverse, steps - 1, 0).to(tl.int64)
        active = (t >= 0) & (t < length)  # sequences of no length have no last step
        restart = _load_reset(reset_ptr, b, t, r_t, r_b, active, HAS_RESET)
        g0, g1, g2, g3 = _load_gates(gx_rows + t * x_t, u, active, H, H, GATES)
        for s in range(steps):
            t = tl.where(reverse, steps - 1 - s, s).to(tl.int64)
            active = t < length
            after = tl.where(reverse, t - 1, t + 1)
            ahead = (after >= 0) & (after < length)
            next_restart = _load_reset(reset_ptr, b, after, r_t, r_b, ahead, HAS_RESET)
            if AHEAD:
                n0, n1, n2, n3 = _load_gates(gx_rows + after * x_t, u, ahead, H, H, GATES)
            else:
                g0, g1, g2, g3 = _load_gates(gx_rows + t * x_t, u, active, H, H, GATES)
            if HAS_RESET:
                h = tl.where(restart[:, None], 0.0, h)
                c = tl.where(restart[:, None], 0.0, c)
            # Loaded each step: a program has too few registers to hold them all along.
            b0, b1, b2, b3 = _load_biases(bi_ptr, bh_ptr, u, H, GATES, HAS_BIAS, BN)
            factor = h.to(w0.dtype)
            a0 = tl.dot(factor, w0, input_precision=PRECISION)
            a1 = tl.dot(factor, w1, input_precision=PRECISION)
            a2 = tl.dot(factor, w2, input_precision=PRECISION)
            a3 = a2
            if GATES == 4:
                a3 = tl.dot(factor, w3, input_precision=PRECISION)
            h, c = _cell(
                a0, a1, a2, a3, g0, g1, g2, g3, b0, b1, b2, b3, h, c, active,
                out_rows + t * o_t, saved_rows + t * saved_step, u, b_ok, H, KEPT_H, GATES, KEEP,
            )  # fmt: skip
            restart = next_restart
            if AHEAD:
                g0 = n0
                g1 = n1
                g2 = n2
                g3 = n3
        _store_tile(hn_ptr + state_rows, u, b_ok, h, H)
        if GATES == 4:
            _store_tile(cn_ptr + state_rows, u, b_ok, c, H)
    else:
        other = (B * (DIRECTIONS * H)).to(tl.int64)
        for n in range(0, UNITS, BN):
            u = n + tl.arange(0, BN)
            h = tl.full((BM, BN), 0.0, tl.float32)
            c = h
            if HAS_STATE:
                h = _load_tile(h0_ptr + state_rows, u, b_ok, H).to(tl.float32)
                if GATES == 4:
                    c = _load_tile(c0_ptr + state_rows, u, b_ok, H).to(tl.float32)
            _store_tile(state_ptr + state_rows, u, b_ok, h, H)
            if GATES == 4:
                _store_tile(cn_ptr + state_rows, u, b_ok, c, H)
        tl.debug_barrier()
        for s in range(steps):
            t = tl.where(reverse, steps - 1 - s, s).to(tl.int64)
            active = t < length
            restart = _load_reset(reset_ptr, b, t, r_t, r_b, active, HAS_RESET)
            going_on = b_ok & (restart == 0)
            h_rows = state_ptr + s % 2 * other + state_rows
            for n in range(0, UNITS, BN):
                u = n + tl.arange(0, BN)
                g0, g1, g2, g3 = _load_gates(gx_rows + t * x_t, u, active, H, H, GATES)
                a0 = tl.full((BM, BN), 0.0, tl.float32)
                a1 = a0
                a2 = a0
                a3 = a0
                for k in tl.range(0, UNITS, BK, num_stages=STAGES):
                    w0 = _load_weight(w_ptr, 0, n, k, H, KEPT_H, BN, BK, FLOAT32_PRODUCT)
                    factor = _load_tile(h_rows, k + tl.arange(0, BK), going_on, H).to(w0.dtype)
                    a0 = tl.dot(factor, tl.trans(w0), a0, input_precision=PRECISION)
                    w1 = _load_weight(w_ptr, 1, n, k, H, KEPT_H, BN, BK, FLOAT32_PRODUCT)
                    a1 = tl.dot(factor, tl.trans(w1), a1, input_precision=PRECISION)
                    w2 = _load_weight(w_ptr, 2, n, k, H, KEPT_H, BN, BK, FLOAT32_PRODUCT)
                    a2 = tl.dot(factor, tl.trans(w2), a2, input_precision=PRECISION)
                    if GATES == 4:
                        w3 = _load_weight(w_ptr, 3, n, k, H, KEPT_H, BN, BK, FLOAT32_PRODUCT)
                        a3 = tl.dot(factor, tl.trans(w3), a3, input_precision=PRECISION)
                h = _load_tile(h_rows, u, going_on, H)
                c = h
                if GATES == 4:
                    c = _load_tile(cn_ptr + state_rows, u, going_on, H)
                b0, b1, b2, b3 = _load_biases(bi_ptr, bh_ptr, u, H, GATES, HAS_BIAS, BN)
                h, c = _cell(
                    a0, a1, a2, a3, g0, g1, g2, g3, b0, b1, b2, b3, h, c, active,
                    out_rows + t * o_t, saved_rows + t * saved_step, u, b_ok, H, KEPT_H, GATES, KEEP,
                )  # fmt: skip
                _store_tile(state_ptr + (1 - s % 2) * other + state_rows, u, b_ok, h, H)
                if GATES == 4:
                    _store_tile(cn_ptr + state_rows, u, b_ok, c, H)
            tl.debug_barrier()
        for n in range(0, UNITS, BN):
            u = n + tl.arange(0, BN)
            h = _load_tile(state_ptr + steps % 2 * other + state_rows, u, b_ok, H)
            _store_tile(hn_ptr + state_rows, u, b_ok, h, H)

    if HAS_LENGTHS:
        for past in range(T - steps):
            t = (steps + past).to(tl.int64)
            for n in range(0, UNITS, BN):
                nothing = tl.full((BM, BN), 0.0, tl.float32)
                _store_tile(out_rows + t * o_t, n + tl.arange(0, BN), b_ok, nothing, H)


@triton.jit
def _gate_grads(s0, s1, s2, s3, c, before_h, before_c, dh, dc, active, GATES: tl.constexpr):
    """What reaches the four gates of ``saved``, and dc and dh of the state before less what products bring.

    A GRU's four are r, z, n and v. Nothing reaches the gates of a sequence that is not ``active``.
    """
    if GATES == 4:
        squashed = _tanh(c)
        through = dc + dh * s3 * (1.0 - squashed * squashed)
        d0 = through * s2 * s0 * (1.0 - s0)
        d1 = through * before_c * s1 * (1.0 - s1)
        d2 = through * s0 * (1.0 - s2 * s2)
        d3 = dh * squashed * s3 * (1.0 - s3)
        dc = tl.where(active[:, None], through * s1, dc)
        past = tl.where(active[:, None], 0.0, dh)
    else:
        d2 = dh * (1.0 - s1) * (1.0 - s2 * s2)
        d1 = dh * (before_h - s2) * s1 * (1.0 - s1)
        d0 = d2 * s3 * s0 * (1.0 - s0)
        d3 = d2 * s0
        past = tl.where(active[:, None], dh * s1, dh)
    d0 = tl.where(active[:, None], d0, 0.0)
    d1 = tl.where(active[:, None], d1, 0.0)
    d2 = tl.where(active[:, None], d2, 0.0)
    d3 = tl.where(active[:, None], d3, 0.0)
    return d0, d1, d2, d3, dc, past


@triton.jit
def _load_before(rows, first_rows, u, there, b_ok, H: tl.constexpr, HAS_STATE: tl.constexpr):
    """A state before a step: of the step before where it is ``there``, else the initial one."""
    before = _load_tile(rows, u, there, H).to(tl.float32)
    if HAS_STATE:
        first = b_ok & (there == 0)
        before += _load_tile(first_rows, u, first, H).to(tl.float32)
    return before


@triton.jit
def _load_step_back(
    saved_rows, out_rows, grad_rows, h0_rows, c0_rows, saved_step, o_t, g_t, g_u, t, reverse, length, b_ok, u,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_STATE: tl.constexpr, NEED_BEFORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """(gates, h and c before, gradient of the output) of a tile's step ``t``; the states without resets."""
    active = (t >= 0) & (t < length)
    s0, s1, s2, s3 = _load_gates(saved_rows + t * saved_step, u, active, H, KEPT_H, 4)
    before = tl.where(reverse, t + 1, t - 1)
    there = (before >= 0) & (before < length)
    before_h = tl.full((BM, BN), 0.0, tl.float32)
    before_c = before_h
    grad = before_h
    if GATES == 4:
        before_c = _load_before(
            saved_rows + before * saved_step + 4 * KEPT_H, c0_rows, u, there, b_ok, H, HAS_STATE
        )
    if NEED_BEFORE:
        before_h = _load_before(out_rows + before * o_t, h0_rows, u, there, b_ok, H, HAS_STATE)
    if HAS_GRAD:
        ok = active[:, None] & (u < H)[None, :]
        grad = tl.load(grad_rows[:, None] + t * g_t + (u * g_u)[None, :], mask=ok, other=0.0).to(tl.float32)
    return s0, s1, s2, s3, before_h, before_c, grad


@triton.jit(do_not_specialize=["T", "B", "UNITS"])
def backward_kernel(
    grad_ptr, grad_hn_ptr, grad_cn_ptr, w_ptr, h0_ptr, c0_ptr, reset_ptr, lengths_ptr, out_ptr, saved_ptr,
    dgates_ptr, before_ptr, dh_ptr, dc_ptr,
    T, B, UNITS, g_t, g_b, g_u, o_t, o_b, r_t, r_b, d_t, d_b,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_GRAD_H: tl.constexpr, HAS_GRAD_C: tl.constexpr, KEEP_BEFORE: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What reaches the gates of BM sequences in one direction, and their initial states.

    dgates has 4 H for every row of ``before``, whose rows have strides ``d_t, d_b`` of H elements and
    which takes the h before every step: both what the parameters' gradients are made of. An LSTM's four
    gates are those of ``saved``; a GRU's are r, z, n and v. dh, dc (DIRECTIONS, B, H) are float32.
    """
    SAVED: tl.constexpr = 5 if GATES == 4 else 4
    NEED_BEFORE: tl.constexpr = KEEP_BEFORE or GATES == 3
    pid = tl.program_id(0)
    direction = (pid % DIRECTIONS).to(tl.int64)
    reverse = direction == 1
    b = (pid // DIRECTIONS * BM + tl.arange(0, BM)).to(tl.int64)
    b_ok = b < B
    length = tl.where(b_ok, T, 0)
    steps = T
    if HAS_LENGTHS:
        length = _load_lengths(lengths_ptr, b, b_ok, T)
        steps = tl.reduce(length, 0, _maximum)

    grad_rows = grad_ptr + direction * H * g_u + b * g_b
    out_rows = out_ptr + direction * H + b * o_b
    saved_step = B.to(tl.int64) * (SAVED * KEPT_H)
    saved_rows = saved_ptr + direction * T * saved_step + b * (SAVED * KEPT_H)
    dgates_rows = dgates_ptr + direction * (4 * H) + b * d_b * (4 * H)
    before_rows = before_ptr + direction * H + b * d_b * H
    state_rows = direction * (B * H) + b * H
    h0_rows = h0_ptr + state_rows
    c0_rows = c0_ptr + state_rows
    w_ptr += direction * (GATES * H * KEPT_H)

    if RESIDENT:
        u = tl.arange(0, BN)
        w0 = _load_weight(w_ptr, 0, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
        w1 = _load_weight(w_ptr, 1, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
        w2 = _load_weight(w_ptr, 2, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
        w3 = w2
        if GATES == 4:
            w3 = _load_weight(w_ptr, 3, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
        t = tl.where(reverse, 0, steps - 1).to(tl.int64)
        active = (t >= 0) & (t < length)  # sequences of no length have no last step
        dh = tl.full((BM, BN), 0.0, tl.float32)
        dc = dh
        c = dh
        if HAS_GRAD_H:
            dh = _load_tile(grad_hn_ptr + state_rows, u, b_ok, H).to(tl.float32)
        if HAS_GRAD_C:
            dc = _load_tile(grad_cn_ptr + state_rows, u, b_ok, H).to(tl.float32)
        if GATES == 4:
            c = _load_tile(saved_rows + t * saved_step + 4 * KEPT_H, u, active, H)
        restart = _load_reset(reset_ptr, b, t, r_t, r_b, active, HAS_RESET)
        s0, s1, s2, s3, before_h, before_c, grad = _load_step_back(
            saved_rows, out_rows, grad_rows, h0_rows, c0_rows, saved_step, o_t, g_t, g_u, t, reverse,
            length, b_ok, u, H, KEPT_H, GATES, HAS_GRAD, HAS_STATE, NEED_BEFORE, BM, BN,
        )  # fmt: skip
        for s in range(steps):
            t = tl.where(reverse, s, steps - 1 - s).to(tl.int64)
            active = t < length
            after = tl.where(reverse, t + 1, t - 1)
            ahead = (after >= 0) & (after < length)
            next_restart = _load_reset(reset_ptr, b, after, r_t, r_b, ahead, HAS_RESET)
            n0, n1, n2, n3, next_before_h, next_before_c, next_grad = _load_step_back(
                saved_rows, out_rows, grad_rows, h0_rows, c0_rows, saved_step, o_t, g_t, g_u, after, reverse,
                length, b_ok, u, H, KEPT_H, GATES, HAS_GRAD, HAS_STATE, NEED_BEFORE, BM, BN,
            )  # fmt: skip
            next_c = before_c
            if HAS_RESET:
                before_h = tl.where(restart[:, None], 0.0, before_h)
                before_c = tl.where(restart[:, None], 0.0, before_c)
            d0, d1, d2, d3, dc, dh = _gate_grads(
                s0, s1, s2, s3, c, before_h, before_c, dh + grad, dc, active, GATES
            )
            _store_gates(dgates_rows + t * d_t * (4 * H), u, b_ok, d0, d1, d2, d3, H, H)
            if KEEP_BEFORE:
                kept = tl.where(active[:, None], before_h, 0.0)
                _store_tile(before_rows + t * d_t * H, u, b_ok, kept, H)
            dh = tl.dot(d0.to(w0.dtype), w0, dh, input_precision=PRECISION)
            dh = tl.dot(d1.to(w0.dtype), w1, dh, input_precision=PRECISION)
            if GATES == 4:
                dh = tl.dot(d2.to(w0.dtype), w2, dh, input_precision=PRECISION)
            dh = tl.dot(d3.to(w0.dtype), w3, dh, input_precision=PRECISION)
            if HAS_RESET:
                dh = tl.where(restart[:, None], 0.0, dh)
                dc = tl.where(restart[:, None], 0.0, dc)
            restart = next_restart
            c = next_c
            s0 = n0
            s1 = n1
            s2 = n2
            s3 = n3
            before_h = next_before_h
            before_c = next_before_c
            grad = next_grad
        _store_tile(dh_ptr + state_rows, u, b_ok, dh, H)
        if GATES == 4:
            _store_tile(dc_ptr + state_rows, u, b_ok, dc, H)
    else:
        for n in range(0, UNITS, BN):
            u = n + tl.arange(0, BN)
            dh = tl.full((BM, BN), 0.0, tl.float32)
            dc = dh
            if HAS_GRAD_H:
                dh = _load_tile(grad_hn_ptr + state_rows, u, b_ok, H).to(tl.float32)
            if HAS_GRAD_C:
                dc = _load_tile(grad_cn_ptr + state_rows, u, b_ok, H).to(tl.float32)
            _store_tile(dh_ptr + state_rows, u, b_ok, dh, H)
            if GATES == 4:
                _store_tile(dc_ptr + state_rows, u, b_ok, dc, H)
        tl.debug_barrier()
        for s in range(steps):
            t = tl.where(reverse, s, steps - 1 - s).to(tl.int64)
            active = t < length
            restart = _load_reset(reset_ptr, b, t, r_t, r_b, active, HAS_RESET)
            for n in range(0, UNITS, BN):
                u = n + tl.arange(0, BN)
                s0, s1, s2, s3, before_h, before_c, grad = _load_step_back(
                    saved_rows, out_rows, grad_rows, h0_rows, c0_rows, saved_step, o_t, g_t, g_u, t, reverse,
                    length, b_ok, u, H, KEPT_H, GATES, HAS_GRAD, HAS_STATE, NEED_BEFORE, BM, BN,
                )  # fmt: skip
                if HAS_RESET:
                    before_h = tl.where(restart[:, None], 0.0, before_h)
                    before_c = tl.where(restart[:, None], 0.0, before_c)
                dh = _load_tile(dh_ptr + state_rows, u, b_ok, H)
                dc = dh
                c = dh
                if GATES == 4:
                    dc = _load_tile(dc_ptr + state_rows, u, b_ok, H)
                    c = _load_tile(saved_rows + t * saved_step + 4 * KEPT_H, u, active, H)
                d0, d1, d2, d3, dc, dh = _gate_grads(
                    s0, s1, s2, s3, c, before_h, before_c, dh + grad, dc, active, GATES
                )
                _store_gates(dgates_rows + t * d_t * (4 * H), u, b_ok, d0, d1, d2, d3, H, H)
                if KEEP_BEFORE:
                    kept = tl.where(active[:, None], before_h, 0.0)
                    _store_tile(before_rows + t * d_t * H, u, b_ok, kept, H)
                _store_tile(dh_ptr + state_rows, u, b_ok, dh, H)
                if GATES == 4:
                    if HAS_RESET:
                        dc = tl.where(restart[:, None], 0.0, dc)
                    _store_tile(dc_ptr + state_rows, u, b_ok, dc, H)
            tl.debug_barrier()
            for n in range(0, UNITS, BN):
                u = n + tl.arange(0, BN)
                dh = _load_tile(dh_ptr + state_rows, u, b_ok, H)
                for k in tl.range(0, UNITS, BK, num_stages=STAGES):
                    k_tile = k + tl.arange(0, BK)
                    d0, d1, d2, d3 = _load_gates(dgates_rows + t * d_t * (4 * H), k_tile, active, H, H, 4)
                    w0 = _load_weight(w_ptr, 0, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
                    dh = tl.dot(d0.to(w0.dtype), w0, dh, input_precision=PRECISION)
                    w1 = _load_weight(w_ptr, 1, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
                    dh = tl.dot(d1.to(w0.dtype), w1, dh, input_precision=PRECISION)
                    w2 = _load_weight(w_ptr, 2, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
                    if GATES == 4:
                        dh = tl.dot(d2.to(w0.dtype), w2, dh, input_precision=PRECISION)
                        w2 = _load_weight(w_ptr, 3, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
                    dh = tl.dot(d3.to(w0.dtype), w2, dh, input_precision=PRECISION)
                if HAS_RESET:
                    dh = tl.where(restart[:, None], 0.0, dh)
                _store_tile(dh_ptr + state_rows, u, b_ok, dh, H)
            tl.debug_barrier()

    if HAS_LENGTHS:
        for past in range(T - steps):
            t = (steps + past).to(tl.int64)
            for n in range(0, UNITS, BN):
                u = n + tl.arange(0, BN)
                nothing = tl.full((BM, BN), 0.0, tl.float32)
                rows = dgates_rows + t * d_t * (4 * H)
                _store_gates(rows, u, b_ok, nothing, nothing, nothing, nothing, H, H)
                if KEEP_BEFORE:
                    _store_tile(before_rows + t * d_t * H, u, b_ok, nothing, H)


def forward(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    w_ih_r: Tensor | None,
    w_hh_r: Tensor | None,
    b_ih_r: Tensor | None,
    b_hh_r: Tensor | None,
    w_hr_r: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    mode: int,
    batch_first: bool,
    keep: bool,
    run=launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``cnnlstm_fast::recurrent_layer``, whose file explains the arguments; without projections.

    Returns:
        (out, h_n, c_n, saved); saved is (directions, T, B, n * H) of float32, n = 5 for an LSTM (its
        gates and c), 4 for a GRU (its gates and v).

    ``run`` is what starts kernels, see :func:`cnnlstm_fast.kernels.launching.launch`.
    """
    weights = w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r
    check_layer(x, h0, c0, weights, reset, lengths, mode, batch_first)
    layer = _Layer(x, w_hh, w_hh_r, mode, batch_first)
    out = x.new_empty([*x.shape[:2], layer.directions * layer.units])
    kept = saved_shape(mode, layer.directions, layer.steps, layer.batch, layer.units) if keep else [0]
    saved = x.new_empty(kept, dtype=torch.float32)
    hn, cn = layer.new_states(x)
    rows, by_time, by_batch = layer.rows(x)
    w = w_ih if w_ih_r is None else torch.cat([w_ih, w_ih_r])
    gx = torch.mm(rows.reshape(-1, x.shape[2]), w.t()).view(*rows.shape[:2], w.shape[0])
    args = dict(
        gx_ptr=gx,
        bi_ptr=gx if b_ih is None else _stacked(b_ih, b_ih_r),
        bh_ptr=gx if b_hh is None else _stacked(b_hh, b_hh_r),
        hn_ptr=hn,
        cn_ptr=cn,
        state_ptr=hn if layer.resident else hn.new_empty([2, *hn.shape]),
        x_t=gx.stride(by_time),
        x_b=gx.stride(by_batch),
        HAS_BIAS=b_ih is not None,
        KEEP=keep,
        # The inputs of another step and what is kept of this one do not both fit the registers.
        AHEAD=not keep or layer.gates * layer.width < 512,
    )
    layer.start(run, forward_kernel, args, h0, c0, w_hh, w_hh_r, reset, lengths, out, saved)
    return out, hn.to(x.dtype), cn.to(x.dtype), saved


def backward(
    grad_out: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    w_ih_r: Tensor | None,
    w_hh_r: Tensor | None,
    b_ih_r: Tensor | None,
    b_hh_r: Tensor | None,
    w_hr_r: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    saved: Tensor,
    mode: int,
    batch_first: bool,
    need_x: bool,
    need_state: bool,
    need_weights: bool,
    run=launch,
) -> tuple[Tensor, ...]:
    """The op ``cnnlstm_fast::recurrent_layer_backward``, whose file explains the arguments.

    Returns:
        The gradients of x, h0, c0 and the ten weights; no element where one is not needed or not given.
    """
    weights = w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r
    check_layer(x, h0, c0, weights, reset, lengths, mode, batch_first)
    grads_in = grad_out, grad_hn, grad_cn
    check_layer_backward(grads_in, x, w_hh, w_hh_r, out, saved, mode, batch_first)
    layer = _Layer(x, w_hh, w_hh_r, mode, batch_first)
    rows, by_time, by_batch = layer.rows(x)
    dgates = x.new_empty([*rows.shape[:2], layer.directions, 4, layer.units])
    before = x.new_empty([*rows.shape[:2], layer.directions, layer.units] if need_weights else [0])
    dh, dc = layer.new_states(x)
    grad = x if grad_out is None else grad_out
    row_steps = rows.shape[1] * layer.directions, layer.directions
    args = dict(
        grad_ptr=grad,
        grad_hn_ptr=x if grad_hn is None else grad_hn.contiguous(),
        grad_cn_ptr=x if grad_cn is None else grad_cn.contiguous(),
        dgates_ptr=dgates,
        before_ptr=before,
        dh_ptr=dh,
        dc_ptr=dc,
        g_t=grad.stride(layer.by_time),
        g_b=grad.stride(1 - layer.by_time),
        g_u=grad.stride(2),
        d_t=row_steps[by_time],
        d_b=row_steps[by_batch],
        HAS_GRAD=grad_out is not None,
        HAS_GRAD_H=grad_hn is not None,
        HAS_GRAD_C=grad_cn is not None,
        KEEP_BEFORE=need_weights,
    )
    layer.start(run, backward_kernel, args, h0, c0, w_hh, w_hh_r, reset, lengths, out, saved)

    grads = [x.new_empty(0) for _ in range(13)]
    by_direction = dgates.view(-1, layer.directions, 4 * layer.units).unbind(1)
    into = [g.narrow(1, 0, layer.gates * layer.units) for g in by_direction]
    if need_x:
        dx = torch.mm(into[0], w_ih)
        if w_ih_r is not None:
            dx = torch.addmm(dx, into[1], w_ih_r)
        dx = dx.view(*rows.shape[:2], x.shape[2])
        grads[0] = (dx if by_time == layer.by_time else dx.transpose(0, 1)).contiguous()
    if need_state:
        grads[1] = grads[1] if h0 is None else dh.to(x.dtype)
        grads[2] = grads[2] if c0 is None else dc.to(x.dtype)
    if need_weights:
        inputs = rows.reshape(-1, x.shape[2])
        befores = before.view(-1, layer.directions, layer.units).unbind(1)
        has_bias = b_ih is not None
        for at, g, h in zip((3, 8), by_direction, befores, strict=False):
            grads[at : at + 2 + 2 * has_bias] = _weight_grads(g, inputs, h, layer, has_bias)
    return tuple(grads)


def _weight_grads(g: Tensor, inputs: Tensor, h: Tensor, layer: _Layer, has_bias: bool) -> list[Tensor]:
    """Gradients of w_ih, w_hh and the biases from what reaches the gates (rows, 4 H), x and h before."""
    into = g.narrow(1, 0, layer.gates * layer.units)
    dw_ih = torch.mm(into.t(), inputs)
    # A GRU's third gate gets its input's part and its state's part apart.
    shared, apart = g.narrow(1, 0, 2 * layer.units), g.narrow(1, 3 * layer.units, layer.units)
    if layer.mode == LSTM:
        dw_hh = torch.mm(into.t(), h)
    else:
        dw_hh = torch.cat([torch.mm(shared.t(), h), torch.mm(apart.t(), h)])
    if not has_bias:
        return [dw_ih, dw_hh]
    db_ih = into.sum(0)
    db_hh = db_ih.clone() if layer.mode == LSTM else torch.cat([shared.sum(0), apart.sum(0)])
    return [dw_ih, dw_hh, db_ih, db_hh]


class _Layer:
    """Sizes of a layer, and what its two kernels are both told."""

    def __init__(self, x: Tensor, w_hh: Tensor, w_hh_r: Tensor | None, mode: int, batch_first: bool):
        self.mode = mode
        self.gates = 4 if mode == LSTM else 3
        self.units = w_hh.shape[1]
        self.directions = 1 if w_hh_r is None else 2
        self.by_time = int(batch_first)
        self.steps, self.batch = x.shape[self.by_time], x.shape[1 - self.by_time]
        self.width = max(16, triton.next_power_of_2(self.units))
        self.float32 = x.dtype == torch.float32
        self.precision = _precision()
        bytes_of_weight: float
        if not self.float32:
            bytes_of_weight = 2
        else:
            bytes_of_weight = {"tf32": 4, "tf32x3": 8, "ieee": math.inf}[self.precision]
        most = RESIDENT_BYTES if self.units == self.width else RESIDENT_BYTES // 2
        self.resident = self.gates * self.width**2 * bytes_of_weight <= most

    def rows(self, x: Tensor) -> tuple[Tensor, int, int]:
        """x with its first two dimensions as they lie in memory, and which of them are time and batch."""
        if x.stride(0) >= x.stride(1):
            return x, self.by_time, 1 - self.by_time
        return x.transpose(0, 1), 1 - self.by_time, self.by_time

    def new_states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Empty float32 states (D, B, H): h's, and c's with no element for a GRU."""
        shape = [self.directions, self.batch, self.units]
        h = x.new_empty(shape, dtype=torch.float32)
        return h, x.new_empty(shape if self.mode == LSTM else [0], dtype=torch.float32)

    def start(self, run, kernel, args, h0, c0, w_hh, w_hh_r, reset, lengths, out, saved) -> None:
        """Start a kernel with ``args`` and what both kernels take."""
        has_state = h0 is not None or c0 is not None
        if has_state:
            h0 = torch.zeros_like(c0) if h0 is None else h0.contiguous()
            c0 = torch.zeros_like(h0) if c0 is None else c0.contiguous()
        if lengths is not None:
            lengths = lengths.to(out.device, non_blocking=True).contiguous()
        if self.resident:
            tiles = dict(BN=self.width, BK=self.width, STAGES=1)
            options = dict(num_warps=min(max(self.width // 8, 2), 8), num_stages=1, maxnreg=255)
        else:
            tiles = dict(BN=64, BK=16 if self.float32 else 32, STAGES=4)
            options = dict(num_warps=8, num_stages=1, maxnreg=255)
        kept = saved_shape(self.mode, 1, 1, 1, self.units)[-1]
        w_hh = _stacked(w_hh, w_hh_r)
        if kept > self.units:  # rows that start at multiples of 16 load many at a time
            w_hh = torch.nn.functional.pad(w_hh, (0, kept - self.units))
        args = args | dict(
            w_ptr=w_hh,
            h0_ptr=h0 if has_state else out,
            c0_ptr=c0 if has_state else out,
            reset_ptr=out if reset is None else reset.view(torch.uint8),
            lengths_ptr=out if lengths is None else lengths,
            out_ptr=out,
            saved_ptr=saved,
            T=self.steps,
            B=self.batch,
            UNITS=self.units,
            o_t=out.stride(self.by_time),
            o_b=out.stride(1 - self.by_time),
            r_t=0 if reset is None else reset.stride(self.by_time),
            r_b=0 if reset is None else reset.stride(1 - self.by_time),
            H=self.units,
            KEPT_H=kept,
            GATES=self.gates,
            DIRECTIONS=self.directions,
            HAS_STATE=has_state,
            HAS_RESET=reset is not None,
            HAS_LENGTHS=lengths is not None,
            RESIDENT=self.resident,
            PRECISION=self.precision,
            FLOAT32_PRODUCT=INTERPRETED,
            BM=SEQUENCES,
            **tiles,
        )
        run(kernel, triton.cdiv(self.batch, SEQUENCES) * self.directions, args, options)


def _stacked(forward: Tensor, reverse: Tensor | None) -> Tensor:
    """One parameter of both directions, contiguous: (D, ...)."""
    return forward.contiguous() if reverse is None else torch.stack([forward, reverse])


def _precision() -> str:
    """How products of float32 are computed: in TF32 where PyTorch's own flags let a recurrent layer.

    Elsewhere on tensor cores too, each operand split into two of TF32, which loses about what rounding
    to float32 does. Products without them ("ieee") need too many registers for weights that stay.
    """
    if torch.version.hip:
        return "ieee"
    cudnn: Any = torch.backends.cudnn
    return "tf32" if cudnn.rnn.fp32_precision == "tf32" else "tf32x3"
