"""``lstm`` and ``gru``: validate, choose a plan, call one op per layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from cnnlstm_fast import reference
from cnnlstm_fast.errors import WrongDevice, WrongDtype, WrongShape, WrongStates, WrongType, WrongValue
from cnnlstm_fast.ops import recurrent as op
from cnnlstm_fast.planning import observer
from cnnlstm_fast.planning.recurrent import RECURRENT_PLANS, choose_recurrent, rounds_to_bfloat16, why_library
from cnnlstm_fast.planning.support import records_gradients

__all__ = ["gru", "lstm"]


class Cell(NamedTuple):
    """The differences between an LSTM and a GRU.

    Attributes:
        name: for messages.
        mode: the op's ``mode``.
        gates: how many; a weight has ``gates * hidden`` rows.
        states: how many tensors a state has.
        library: PyTorch's own function.
        reference: the twin in plain PyTorch.
    """

    name: str
    mode: int
    gates: int
    states: int
    library: Callable
    reference: Callable


LSTM = Cell("LSTM", op.MODES["LSTM"], 4, 2, _VF.lstm, reference.lstm)
GRU = Cell("GRU", op.MODES["GRU"], 3, 1, _VF.gru, reference.gru)


class Stack(NamedTuple):
    """How layers are stacked: the keywords of :func:`lstm` that do not depend on the call's data."""

    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    bias: bool = True
    proj_size: int = 0

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def per_direction(self) -> int:
        """Parameters of one direction of one layer."""
        return (4 if self.bias else 2) + (self.proj_size > 0)


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    proj_size: int = 0,
    reset: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    plan: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A stack of LSTM layers over whole sequences.

    ``D`` is 2 if bidirectional, else 1; ``H_out`` is ``proj_size`` or, where that is 0, ``H``.

    Args:
        x: ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``, or one sequence ``(T, I)``. Any strides.
        hx: initial ``(h_0, c_0)`` of shapes ``(num_layers * D, B, H_out)`` and
            ``(num_layers * D, B, H)``, without B for one sequence; zeros if None.
        params: the parameters in ``nn.LSTM``'s order: for each layer, for each direction, ``w_ih``
            ``(4*H, I)``, ``w_hh`` ``(4*H, H_out)``, with ``bias`` ``b_ih`` and ``b_hh`` ``(4*H,)``, with
            ``proj_size`` ``w_hr`` ``(proj_size, H)``. Behind the first layer, I is ``D * H_out``.
        num_layers, bidirectional, batch_first, bias, proj_size: as in ``nn.LSTM``.
        dropout: probability of zeroing what one layer hands to the next, while ``training``.
        training: whether that is done.
        reset: bool, ``(T, B)``, or ``(B, T)`` with ``batch_first``, or ``(T,)``: where True the state,
            the initial one included, is zero before that step, and gradients stop there. The reverse
            direction comes from ``t + 1``, so it is reset there. Behind the end of a sequence it says
            nothing.
        lengths: ``(B,)`` integers from 0 to T, on any device, or ints: steps from there on are not
            part of the sequence. Results there are zero, the final states are those of the last step
            before, and the reverse direction begins there. On another device than the CPU, and while
            compiling, the values are not checked but taken as the nearest that are allowed.
        plan: ``"auto"`` chooses. ``"fused"`` (our kernels), ``"library"`` (PyTorch's own layer, without
            ``reset`` and ``lengths``) and ``"reference"`` (a loop over the steps) are run as asked, or
            refused with the reason.

    Returns:
        ``(out, (h_n, c_n))``: ``out`` is ``(T, B, D * H_out)``, ``(B, T, D * H_out)`` or
        ``(T, D * H_out)``; the final states have the shapes of the initial ones.

    Raises:
        TypeError: an argument or a dtype is of the wrong type.
        ValueError: shapes do not fit, lengths are out of range, a name is unknown, or ``plan`` cannot
            run this call.

    Example:
        >>> layer = nn.LSTM(5, 7, num_layers=2)
        >>> x, lengths = torch.randn(6, 3, 5), [6, 2, 1]
        >>> out, (h_n, c_n) = cf.functional.lstm(
        ...     x, None, list(layer.parameters()), num_layers=2, lengths=lengths
        ... )
        >>> out.shape, h_n.shape, c_n.shape
        (torch.Size([6, 3, 7]), torch.Size([2, 3, 7]), torch.Size([2, 3, 7]))
        >>> bool(out[2:, 1].any())  # behind the end of a sequence
        False
    """
    check_pair(hx)
    stack = Stack(num_layers, bidirectional, batch_first, dropout, training, bias, proj_size)
    out, states = run(LSTM, x, hx, params, stack, reset, lengths, plan)
    return out, (states[0], states[1])


def check_pair(hx) -> None:
    """Raise a ``TypeError`` if ``hx`` is no initial state of an LSTM."""
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise WrongStates(f"an LSTM's initial state is a pair of tensors (h_0, c_0), got {_describe(hx)}")


def gru(
    x: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    reset: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    plan: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers over whole sequences.

    Args:
        x: ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``, or one sequence ``(T, I)``. Any strides.
        hx: initial ``h_0`` of shape ``(num_layers * D, B, H)``, without B for one sequence; zeros if None.
        params: the parameters in ``nn.GRU``'s order: for each layer, for each direction, ``w_ih``
            ``(3*H, I)``, ``w_hh`` ``(3*H, H)``, with ``bias`` ``b_ih`` and ``b_hh`` ``(3*H,)``. Behind the
            first layer, I is ``D * H``.
        num_layers, bidirectional, batch_first, dropout, training, bias, reset, lengths, plan: as in
            :func:`cnnlstm_fast.functional.lstm`.

    Returns:
        ``(out, h_n)``: ``out`` is ``(T, B, D * H)``, ``(B, T, D * H)`` or ``(T, D * H)``; ``h_n`` has the
        shape of ``h_0``.

    Raises:
        TypeError, ValueError: as :func:`cnnlstm_fast.functional.lstm`.

    Example:
        >>> layer = nn.GRU(5, 7)
        >>> reset = torch.rand(6, 3) < 0.2
        >>> out, h_n = cf.functional.gru(torch.randn(6, 3, 5), None, list(layer.parameters()), reset=reset)
        >>> out.shape, h_n.shape
        (torch.Size([6, 3, 7]), torch.Size([1, 3, 7]))
    """
    stack = Stack(num_layers, bidirectional, batch_first, dropout, training, bias)
    out, states = run(GRU, x, None if hx is None else (hx,), params, stack, reset, lengths, plan)
    return out, states[0]


def run(
    cell: Cell,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    params: Sequence[Tensor],
    stack: Stack,
    reset: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    plan: str = "auto",
) -> tuple[Tensor, Sequence[Tensor]]:
    """What :func:`lstm` and :func:`gru` do: ``(out, final states)``."""
    if plan not in RECURRENT_PLANS:
        raise ValueError(f"unknown plan {plan!r}, expected one of {', '.join(RECURRENT_PLANS)}")
    if not isinstance(x, Tensor):
        raise WrongType(f"x must be a tensor, got {_describe(x)}")
    if x.dim() not in (2, 3):
        raise WrongShape(
            f"{cell.name}: got an input of shape {tuple(x.shape)}, expected {_layout(stack, 'I')} or (T, I) "
            "for one sequence: decide what a step is and flatten the rest"
        )
    time, batch = _sizes(x, stack)
    if time == 0:
        raise WrongShape(f"got an input of shape {tuple(x.shape)}, expected at least one step")
    batched = x.dim() == 3
    hidden = _check_params(cell, x.shape[-1], params, stack)
    check_states(hx, state_sizes(cell, hidden, stack), stack, batch if batched else None)
    if reset is not None:
        check_reset(reset, x, stack)
    if lengths is not None:
        lengths = _checked_lengths(lengths, x, time, batch if batched else None)
    if batched:
        return _run(cell, x, hx, params, stack, reset, lengths, plan)
    at = 0 if stack.batch_first else 1
    out, states = _run(
        cell,
        x.unsqueeze(at),
        None if hx is None else [s.unsqueeze(1) for s in hx],
        params,
        stack,
        None if reset is None else reset.unsqueeze(at),
        None if lengths is None else lengths.unsqueeze(0),
        plan,
    )
    return out.squeeze(at), [s.squeeze(1) for s in states]


def run_packed(
    cell: Cell, packed: PackedSequence, hx: Sequence[Tensor] | None, params: Sequence[Tensor], stack: Stack
) -> tuple[PackedSequence, Sequence[Tensor]]:
    """As :func:`run` for a ``PackedSequence``; states are in the order of the caller's batch."""
    x, batch_sizes, sorted_indices, unsorted_indices = packed
    stack = stack._replace(batch_first=False)
    if x.dim() != 2 or not len(batch_sizes):
        raise WrongShape(
            f"got packed data of shape {tuple(x.shape)} and {len(batch_sizes)} steps, expected "
            "(steps of all sequences, I) and at least one step"
        )
    hidden = _check_params(cell, x.shape[-1], params, stack)
    check_states(hx, state_sizes(cell, hidden, stack), stack, int(batch_sizes[0]))
    if hx is not None and sorted_indices is not None:
        hx = [s.index_select(1, sorted_indices) for s in hx]
    data, states = _run(cell, x, hx, params, stack, None, None, "auto", batch_sizes)
    if unsorted_indices is not None:
        states = [s.index_select(1, unsorted_indices) for s in states]
    return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), states


def _run(cell, x, hx, params, stack, reset, lengths, plan, batch_sizes=None):
    """One checked call; with ``batch_sizes`` the input and the result are a ``PackedSequence``'s data."""
    given = x, hx, params
    low = _autocast_dtype(x)
    _check_kinds(cell, *given, of_dtypes=low is None)
    plain = reset is None and lengths is None
    by_onednn = cell is LSTM and batch_sizes is None and not stack.proj_size
    steps = _sizes(x, stack)[0] if batch_sizes is None else len(batch_sizes)
    reason = None
    if plan == "auto":
        onednn_dtype = (low or x.dtype) if by_onednn else None
        reason = why_library(
            x, params[0], plain=plain, gru=cell is GRU, steps=steps, onednn_dtype=onednn_dtype
        )
    if reason is not None:
        chosen = "library"
    else:
        if low is not None:
            own = low
            if low == torch.bfloat16 and x.device.type == "cpu":
                # Where our kernels compute in float32, what is float32 is not rounded first.
                own = low if rounds_to_bfloat16(x, params, stack.proj_size > 0) else torch.float32
            x, params = x.to(own), [p.to(own) for p in params]
            hx = None if hx is None else [s.to(own) for s in hx]
        chosen, reason = choose_recurrent(plan, x, [*params, *(hx or ())], plain=plain)
    if observer.current is not None:
        observer.current.layer_runs(chosen, reason)
    if chosen == "library":
        return _library(cell, *given, stack, batch_sizes)
    if chosen == "fused":
        lengths = lengths if batch_sizes is None else _packed_lengths(batch_sizes)
        out, states = _fused(cell, x, hx, params, stack, reset, lengths)
    else:
        x = x if low is None else x.to(low)
        if batch_sizes is not None:
            x, lengths = _VF._pad_packed_sequence(x, batch_sizes, False, 0.0, len(batch_sizes))
        out, states = _reference(cell, x, *given[1:], stack, reset, lengths)
        if batch_sizes is not None:
            out, _ = _VF._pack_padded_sequence(out, lengths, False)
    if low is not None:
        dtypes = _autocast_results(cell, low, *given[:2], stack, batch_sizes is not None)
        out, *states = (t.to(dtype) for t, dtype in zip((out, *states), dtypes, strict=True))
    return out, states


def _library(cell: Cell, x: Tensor, hx, params, stack: Stack, batch_sizes: Tensor | None):
    """PyTorch's own functions."""
    if hx is None:
        batch = _sizes(x, stack)[1] if batch_sizes is None else int(batch_sizes[0])
        sizes = state_sizes(cell, params[0].shape[0] // cell.gates, stack)
        hx = [x.new_zeros(stack.num_layers * stack.directions, batch, size) for size in sizes]
    state = tuple(hx) if cell is LSTM else hx[0]
    options = (stack.bias, stack.num_layers, stack.dropout, stack.training, stack.bidirectional)
    if batch_sizes is None:
        out, *states = cell.library(x, state, params, *options, stack.batch_first)
    else:
        out, *states = cell.library(x, batch_sizes, state, params, *options)
    return out, states


def _reference(cell: Cell, x: Tensor, hx, params, stack: Stack, reset, lengths):
    keywords = stack._asdict()
    if cell is GRU:
        del keywords["proj_size"]
    state = hx if hx is None or cell is LSTM else hx[0]
    out, state = cell.reference(x, state, params, **keywords, reset=reset, lengths=lengths)
    return out, state if cell is LSTM else (state,)


def _packed_lengths(batch_sizes: Tensor) -> Tensor:
    """Lengths of packed sequences, longest first, from the number of sequences that have each step."""
    ends = batch_sizes - F.pad(batch_sizes[1:], (0, 1))  # (T,): how many sequences end with each step
    last = torch.arange(len(batch_sizes), 0, -1)
    return torch.repeat_interleave(last, ends.flip(0), output_size=int(batch_sizes[0]))


def _fused(cell: Cell, x: Tensor, hx, params, stack: Stack, reset, lengths):
    """Run the layers in turn, one op each.

    The result lies time-major in memory even with ``batch_first``, as PyTorch's does. A 2-d ``x`` is the data
    of a ``PackedSequence``.
    """
    if stack.batch_first:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    final = []
    directions, count = stack.directions, stack.per_direction
    recording = records_gradients()
    rows = -1
    if x.dim() == 2:
        rows = x.shape[0]
    elif recording and lengths is not None and x.device.type == "cpu" and _values_are_readable(lengths):
        rows = sum(lengths.tolist())
    for layer in range(stack.num_layers):
        at = layer * directions
        weights = layer_weights(params[at * count : (at + directions) * count], stack)
        h0, c0 = (None, None) if hx is None else (*(s[at : at + directions] for s in hx), None)[:2]
        tensors = (x, h0, c0, *weights)
        if recording and any(t is not None and t.requires_grad for t in tensors):
            keep_out = layer == stack.num_layers - 1 and not _out_is_kept(cell, x, stack, reset, lengths)
            args = (*tensors, reset, lengths, cell.mode, False, keep_out, rows)
            x, *states = op.RecurrentLayerFunction.apply(*args)
        else:
            x, *states, _ = op.forward_op(*tensors, reset, lengths, cell.mode, False, False)
        final.append(states[: cell.states])
        if stack.dropout and stack.training and layer < stack.num_layers - 1:
            x = F.dropout(x, stack.dropout)
    if stack.batch_first:
        x = x.transpose(0, 1)
    return x, final[0] if len(final) == 1 else [torch.cat(s) for s in zip(*final, strict=True)]


def _out_is_kept(cell: Cell, x: Tensor, stack: Stack, reset, lengths) -> bool:
    """Whether PyTorch's backward reads the result, as cuDNN's and oneDNN's do.

    Writing to the result before the backward is an error then, and ours may read the result too. Elsewhere
    such writes are allowed, and the op keeps a copy of what its backward reads.
    """
    if x.device.type != "cpu":
        return True
    return (
        cell is LSTM
        and not (stack.bidirectional or stack.proj_size)
        and reset is None
        and lengths is None
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch._C._get_mkldnn_enabled()
    )


def layer_weights(params: Sequence[Tensor], stack: Stack) -> list[Tensor | None]:
    """One layer's parameters in the op's order: five a direction, None where there are none."""
    count = stack.per_direction
    weights: list[Tensor | None] = []
    for direction in range(2):
        w = params[direction * count : (direction + 1) * count]
        if not w:
            return [*weights, None, None, None, None, None]
        biases = w[2:4] if stack.bias else (None, None)
        weights += [*w[:2], *biases, w[-1] if stack.proj_size else None]
    return weights


def state_sizes(cell: Cell, hidden: int, stack: Stack) -> tuple[int, ...]:
    """Width of each tensor of a state."""
    return (stack.proj_size or hidden, hidden)[: cell.states]


def _sizes(x: Tensor, stack: Stack) -> tuple[int, int]:
    """(time, batch) of an input, batched or not."""
    if x.dim() == 2:
        return x.shape[0], 1
    return (x.shape[1], x.shape[0]) if stack.batch_first else (x.shape[0], x.shape[1])


def _layout(stack: Stack, last: str | None = None) -> str:
    axes = ["B", "T"] if stack.batch_first else ["T", "B"]
    return f"({', '.join([*axes, last] if last else axes)})"


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _check_stack(stack: Stack) -> None:
    for name, least in (("num_layers", 1), ("proj_size", 0)):
        value = getattr(stack, name)
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be a whole number, got {_describe(value)}") from None
        if value < least:
            raise ValueError(f"got {name}={value}, expected {least} or more")
    try:
        possible = 0 <= stack.dropout <= 1
    except TypeError:
        raise TypeError(f"dropout must be a number, got {_describe(stack.dropout)}") from None
    if not possible:
        raise ValueError(f"got dropout={stack.dropout!r}, expected a probability from 0 to 1")


def _check_params(cell: Cell, input_size: int, params: Sequence[Tensor], stack: Stack) -> int:
    """Check the parameters against each other and the input; returns the hidden size."""
    _check_stack(stack)
    if isinstance(params, Tensor) or not hasattr(params, "__len__"):
        raise TypeError(f"params must be a list of tensors, got {_describe(params)}")
    layers, directions, count = stack.num_layers, stack.directions, stack.per_direction
    if len(params) != layers * directions * count:
        names = "w_ih, w_hh" + ", b_ih, b_hh" * stack.bias + ", w_hr" * (stack.proj_size > 0)
        raise WrongShape(
            f"got {len(params)} parameters, expected {layers * directions * count}: {names} for each of "
            f"{layers} layers and {directions} directions"
        )
    for p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters must be tensors, got {_describe(p)}")
    rows = params[0].shape[0] if params[0].dim() else 0
    hidden = rows // cell.gates
    if hidden == 0 or rows % cell.gates:
        raise WrongShape(
            f"got w_ih of shape {tuple(params[0].shape)}, expected {cell.gates} * hidden rows for a "
            f"{cell.name}"
        )
    out = stack.proj_size or hidden
    if input_size == 0:
        raise WrongShape(
            f"the {cell.name}'s input has no features in its last dimension, expected at least one"
        )
    if params[0].dim() == 2 and params[0].shape[1] != input_size:
        raise WrongShape(
            f"the {cell.name} expects {params[0].shape[1]} features but the input has {input_size} in its "
            f"last dimension: build it with input_size={input_size}, or move the features there"
        )
    for at in range(layers * directions):
        wide = input_size if at < directions else directions * out
        expected: list[tuple[int, ...]] = [(rows, wide), (rows, out)]
        if stack.bias:
            expected += [(rows,), (rows,)]
        if stack.proj_size:
            expected.append((out, hidden))
        for p, shape in zip(params[at * count : (at + 1) * count], expected, strict=True):
            if p.shape != shape:
                raise WrongShape(
                    f"got a parameter of shape {tuple(p.shape)} in layer {at // directions}, expected "
                    f"{shape} for a {cell.name} of {hidden} hidden units"
                )
    return hidden


def check_states(hx, sizes: tuple[int, ...], stack: Stack, batch) -> None:
    if hx is None:
        return
    rows = stack.num_layers * stack.directions
    for name, s, size in zip(("h_0", "c_0"), hx, sizes, strict=False):
        if not isinstance(s, Tensor):
            raise WrongType(f"{name} must be a tensor, got {_describe(s)}")
        shape = (rows, size) if batch is None else (rows, batch, size)
        if s.shape != shape:
            raise WrongShape(
                f"got an initial state {name} of shape {tuple(s.shape)}, expected {shape} = (layers * "
                f"directions, {'' if batch is None else 'batch, '}units): states are never batch-first"
            )


def check_reset(reset: Tensor, x: Tensor, stack: Stack) -> None:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool tensor, got {_describe(reset)}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be bool, got {str(reset.dtype)[6:]}: pass reset.bool()")
    if reset.shape != x.shape[:-1]:
        names = "(T,)" if x.dim() == 2 else _layout(stack)
        hint = ""
        if reset.shape == x.shape[-2::-1]:
            hint = ": pass reset.T, since reset lies as the input does"
        raise WrongShape(
            f"got reset of shape {tuple(reset.shape)}, expected {tuple(x.shape[:-1])} = {names}{hint}"
        )
    if reset.device != x.device:
        raise WrongValue(
            f"reset is on {reset.device} and the input on {x.device}: pass reset.to({str(x.device)!r})"
        )


def _checked_lengths(lengths, x: Tensor, time: int, batch) -> Tensor:
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"lengths must be a tensor of integers, got {_describe(lengths)}") from None
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {str(lengths.dtype)[6:]}: pass lengths.long()")
    shape = () if batch is None else (batch,)
    if lengths.shape != shape:
        raise WrongShape(
            f"got lengths of shape {tuple(lengths.shape)}, expected {shape}: one length for each sequence"
        )
    if _values_are_readable(lengths) and lengths.numel():
        values = lengths.tolist() if lengths.dim() else [lengths.item()]
        if min(values) < 0 or max(values) > time:
            raise WrongValue(
                f"got lengths from {min(values)} to {max(values)}, expected 0 to {time}, the steps of "
                f"the input: pass lengths.clamp(0, {time}) or a longer input"
            )
        return lengths.to(device=x.device, dtype=torch.int64)
    return lengths.to(device=x.device, dtype=torch.int64).clamp(0, time)


def _values_are_readable(t: Tensor) -> bool:
    """Whether a tensor's values can be read without synchronising with a device."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(t) is Tensor
        and not torch._C._are_functorch_transforms_active()
    )


def _check_kinds(cell: Cell, x: Tensor, hx, params, *, of_dtypes: bool) -> None:
    """Check that all tensors have the input's device and, if ``of_dtypes``, its dtype."""
    dtype, device = x.dtype, x.device
    for name, tensors in (("the parameters are", params), ("the initial state is", hx or ())):
        for t in tensors:
            if t.dtype != dtype and of_dtypes:
                raise WrongDtype(
                    f"the {cell.name}'s input is {str(dtype)[6:]} but {name} {str(t.dtype)[6:]}: convert "
                    "with .to(dtype)"
                )
            if t.device != device:
                raise WrongDevice(
                    f"the {cell.name}'s input is on {device} but {name} on {t.device}: move them with "
                    ".to(device)"
                )


AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts a layer with this input, or None."""
    kind = x.device.type
    if kind not in AUTOCAST_DEVICES or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _autocast_results(cell: Cell, low: torch.dtype, x: Tensor, hx, stack: Stack, packed: bool):
    """The dtypes of (out, *states) that PyTorch gives under autocast.

    On the CPU only a whole LSTM layer in oneDNN is cast; elsewhere the matrix products are, whose
    results meet a state in the dtype that it was given in.
    """
    if x.device.type != "cpu" or (cell is LSTM and not packed and not stack.proj_size):
        return (low,) * (1 + cell.states)
    wide = [torch.promote_types(t.dtype, low) for t in (hx or (x,) * cell.states)]
    if stack.proj_size:
        return low, low, wide[-1]
    return wide[0], *wide
