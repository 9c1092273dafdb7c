"""The kernels of :mod:`cnnlstm_fast.kernels.recurrent`, which gives their formulas and starts them.

Both kernels have two ways, RESIDENT and streaming, each a function of its own. A tile is BM sequences by BN
units: [BM, BN]. ``..._rows`` are pointers to the first unit of each sequence: [BM]. ``at_state`` are the
offsets of these units in a tensor (DIRECTIONS, B, H). Rows of KEPT_H elements are H, padded so that each
starts at a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cnnlstm_fast.kernels.common import load_float32, maximum, sigmoid, tanh, tanh_slope

# ---------------------------------------------------------------- loads and stores


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
def _load_state(rows, u, b_ok, H: tl.constexpr, GIVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A state or its gradient in float32, zeros where none is GIVEN."""
    state = tl.full((BM, BN), 0.0, tl.float32)
    if GIVEN:
        state = _load_tile(rows, u, b_ok, H).to(tl.float32)
    return state


@triton.jit
def _load_sequences(lengths_ptr, T, B, DIRECTIONS: tl.constexpr, HAS_LENGTHS: tl.constexpr, BM: tl.constexpr):
    """The program's (direction, whether it is the reverse one, sequences, which exist, lengths, steps).

    No length is negative or beyond the last step whatever is given. ``steps`` is the longest.
    """
    pid = tl.program_id(0)
    direction = (pid % DIRECTIONS).to(tl.int64)
    reverse = direction == 1
    b = (pid // DIRECTIONS * BM + tl.arange(0, BM)).to(tl.int64)
    b_ok = b < B
    length = tl.where(b_ok, T, 0)
    steps = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b, mask=b_ok, other=0)
        length = tl.minimum(tl.maximum(length, 0), T).to(tl.int32)
        steps = tl.reduce(length, 0, maximum)
    return direction, reverse, b, b_ok, length, steps


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
        b0 = load_float32(bi_ptr + u, ok) + load_float32(bh_ptr + u, ok)
        b1 = load_float32(bi_ptr + H + u, ok) + load_float32(bh_ptr + H + u, ok)
        b2 = load_float32(bi_ptr + 2 * H + u, ok)
        if GATES == 4:
            b2 += load_float32(bh_ptr + 2 * H + u, ok)
            b3 = load_float32(bi_ptr + 3 * H + u, ok) + load_float32(bh_ptr + 3 * H + u, ok)
        else:
            b3 = load_float32(bh_ptr + 2 * H + u, ok)
    return b0, b1, b2, b3


# ---------------------------------------------------------------- forward


@triton.jit
def _cell(
    a0, a1, a2, a3, g0, g1, g2, g3, b0, b1, b2, b3, h, c, active, out_rows, saved_rows, u, b_ok,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A tile's step from the products ``a``, inputs ``g`` and biases ``b``: stores it, returns (h', c')."""
    a0 += g0.to(tl.float32) + b0[None, :]
    a1 += g1.to(tl.float32) + b1[None, :]
    if GATES == 4:
        s0 = sigmoid(a0)
        s1 = sigmoid(a1)
        s2 = tanh(a2 + (g2.to(tl.float32) + b2[None, :]))
        s3 = sigmoid(a3 + (g3.to(tl.float32) + b3[None, :]))
        new_c = s1 * c + s0 * s2
        new_h = s3 * tanh(new_c)
        if KEEP:
            _store_tile(saved_rows + 4 * KEPT_H, u, active, new_c, H)
        c = tl.where(active[:, None], new_c, c)
    else:
        s0 = sigmoid(a0)
        s1 = sigmoid(a1)
        s3 = a2 + b3[None, :]
        s2 = tanh(g2.to(tl.float32) + b2[None, :] + s0 * s3)
        new_h = s2 + s1 * (h - s2)
    if KEEP:
        _store_gates(saved_rows, u, active, s0, s1, s2, s3, H, KEPT_H)
    _store_tile(out_rows, u, b_ok, tl.where(active[:, None], new_h, 0.0), H)
    return tl.where(active[:, None], new_h, h), c


@triton.jit
def _forward_resident(
    gx_rows, w_ptr, bi_ptr, bh_ptr, h0_ptr, c0_ptr, reset_ptr, out_rows, hn_ptr, cn_ptr, saved_rows,
    at_state, b, b_ok, length, steps, reverse, saved_step, x_t, o_t, r_t, r_b,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_RESET: tl.constexpr, KEEP: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All steps with the state in registers and the weights on chip: BN covers the H units."""
    HAS_C: tl.constexpr = HAS_STATE and GATES == 4
    u = tl.arange(0, BN)
    # Transposed: [unit before, unit after].
    w0 = tl.trans(_load_weight(w_ptr, 0, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
    w1 = tl.trans(_load_weight(w_ptr, 1, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
    w2 = tl.trans(_load_weight(w_ptr, 2, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
    w3 = w2
    if GATES == 4:
        w3 = tl.trans(_load_weight(w_ptr, 3, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT))
    h = _load_state(h0_ptr + at_state, u, b_ok, H, HAS_STATE, BM, BN)
    c = _load_state(c0_ptr + at_state, u, b_ok, H, HAS_C, BM, BN)
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
    _store_tile(hn_ptr + at_state, u, b_ok, h, H)
    if GATES == 4:
        _store_tile(cn_ptr + at_state, u, b_ok, c, H)


@triton.jit
def _streamed_products(
    w_ptr, h_rows, n, going_on, UNITS,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h times the weights of units ``n`` to n + BN, by gate: [BM, BN]. Where not ``going_on``, h is zero."""
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
    return a0, a1, a2, a3


@triton.jit
def _forward_streaming(
    gx_rows, w_ptr, bi_ptr, bh_ptr, h0_ptr, c0_ptr, reset_ptr, out_rows, hn_ptr, cn_ptr, saved_rows,
    state_ptr, at_state, b, b_ok, length, steps, reverse, B, UNITS, saved_step, x_t, o_t, r_t, r_b,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, DIRECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_RESET: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps with h in two buffers by turns, c in the memory of the result, and weights from the cache."""
    HAS_C: tl.constexpr = HAS_STATE and GATES == 4
    other = (B * (DIRECTIONS * H)).to(tl.int64)  # from one buffer to the other
    for n in range(0, UNITS, BN):
        u = n + tl.arange(0, BN)
        h = _load_state(h0_ptr + at_state, u, b_ok, H, HAS_STATE, BM, BN)
        c = _load_state(c0_ptr + at_state, u, b_ok, H, HAS_C, BM, BN)
        _store_tile(state_ptr + at_state, u, b_ok, h, H)
        if GATES == 4:
            _store_tile(cn_ptr + at_state, u, b_ok, c, H)
    tl.debug_barrier()
    for s in range(steps):
        t = tl.where(reverse, steps - 1 - s, s).to(tl.int64)
        active = t < length
        restart = _load_reset(reset_ptr, b, t, r_t, r_b, active, HAS_RESET)
        going_on = b_ok & (restart == 0)
        h_rows = state_ptr + s % 2 * other + at_state
        for n in range(0, UNITS, BN):
            u = n + tl.arange(0, BN)
            g0, g1, g2, g3 = _load_gates(gx_rows + t * x_t, u, active, H, H, GATES)
            a0, a1, a2, a3 = _streamed_products(
                w_ptr, h_rows, n, going_on, UNITS, H, KEPT_H, GATES, PRECISION, FLOAT32_PRODUCT,
                BM, BN, BK, STAGES,
            )  # fmt: skip
            h = _load_tile(h_rows, u, going_on, H)
            c = h
            if GATES == 4:
                c = _load_tile(cn_ptr + at_state, u, going_on, H)
            b0, b1, b2, b3 = _load_biases(bi_ptr, bh_ptr, u, H, GATES, HAS_BIAS, BN)
            h, c = _cell(
                a0, a1, a2, a3, g0, g1, g2, g3, b0, b1, b2, b3, h, c, active,
                out_rows + t * o_t, saved_rows + t * saved_step, u, b_ok, H, KEPT_H, GATES, KEEP,
            )  # fmt: skip
            _store_tile(state_ptr + (1 - s % 2) * other + at_state, u, b_ok, h, H)
            if GATES == 4:
                _store_tile(cn_ptr + at_state, u, b_ok, c, H)
        tl.debug_barrier()
    for n in range(0, UNITS, BN):
        u = n + tl.arange(0, BN)
        h = _load_tile(state_ptr + steps % 2 * other + at_state, u, b_ok, H)
        _store_tile(hn_ptr + at_state, u, b_ok, h, H)


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

    gx                  (T, B, DIRECTIONS * GATES * H), the first two by strides
    w                   (DIRECTIONS, GATES * H, KEPT_H)
    bi, bh              (DIRECTIONS, GATES * H)
    h0, c0, hn, cn      (DIRECTIONS, B, H), the last two float32
    saved               (DIRECTIONS, T, B, 5 or 4, KEPT_H): the four gates and an LSTM's c
    state               (2, DIRECTIONS, B, H): h before and after a step, where weights stream

    A GRU's four gates are r, z, n and v. UNITS is H, as an argument because the assembler unrolls constant
    loops until the registers are gone.
    """
    SAVED: tl.constexpr = 5 if GATES == 4 else 4
    direction, reverse, b, b_ok, length, steps = _load_sequences(
        lengths_ptr, T, B, DIRECTIONS, HAS_LENGTHS, BM
    )
    gx_rows = gx_ptr + direction * (GATES * H) + b * x_b
    out_rows = out_ptr + direction * H + b * o_b
    saved_step = B.to(tl.int64) * (SAVED * KEPT_H)
    saved_rows = saved_ptr + direction * T * saved_step + b * (SAVED * KEPT_H)
    at_state = direction * (B * H) + b * H
    w_ptr += direction * (GATES * H * KEPT_H)
    bi_ptr += direction * (GATES * H)
    bh_ptr += direction * (GATES * H)
    if RESIDENT:
        _forward_resident(
            gx_rows, w_ptr, bi_ptr, bh_ptr, h0_ptr, c0_ptr, reset_ptr, out_rows, hn_ptr, cn_ptr, saved_rows,
            at_state, b, b_ok, length, steps, reverse, saved_step, x_t, o_t, r_t, r_b,
            H, KEPT_H, GATES, HAS_BIAS, HAS_STATE, HAS_RESET, KEEP, AHEAD, PRECISION, FLOAT32_PRODUCT, BM, BN,
        )  # fmt: skip
    else:
        _forward_streaming(
            gx_rows, w_ptr, bi_ptr, bh_ptr, h0_ptr, c0_ptr, reset_ptr, out_rows, hn_ptr, cn_ptr, saved_rows,
            state_ptr, at_state, b, b_ok, length, steps, reverse, B, UNITS, saved_step, x_t, o_t, r_t, r_b,
            H, KEPT_H, GATES, DIRECTIONS, HAS_BIAS, HAS_STATE, HAS_RESET, KEEP, PRECISION, FLOAT32_PRODUCT,
            BM, BN, BK, STAGES,
        )  # fmt: skip

    if HAS_LENGTHS:
        for past in range(T - steps):
            t = (steps + past).to(tl.int64)
            for n in range(0, UNITS, BN):
                zeros = tl.full((BM, BN), 0.0, tl.float32)
                _store_tile(out_rows + t * o_t, n + tl.arange(0, BN), b_ok, zeros, H)


# ---------------------------------------------------------------- backward


@triton.jit
def _gate_grads(s0, s1, s2, s3, c, before_h, before_c, dh, dc, active, GATES: tl.constexpr):
    """The gradients of the four gates of ``saved``, of c before, and of h before without what products add.

    A GRU's four are r, z, n and v. The gates of a sequence that is not ``active`` have gradient zero.
    """
    if GATES == 4:
        tanh_c = tanh(c)
        through = dc + dh * s3 * tanh_slope(c, tanh_c)
        d0 = through * s2 * s0 * (1.0 - s0)
        d1 = through * before_c * s1 * (1.0 - s1)
        d2 = through * s0 * (1.0 - s2 * s2)
        d3 = dh * tanh_c * s3 * (1.0 - s3)
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
    """(gates, h and c before, gradient of the output) of a tile's step ``t`` without its resets: [BM, BN]."""
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


@triton.jit
def _backward_resident(
    grad_rows, grad_hn_ptr, grad_cn_ptr, w_ptr, h0_rows, c0_rows, reset_ptr, out_rows, saved_rows,
    dgates_rows, before_rows, dh_ptr, dc_ptr,
    at_state, b, b_ok, length, steps, reverse, saved_step, g_t, g_u, o_t, r_t, r_b, d_t,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_GRAD_H: tl.constexpr, HAS_GRAD_C: tl.constexpr,
    KEEP_BEFORE: tl.constexpr, PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All steps with dh and dc in registers and the weights on chip: BN covers the H units."""
    NEED_BEFORE: tl.constexpr = KEEP_BEFORE or GATES == 3
    u = tl.arange(0, BN)
    w0 = _load_weight(w_ptr, 0, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
    w1 = _load_weight(w_ptr, 1, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
    w2 = _load_weight(w_ptr, 2, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
    w3 = w2
    if GATES == 4:
        w3 = _load_weight(w_ptr, 3, 0, 0, H, KEPT_H, BN, BN, FLOAT32_PRODUCT)
    t = tl.where(reverse, 0, steps - 1).to(tl.int64)
    active = (t >= 0) & (t < length)  # sequences of no length have no last step
    dh = _load_state(grad_hn_ptr + at_state, u, b_ok, H, HAS_GRAD_H, BM, BN)
    dc = _load_state(grad_cn_ptr + at_state, u, b_ok, H, HAS_GRAD_C, BM, BN)
    c = tl.full((BM, BN), 0.0, tl.float32)
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
    _store_tile(dh_ptr + at_state, u, b_ok, dh, H)
    if GATES == 4:
        _store_tile(dc_ptr + at_state, u, b_ok, dc, H)


@triton.jit
def _streamed_grad(
    dh, w_ptr, dgates_rows, n, active, UNITS,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr,
    PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dh of units ``n`` to n + BN, plus the gates' gradients times the weights: [BM, BN]."""
    for k in tl.range(0, UNITS, BK, num_stages=STAGES):
        k_tile = k + tl.arange(0, BK)
        d0, d1, d2, d3 = _load_gates(dgates_rows, k_tile, active, H, H, 4)
        w0 = _load_weight(w_ptr, 0, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
        dh = tl.dot(d0.to(w0.dtype), w0, dh, input_precision=PRECISION)
        w1 = _load_weight(w_ptr, 1, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
        dh = tl.dot(d1.to(w0.dtype), w1, dh, input_precision=PRECISION)
        w2 = _load_weight(w_ptr, 2, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
        if GATES == 4:
            dh = tl.dot(d2.to(w0.dtype), w2, dh, input_precision=PRECISION)
            w2 = _load_weight(w_ptr, 3, k, n, H, KEPT_H, BK, BN, FLOAT32_PRODUCT)
        dh = tl.dot(d3.to(w0.dtype), w2, dh, input_precision=PRECISION)
    return dh


@triton.jit
def _backward_streaming(
    grad_rows, grad_hn_ptr, grad_cn_ptr, w_ptr, h0_rows, c0_rows, reset_ptr, out_rows, saved_rows,
    dgates_rows, before_rows, dh_ptr, dc_ptr,
    at_state, b, b_ok, length, steps, reverse, UNITS, saved_step, g_t, g_u, o_t, r_t, r_b, d_t,
    H: tl.constexpr, KEPT_H: tl.constexpr, GATES: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_GRAD_H: tl.constexpr, HAS_GRAD_C: tl.constexpr,
    KEEP_BEFORE: tl.constexpr, PRECISION: tl.constexpr, FLOAT32_PRODUCT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps with dh and dc in the memory of the results, and weights from the cache."""
    NEED_BEFORE: tl.constexpr = KEEP_BEFORE or GATES == 3
    for n in range(0, UNITS, BN):
        u = n + tl.arange(0, BN)
        dh = _load_state(grad_hn_ptr + at_state, u, b_ok, H, HAS_GRAD_H, BM, BN)
        dc = _load_state(grad_cn_ptr + at_state, u, b_ok, H, HAS_GRAD_C, BM, BN)
        _store_tile(dh_ptr + at_state, u, b_ok, dh, H)
        if GATES == 4:
            _store_tile(dc_ptr + at_state, u, b_ok, dc, H)
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
            dh = _load_tile(dh_ptr + at_state, u, b_ok, H)
            dc = dh
            c = dh
            if GATES == 4:
                dc = _load_tile(dc_ptr + at_state, u, b_ok, H)
                c = _load_tile(saved_rows + t * saved_step + 4 * KEPT_H, u, active, H)
            d0, d1, d2, d3, dc, dh = _gate_grads(
                s0, s1, s2, s3, c, before_h, before_c, dh + grad, dc, active, GATES
            )
            _store_gates(dgates_rows + t * d_t * (4 * H), u, b_ok, d0, d1, d2, d3, H, H)
            if KEEP_BEFORE:
                kept = tl.where(active[:, None], before_h, 0.0)
                _store_tile(before_rows + t * d_t * H, u, b_ok, kept, H)
            _store_tile(dh_ptr + at_state, u, b_ok, dh, H)
            if GATES == 4:
                if HAS_RESET:
                    dc = tl.where(restart[:, None], 0.0, dc)
                _store_tile(dc_ptr + at_state, u, b_ok, dc, H)
        tl.debug_barrier()
        for n in range(0, UNITS, BN):
            u = n + tl.arange(0, BN)
            dh = _load_tile(dh_ptr + at_state, u, b_ok, H)
            dh = _streamed_grad(
                dh, w_ptr, dgates_rows + t * d_t * (4 * H), n, active, UNITS,
                H, KEPT_H, GATES, PRECISION, FLOAT32_PRODUCT, BN, BK, STAGES,
            )  # fmt: skip
            if HAS_RESET:
                dh = tl.where(restart[:, None], 0.0, dh)
            _store_tile(dh_ptr + at_state, u, b_ok, dh, H)
        tl.debug_barrier()


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
    """The gradients of the gates of BM sequences in one direction, and of their initial states.

    before              (T, B, DIRECTIONS, H): h before every step; strides ``d_t, d_b`` count rows of H
    dgates              (T, B, DIRECTIONS, 4 H): the gradients of the gates in ``saved``
    dh, dc              (DIRECTIONS, B, H), float32: the gradients of the initial states

    The parameters' gradients are products of the first two. Other tensors are as in `forward_kernel`.
    """
    SAVED: tl.constexpr = 5 if GATES == 4 else 4
    direction, reverse, b, b_ok, length, steps = _load_sequences(
        lengths_ptr, T, B, DIRECTIONS, HAS_LENGTHS, BM
    )
    grad_rows = grad_ptr + direction * H * g_u + b * g_b
    out_rows = out_ptr + direction * H + b * o_b
    saved_step = B.to(tl.int64) * (SAVED * KEPT_H)
    saved_rows = saved_ptr + direction * T * saved_step + b * (SAVED * KEPT_H)
    dgates_rows = dgates_ptr + direction * (4 * H) + b * d_b * (4 * H)
    before_rows = before_ptr + direction * H + b * d_b * H
    at_state = direction * (B * H) + b * H
    h0_rows = h0_ptr + at_state
    c0_rows = c0_ptr + at_state
    w_ptr += direction * (GATES * H * KEPT_H)
    if RESIDENT:
        _backward_resident(
            grad_rows, grad_hn_ptr, grad_cn_ptr, w_ptr, h0_rows, c0_rows, reset_ptr, out_rows, saved_rows,
            dgates_rows, before_rows, dh_ptr, dc_ptr,
            at_state, b, b_ok, length, steps, reverse, saved_step, g_t, g_u, o_t, r_t, r_b, d_t,
            H, KEPT_H, GATES, HAS_STATE, HAS_RESET, HAS_GRAD, HAS_GRAD_H, HAS_GRAD_C, KEEP_BEFORE,
            PRECISION, FLOAT32_PRODUCT, BM, BN,
        )  # fmt: skip
    else:
        _backward_streaming(
            grad_rows, grad_hn_ptr, grad_cn_ptr, w_ptr, h0_rows, c0_rows, reset_ptr, out_rows, saved_rows,
            dgates_rows, before_rows, dh_ptr, dc_ptr,
            at_state, b, b_ok, length, steps, reverse, UNITS, saved_step, g_t, g_u, o_t, r_t, r_b, d_t,
            H, KEPT_H, GATES, HAS_STATE, HAS_RESET, HAS_GRAD, HAS_GRAD_H, HAS_GRAD_C, KEEP_BEFORE,
            PRECISION, FLOAT32_PRODUCT, BM, BN, BK, STAGES,
        )  # fmt: skip

    if HAS_LENGTHS:
        for past in range(T - steps):
            t = (steps + past).to(tl.int64)
            for n in range(0, UNITS, BN):
                u = n + tl.arange(0, BN)
                zeros = tl.full((BM, BN), 0.0, tl.float32)
                rows = dgates_rows + t * d_t * (4 * H)
                _store_gates(rows, u, b_ok, zeros, zeros, zeros, zeros, H, H)
                if KEEP_BEFORE:
                    _store_tile(before_rows + t * d_t * H, u, b_ok, zeros, H)
