"""What the host functions ask of their arguments, so that no kernel reads or writes beyond a tensor.

A block's own arguments are checked by :func:`cnnlstm_fast.spec.block_sizes`. Sizes that a trace leaves open
are not compared, which would tie the traced program to them. What lies on the device, argmax codes and
lengths, is not looked at, which would wait for it: the kernels are safe for any such values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnnlstm_fast.ops.conv_block import PLANS, keeps_codes
from cnnlstm_fast.ops.cuda import DTYPES
from cnnlstm_fast.ops.recurrent import MODES, saved_shape
from cnnlstm_fast.spec import MOST_SIZE, block_sizes, codes_shape, is_fixed, padded_size, raw_shape


def _is_shape(found: Sequence[int], expected: Sequence[int]) -> bool:
    return len(found) == len(expected) and all(
        a == b for a, b in zip(found, expected, strict=True) if is_fixed(a, b)
    )


def _once(check: Callable[..., Any]) -> Callable[..., Any]:
    """``check`` of hashable arguments, run once for each; those that a trace leaves open have no hash."""
    known = functools.lru_cache(maxsize=1024)(check)

    def run(*args):
        try:
            return known(*args)
        except TypeError:
            return check(*args)

    return run


def _check_like(op: str, x: Tensor, name: str, t: Tensor | None) -> None:
    """Check that an argument, where it is given, has the input's dtype and device."""
    if t is None:
        return
    if t.dtype != x.dtype:
        raise RuntimeError(f"{op}: input and {name} differ in dtype: got {x.dtype} and {t.dtype}")
    if t.device != x.device:
        raise RuntimeError(f"{op}: input and {name} are on different devices: got {x.device} and {t.device}")


def _check_kept(op: str, x: Tensor, name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Check the type and memory of what a forward kept."""
    traced = not is_fixed(*t.shape)
    if t.dtype != dtype or t.device != x.device or not (traced or t.is_contiguous()):
        raise RuntimeError(
            f"{op}: {name} must be contiguous {dtype} on {x.device}, got {t.dtype} of strides {t.stride()} "
            f"on {t.device}"
        )


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise RuntimeError(
            f"{op}: got {x.dtype}, the CUDA kernels compute float32, bfloat16 and float16 only"
        )


# ---------------------------------------------------------------- the block


def check_block(
    x: Tensor,
    weight: Tensor,
    conv: list[int],
    activation: int,
    act: list[float],
    pool: list[int],
    order: list[int],
    plan: int,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Check what both ops of the block take; the sizes of the convolution's map and of the result."""
    _check_dtype("conv_block", x)
    _check_like("conv_block", x, "weight", weight)
    if plan not in (PLANS["direct"], PLANS["chunked"]):
        raise RuntimeError(f"conv_block: unknown plan {plan}")
    return _block_sizes(x.shape, weight.shape, tuple(conv), tuple(pool), activation, tuple(act), tuple(order))


@_once
def _block_sizes(x_shape, weight_shape, conv, *rest):
    sizes = block_sizes(x_shape, weight_shape, conv, *rest)
    padded = padded_size(x_shape[2:], conv)
    if is_fixed(*padded) and max(padded) > MOST_SIZE:  # positions have 32 bits
        raise RuntimeError(f"conv_block: an input of {padded[0]}x{padded[1]} with its padding is too large")
    return sizes


def check_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    _check_like("conv_block", x, "bias", bias)
    if not _is_shape(bias.shape, weight.shape[:1]):
        raise RuntimeError(
            f"conv_block: expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )


def check_block_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    activation: int,
    pool: list[int],
    order: list[int],
    size: tuple[int, int],
) -> None:
    """Check what the backward takes besides; ``size`` is the result's."""
    op = "conv_block_backward"
    _check_like(op, x, "gradient", grad)
    _check_kept(op, x, "codes", codes, torch.uint8)
    n, co = x.shape[0], weight.shape[0]
    expected = raw_shape(order, n, co, size)
    if not _is_shape(grad.shape, expected):
        raise RuntimeError(f"{op}: the gradient has shape {tuple(grad.shape)}, expected {tuple(expected)}")
    if keeps_codes(activation, pool):
        expected = codes_shape(pool[0] * pool[1] if pool else 1, n, co, size)
        if not _is_shape(codes.shape, expected):
            raise RuntimeError(f"{op}: codes have shape {tuple(codes.shape)}, expected {tuple(expected)}")
    elif codes.shape != (0,):
        raise RuntimeError(f"{op}: this block has no codes, got some of shape {tuple(codes.shape)}")


# ---------------------------------------------------------------- the block with a batch norm


def check_norm(op: str, x: Tensor, channels: int, **given: Tensor | None) -> None:
    """Check a norm's parameters and a bias, each (C,), in the input's dtype or float32, on its device."""
    for name, t in given.items():
        if t is None:
            continue
        if t.dtype not in (x.dtype, torch.float32) or t.device != x.device:
            raise RuntimeError(
                f"{op}: {name} must be {x.dtype} or float32 on {x.device}, got {t.dtype} on {t.device}"
            )
        _check_fits(op, name, t.shape, (channels,))


def check_statistics(mean: Tensor | None, var: Tensor | None, places: int) -> None:
    """Check that statistics are given, or that a batch of so many values per channel has some."""
    if (mean is None) != (var is None):
        raise RuntimeError("conv_norm_block: expected a mean and a variance, or neither")
    if mean is None and is_fixed(places) and places <= 1:
        raise RuntimeError(f"conv_norm_block: expected more than 1 value per channel, got {places}")


def check_fold(weight: Tensor) -> None:
    _check_dtype("fold_norm", weight)
    if weight.dim() != 4 or weight.shape[0] < 1:
        raise RuntimeError(f"fold_norm: expected a 4-d weight of some channels, got {tuple(weight.shape)}")


def check_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    codes: Tensor,
    kept: Tensor,
    map: Tensor,
    pool: list[int],
    order: list[int],
    conv_hw: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Check what the backward takes besides; sizes are those of the convolution's map and of the result."""
    op = "conv_norm_block_backward"
    _check_like(op, x, "gradient", grad)
    n, co = x.shape[0], weight.shape[0]
    result = raw_shape(order, n, co, size)
    found = [("the gradient", grad, result)]
    if pool:
        found += [("kept", kept, result), ("codes", codes, codes_shape(pool[0] * pool[1], n, co, size))]
    if not pool or map.shape != (0,):
        found.append(("the map", map, [n, *conv_hw, co]))
    for name, t, expected in (*found, ("stats", stats, (4, co))):
        _check_fits(op, name, t.shape, expected)
    for name, t, dtype in (
        ("kept", kept, x.dtype),
        ("codes", codes, torch.uint8),
        ("the map", map, x.dtype),
        ("stats", stats, torch.float64),
    ):
        _check_kept(op, x, name, t, dtype)


# ---------------------------------------------------------------- recurrent layers


_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
_LIKE_INPUT = (*_WEIGHTS, *(f"{name}_r" for name in _WEIGHTS), "h0", "c0")


def check_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor | None],
    reset: Tensor | None,
    lengths: Tensor | None,
    mode: int,
    batch_first: bool,
) -> None:
    """Check what both ops of a recurrent layer take; ``weights`` are all ten."""
    op = "recurrent_layer"
    _check_dtype(op, x)
    given = *weights, h0, c0
    for name, t in zip(_LIKE_INPUT, given, strict=True):
        _check_like(op, x, name, t)
    shapes = (None if t is None else t.shape for t in (*given, reset, lengths))
    _check_layer_shapes(x.shape, mode, bool(batch_first), *shapes)
    if reset is not None and (reset.dtype != torch.bool or reset.device != x.device):
        raise RuntimeError(f"{op}: reset must be bool on {x.device}, got {reset.dtype} on {reset.device}")
    if lengths is not None:
        _check_lengths(lengths, x.shape[int(batch_first)], x.device)


@_once
def _check_layer_shapes(x, mode, batch_first, *given):
    weights = given[:10]
    op = "recurrent_layer"
    if mode not in MODES.values():
        raise RuntimeError(f"{op}: unknown mode {mode}")
    if len(x) != 3:
        raise RuntimeError(f"{op}: expected a 3-d input, got {len(x)}-d")
    gates, w_hh, reverse = 4 if mode == MODES["LSTM"] else 3, weights[1], weights[5:]
    if len(w_hh) != 2 or w_hh[0] % gates:
        raise RuntimeError(f"{op}: w_hh has no whole gates, got {tuple(w_hh)} for {gates} of them")
    (rows, units), inputs = w_hh, x[2]
    if is_fixed(rows, inputs) and min(rows, inputs) < 1:
        raise RuntimeError(f"{op}: sizes must be positive, got w_hh of {tuple(w_hh)} and {inputs} inputs")
    if weights[4] is not None or reverse[4] is not None:
        raise RuntimeError(f"{op}: the CUDA kernels compute no projection, got a w_hr")
    if rows != gates * units:
        raise RuntimeError(f"{op}: w_hh must be square per gate, got {tuple(w_hh)} for {gates} gates")
    if (reverse[0] is None) != (reverse[1] is None):
        raise RuntimeError(f"{op}: the reverse direction lacks a weight")
    directions = 1 if reverse[0] is None else 2
    biases = (*weights[2:4], *(reverse[2:4] if directions == 2 else ()))
    if any((b is None) != (biases[0] is None) for b in biases):
        raise RuntimeError(f"{op}: both directions and both biases must be given alike")
    batch = x[1 - batch_first]
    state = directions, batch, units
    of_direction = ((rows, inputs), (rows, units), (rows,), (rows,), ())
    expected = (*of_direction, *of_direction, state, state, x[:2], (batch,))
    for name, found, shape in zip((*_LIKE_INPUT, "reset", "lengths"), given, expected, strict=True):
        _check_fits(op, name, found, shape)


def _check_fits(op: str, name: str, found: Sequence[int] | None, expected: Sequence[int]) -> None:
    if found is not None and not _is_shape(found, expected):
        raise RuntimeError(
            f"{op}: {name} does not fit the other arguments: got shape {tuple(found)}, expected "
            f"{tuple(expected)}"
        )


def _check_lengths(lengths: Tensor, steps: int, device: torch.device) -> None:
    here = lengths.device.type == "cpu"
    if lengths.dtype != torch.int64 or not (here or lengths.device == device):
        raise RuntimeError(
            f"recurrent_layer: lengths must be int64 on the CPU, got {lengths.dtype} on {lengths.device}"
        )
    # A traced tensor is of another type and has no values.
    if here and type(lengths) is Tensor and lengths.numel():
        least, most = (t.item() for t in torch.aminmax(lengths))
        if least < 0 or most > steps:
            raise RuntimeError(f"recurrent_layer: lengths must lie in 0 to {steps}, got {least} to {most}")


def check_layer_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    w_hh: Tensor,
    w_hh_r: Tensor | None,
    out: Tensor,
    saved: Tensor,
    mode: int,
    batch_first: bool,
) -> None:
    """Check what the backward takes besides; ``grads`` are those of out, h_n and c_n."""
    op = "recurrent_layer_backward"
    for name, t in zip(("grad_out", "grad_h_n", "grad_c_n"), grads, strict=True):
        _check_like(op, x, name, t)
    _check_kept(op, x, "out", out, x.dtype)
    _check_kept(op, x, "saved", saved, torch.float32)
    shapes = (None if t is None else t.shape for t in (*grads, out, saved))
    directions = 1 if w_hh_r is None else 2
    _check_layer_backward_shapes(x.shape, directions, w_hh.shape[1], mode, bool(batch_first), *shapes)


@_once
def _check_layer_backward_shapes(x, directions, units, mode, batch_first, *found):
    batch, steps = x[1 - batch_first], x[batch_first]
    result, state = (*x[:2], directions * units), (directions, batch, units)
    expected = result, state, state, result, saved_shape(mode, directions, steps, batch, units)
    names = "grad_out", "grad_h_n", "grad_c_n", "out", "saved"
    for name, shape, fits in zip(names, found, expected, strict=True):
        _check_fits("recurrent_layer_backward", name, shape, fits)
