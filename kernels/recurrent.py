"""Recurrent layers in Triton: LSTM and GRU with resets and lengths, one launch for all their steps.

For direction d, sequence b and step t, with ``gx = x W_ih^T`` of all steps from one library product,
``h, c`` the state before the step (zero where reset[t], the initial state at a sequence's first step):

    LSTM   i, f, g, o = sigma, sigma, tanh, sigma of gx + b_ih + h W_hh^T + b_hh
           c' = f c + i g,  h' = o tanh(c')
    GRU    r, z = sigma of gx + b_ih + h W_hh^T + b_hh,  v = h W_hn^T + b_hn
           n = tanh(gx_n + b_in + r v),  h' = n + z (h - n)

A step at or past a sequence's length gives zero and leaves the state as it is. So the reverse direction
starts at each sequence's own end. The backward kernel goes through the steps in the other order and stores
the gradients of the gates. The parameters' gradients are products of these over all steps, again the
library's.

A program owns BM sequences of one direction and loops over time, so that programs need not wait for
each other. Where RESIDENT, the state stays in registers and the recurrent weights of all gates, padded
to BN units, in shared memory; loads run a step ahead where the registers allow it (AHEAD). Otherwise
the weights stream from the cache, BK by BN a time, and the state goes through memory that only this
program touches, ordered by a barrier.

A sequence's results do not depend on the others', and every sum has a fixed order.

This file holds the host functions, `recurrent_kernels.py` the kernels that they start.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from cnnlstm_fast.kernels.arguments import INTERPRETED
from cnnlstm_fast.kernels.checks import check_layer, check_layer_backward
from cnnlstm_fast.kernels.launching import launch
from cnnlstm_fast.kernels.recurrent_kernels import backward_kernel, forward_kernel
from cnnlstm_fast.ops.recurrent import saved_shape

#: The values of ``mode``.
LSTM, GRU = 0, 1

#: Recurrent weights of one direction of up to so many bytes stay on chip; half as many where rows are
#: padded, because the masks take registers.
RESIDENT_BYTES = 2**17

#: Sequences of a program: the fewest rows of a product.
SEQUENCES = 16


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
    gate_grads = dgates.view(-1, layer.directions, 4 * layer.units).unbind(1)  # of a direction: [rows, 4 H]
    if need_x:
        dx = _grad_input(gate_grads, w_ih, w_ih_r, layer).view(*rows.shape[:2], x.shape[2])
        grads[0] = (dx if by_time == layer.by_time else dx.transpose(0, 1)).contiguous()
    if need_state:
        grads[1] = grads[1] if h0 is None else dh.to(x.dtype)
        grads[2] = grads[2] if c0 is None else dc.to(x.dtype)
    if need_weights:
        inputs = rows.reshape(-1, x.shape[2])
        befores = before.view(-1, layer.directions, layer.units).unbind(1)
        has_bias = b_ih is not None
        for at, g, h in zip((3, 8), gate_grads, befores, strict=False):
            grads[at : at + 2 + 2 * has_bias] = _weight_grads(g, inputs, h, layer, has_bias)
    return tuple(grads)


def _grad_input(gate_grads: tuple[Tensor, ...], w_ih: Tensor, w_ih_r: Tensor | None, layer: _Layer) -> Tensor:
    """The gradient of the input (rows, features), from those of the gates (rows, 4 H) by direction."""
    of_gates = [g.narrow(1, 0, layer.gates * layer.units) for g in gate_grads]
    dx = torch.mm(of_gates[0], w_ih)
    return dx if w_ih_r is None else torch.addmm(dx, of_gates[1], w_ih_r)


def _weight_grads(g: Tensor, inputs: Tensor, h: Tensor, layer: _Layer, has_bias: bool) -> list[Tensor]:
    """Gradients of w_ih, w_hh and the biases, from those of the gates (rows, 4 H), x and h before."""
    of_gates = g.narrow(1, 0, layer.gates * layer.units)
    dw_ih = torch.mm(of_gates.t(), inputs)
    # The two products of a GRU's third gate, of the input and of the state, have gradients of their own.
    shared, apart = g.narrow(1, 0, 2 * layer.units), g.narrow(1, 3 * layer.units, layer.units)
    if layer.mode == LSTM:
        dw_hh = torch.mm(of_gates.t(), h)
    else:
        dw_hh = torch.cat([torch.mm(shared.t(), h), torch.mm(apart.t(), h)])
    if not has_bias:
        return [dw_ih, dw_hh]
    db_ih = of_gates.sum(0)
    db_hh = db_ih.clone() if layer.mode == LSTM else torch.cat([shared.sum(0), apart.sum(0)])
    return [dw_ih, dw_hh, db_ih, db_hh]


class _Layer:
    """Sizes of a layer, and the arguments that its two kernels share."""

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
        """Start a kernel with ``args`` and the arguments that both take."""
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
    """How products of float32 are computed: in TF32 where PyTorch's own flags allow it in a recurrent layer.

    Elsewhere each operand is split into two of TF32, which loses about what rounding to float32 does.
    Products without tensor cores ("ieee") need too many registers for weights that stay on chip.
    """
    if torch.version.hip:
        return "ieee"
    cudnn: Any = torch.backends.cudnn
    return "tf32" if cudnn.rnn.fp32_precision == "tf32" else "tf32x3"
