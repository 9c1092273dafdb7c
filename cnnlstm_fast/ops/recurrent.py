"""The recurrent layer op: one LSTM or GRU layer, both directions, all time steps; and its backward.

Schema terms (``D`` directions, ``B`` batch, ``T`` steps, ``I`` inputs, ``H`` hidden units, ``P`` the
width of the output: ``proj_size`` or ``H``):

- ``x``: (B, T, I) if ``batch_first`` else (T, B, I), any strides; on the CPU also a ``PackedSequence``'s
  data, (rows, I), with ``lengths`` that fall and ``rows`` in all.
- ``h0`` (D, B, P), ``c0`` (D, B, H; LSTM only): the initial state; None is zeros.
- the weights of each direction as :class:`torch.nn.LSTM` and :class:`torch.nn.GRU` shape and order
  them; those of the reverse direction (``_r``) are None in a unidirectional layer.
- ``reset``: bool, (B, T) or (T, B) as ``batch_first`` says: before the step at which it stands is
  processed, in either direction, the state is zero.
- ``lengths``: (B,) int64 on the CPU, 0 to T. Steps past a sequence's end give zeros and leave the state;
  the reverse direction begins at the last valid step.
- ``mode``: a value of :data:`MODES`.
- ``keep``: also return what the backward reads, and with ``keep_out`` (on the CPU) the outputs too, so that
  it does not read ``out``, which its owner may change.
- ``rows``: how many steps all sequences have together, if only these are to be kept (on the CPU); -1: T * B.

The forward gives ``out`` as ``x`` but with D * P features, ``h_n`` (D, B, P), ``c_n`` (D, B, H; empty for a
GRU), and ``saved``, empty or float32 of :func:`saved_shape`: an LSTM's activated gates i, f, g, o
and cells, a GRU's gates r, z, n and W_hn h + b_hn, and then the outputs, with the units padded to a multiple
of :data:`UNIT_GROUP`. Rows are those of all sequences' first steps, of the longest one's first, then those of
the second steps.

The CPU kernels live in ``csrc/``, the CUDA kernels in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _VF, Tensor

from cnnlstm_fast import reference
from cnnlstm_fast.ops.cuda import register_cuda

MODES = {"LSTM": 0, "GRU": 1}
UNIT_GROUP = 16

_WEIGHTS = (
    "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? w_ih_r, Tensor? w_hh_r, Tensor? b_ih_r, Tensor? b_hh_r, Tensor? w_hr_r"
)
_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    f"recurrent_layer(Tensor x, Tensor? h0, Tensor? c0, {_WEIGHTS}, Tensor? reset, Tensor? lengths, "
    "int mode, bool batch_first, bool keep, bool keep_out=False, int rows=-1) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "recurrent_layer_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor? h0, "
    f"Tensor? c0, {_WEIGHTS}, Tensor? reset, Tensor? lengths, Tensor? out, Tensor saved, int mode, "
    "bool batch_first, bool need_x, bool need_state, bool need_weights) -> ("
    + ", ".join(["Tensor"] * 13)
    + ")"
)

forward_op = torch.ops.cnnlstm_fast.recurrent_layer.default
backward_op = torch.ops.cnnlstm_fast.recurrent_layer_backward.default


def saved_shape(
    mode: int, directions: int, steps: int, batch: int, hidden: int, keep_out: bool = False, rows: int = -1
) -> list[int]:
    """Shape of what a forward keeps: (D, T, B, n, padded H), or (D, rows, n, padded H).

    n is 5 for an LSTM and 4 for a GRU, and one more with ``keep_out``.
    """
    padded = -(-hidden // UNIT_GROUP) * UNIT_GROUP
    sequences = [steps, batch] if rows == -1 else [rows]
    return [directions, *sequences, (5 if mode == MODES["LSTM"] else 4) + keep_out, padded]


@torch.library.register_fake("cnnlstm_fast::recurrent_layer", lib=_lib)
def _(
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, w_ih_r, w_hh_r, b_ih_r, b_hh_r, w_hr_r,
    reset, lengths, mode, batch_first, keep, keep_out=False, rows=-1,
):  # fmt: skip
    directions = 1 if w_ih_r is None else 2
    if x.dim() == 2:
        batch, steps = lengths.shape[0], x.shape[0]
    else:
        batch, steps = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
    width, hidden = w_hh.shape[1], w_hh.shape[0] // (4 if mode == MODES["LSTM"] else 3)
    c_n = [directions, batch, hidden] if mode == MODES["LSTM"] else [0]
    saved = saved_shape(mode, directions, steps, batch, hidden, keep_out, rows) if keep else [0]
    return (
        x.new_empty([*x.shape[:-1], directions * width]),
        x.new_empty([directions, batch, width]),
        x.new_empty(c_n),
        x.new_empty(saved, dtype=torch.float32),
    )


@torch.library.register_fake("cnnlstm_fast::recurrent_layer_backward", lib=_lib)
def _(grad_out, grad_h_n, grad_c_n, x, h0, c0, *rest):
    weights, (need_x, need_state, need_weights) = rest[:10], rest[-3:]

    def like(t, needed):
        return x.new_empty([0]) if t is None or not needed else x.new_empty(t.shape)

    state = (like(h0, need_state), like(c0, need_state))
    grad_x = like(x, need_x)
    if need_x and x.device.type == "cpu" and x.dim() == 3 and x.stride(0) < x.stride(1):
        grad_x = x.new_empty([x.shape[1], x.shape[0], x.shape[2]]).transpose(0, 1)
    return grad_x, *state, *(like(w, need_weights) for w in weights)


class RecurrentLayerFunction(torch.autograd.Function):
    """Autograd around the op; entered only when a gradient is needed. Returns out, h_n, c_n.

    The program may write to tensors that the backward does not read, as with PyTorch's own layers.
    """

    @staticmethod
    def forward(ctx, x, h0, c0, *args):
        # args: the ten weights, reset, lengths, mode, batch_first, keep_out, rows. One method instead of
        # setup_context, which costs 15 us: under torch.func, which needs that, the reference plan runs.
        weights, (reset, lengths, mode, batch_first, keep_out, rows) = args[:10], args[10:]
        more = (keep_out, rows) if keep_out or rows != -1 else ()
        out, h_n, c_n, saved = forward_op(x, h0, c0, *weights, reset, lengths, mode, batch_first, True, *more)
        ctx.mode, ctx.batch_first = mode, batch_first
        ctx.set_materialize_grads(False)
        if mode != MODES["LSTM"]:
            ctx.mark_non_differentiable(c_n)
        inputs = (x, h0, c0, *weights)
        reads = _reads(ctx.needs_input_grad[:13], mode, x.dim() == 2 or x.shape[int(batch_first)] > 1)
        own_x = own_h0 = None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if reads[0] and not x.is_contiguous():  # batch first: PyTorch computes with a copy
                reads[0], own_x = False, x.detach().clone()
            if h0 is not None and mode != MODES["LSTM"] and not reads[1]:
                own_h0 = h0.detach().clone()
        ctx.unread = {i: _Unread(t) for i, t in enumerate(inputs) if not reads[i] and t is not None}
        ctx.save_for_backward(
            *[t if read else None for t, read in zip(inputs, reads, strict=True)],
            reset, lengths, None if keep_out else out, saved, own_x, own_h0,
        )  # fmt: skip
        return out, h_n, c_n

    @staticmethod
    def backward(ctx, grad_out, grad_h_n, grad_c_n):
        *read, reset, lengths, out, saved, own_x, own_h0 = ctx.saved_tensors
        nothing = (None,) * 6  # reset, lengths, mode, batch_first, keep_out, rows
        needs = ctx.needs_input_grad[:13]
        if ctx.mode != MODES["LSTM"]:
            grad_c_n = None
        grads_in = (grad_out, grad_h_n, grad_c_n)
        if all(g is None for g in grads_in):
            return *(None,) * 13, *nothing
        again = torch.is_grad_enabled()  # create_graph=True: a backward that can be differentiated
        inputs: list[Tensor | None] = list(read)
        for i, unread in ctx.unread.items():
            inputs[i] = unread.value(again)
        if again:
            grads = _differentiable_backward(
                grads_in, inputs, reset, lengths, ctx.mode, ctx.batch_first, needs
            )
        else:
            inputs[0] = inputs[0] if own_x is None else own_x
            inputs[1] = inputs[1] if own_h0 is None else own_h0
            need_x, need_state, need_weights = needs[0], any(needs[1:3]), any(needs[3:])
            grads = backward_op(
                *grads_in, *inputs, reset, lengths, out, saved, ctx.mode, ctx.batch_first,
                need_x, need_state, need_weights,
            )  # fmt: skip
            if need_x:
                grads = _as_it_lies(grads[0], inputs[0]), *grads[1:]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


def _as_it_lies(grad: Tensor, x: Tensor | None) -> Tensor:
    """The gradient of ``x`` with the strides of ``x``, if that is dense.

    PyTorch's backward of a norm is wrong for a gradient that lies otherwise than the norm's map, which ``x``
    may be a view of.
    """
    if x is None or torch.compiler.is_compiling() or x.is_contiguous() or grad.stride() == x.stride():
        return grad
    like = torch.empty_like(x)
    return like.copy_(grad) if like.stride() == x.stride() else grad


def _reads(needs: Sequence[bool], mode: int, many_steps: bool) -> list[bool]:
    """Which values of x, h0, c0 and the ten weights the backward reads; it reads the shapes of all."""
    if torch.compiler.is_compiling():  # a graph checks no version counters
        return [True] * 13
    of_weights = any(needs[3:])
    direction = [needs[0], many_steps or any(needs[1:3]), False, False, True]
    return [of_weights, of_weights, mode == MODES["LSTM"], *direction, *direction]


class _Unread:
    """An input that only second derivatives read."""

    def __init__(self, t: Tensor):
        self.t = t
        self.version = None if t.is_inference() else t._version

    def value(self, checked: bool) -> Tensor:
        if checked and self.version is not None and self.t._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: a tensor of shape {tuple(self.t.shape)} is at version {self.t._version}, "
                f"expected version {self.version}, because create_graph=True"
            )
        return self.t


def _differentiable_backward(grads_in, inputs, reset, lengths, mode, batch_first, needs):
    """The gradients through the reference, which can be differentiated again."""
    x, h0, c0, *weights = inputs
    directions = 1 if weights[5] is None else 2
    params = [w for w in weights if w is not None]
    options = {
        "num_layers": 1,
        "bidirectional": directions == 2,
        "batch_first": batch_first,
        "bias": weights[2] is not None,
        "reset": reset,
        "lengths": lengths,
    }

    packed, sizes = x.dim() == 2, None
    if packed:
        sizes = (lengths > torch.arange(int(lengths[0])).unsqueeze(1)).sum(1)
        x, _ = _VF._pad_packed_sequence(x, sizes, False, 0.0, len(sizes))

    def zeros(size):
        return x.new_zeros([directions, x.shape[0 if batch_first else 1], size])

    results: tuple[Tensor, ...]
    width = weights[1].shape[1]
    h0 = zeros(width) if h0 is None else h0
    if mode == MODES["LSTM"]:
        hidden = weights[1].shape[0] // 4
        c0 = zeros(hidden) if c0 is None else c0
        proj_size = 0 if weights[4] is None else width
        out, (h_n, c_n) = reference.lstm(x, (h0, c0), params, proj_size=proj_size, **options)
        results = (out, h_n, c_n)
    else:
        results = reference.gru(x, h0, params, **options)
    if packed:
        results = _VF._pack_padded_sequence(results[0], lengths, False)[0], *results[1:]
    pairs = [(r, g) for r, g in zip(results, grads_in, strict=False) if g is not None]
    wanted = [i for i, need in enumerate(needs) if need]
    found = torch.autograd.grad(
        [r for r, _ in pairs],
        [inputs[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    grads: list[Tensor | None] = [None] * 13
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return grads


register_cuda("recurrent_layer", "recurrent", "forward", x_at=0)
register_cuda("recurrent_layer_backward", "recurrent", "backward", x_at=3)
