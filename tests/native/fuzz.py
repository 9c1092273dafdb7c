"""A coverage-guided fuzzer over the ops: ``python tests/native/fuzz.py --seconds 60 [--seed N] [--cases N]``.

Every op of ``torch.ops.cnnlstm_fast`` that :data:`OPS` knows is called directly with valid, mutated and
wrong arguments: ranks, sizes, dtypes, strides, negative, huge and empty values, codes and gradients that
no forward made. A call must raise a RuntimeError, or return what the independent computation gives
where :func:`Op.check` has one. A crash, a sanitizer's report or a wrong result is a finding: the call's
arguments stand in the --journal file, and ``--repeat FILE`` repeats it.

Under ``tests/native/sanitized.py address`` calls are kept and mutated further if they reached edges of the
C++ code, or counts of them, that no call before did (as AFL does); without that build the loop is blind.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cnnlstm_fast import reference
from cnnlstm_fast.ops.conv_block import keeps_codes
from cnnlstm_fast.ops.recurrent import UNIT_GROUP, saved_shape
from cnnlstm_fast.reference import conv_block_by_args
from cnnlstm_fast.spec import map_size, pool_size, raw_shape

HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**62, -(2**62), -1)
#: Sizes that tensors may have where strides are 0, and that no op may take: products of them wrap.
VAST = (2**38 + 1, 2**42 + 2, 2**58 + 2**17, 2**62)
MOST_ELEMENTS = 2**40
DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float64", "float16", "int64", "uint8", "bool", "complex64")
}


# ---------------------------------------------------------------- arguments, as JSON so that they can be kept


def tensor(rng: random.Random, size: list[int], dtype: str = "float32", fill: str = "normal") -> dict:
    how = rng.choice(("plain",) * 6 + ("sliced", "permuted", "expanded", "offset", "flipped_dims"))
    return {"size": size, "dtype": dtype, "how": how, "fill": fill, "seed": rng.randrange(2**31)}


def make(spec):
    """The argument that a spec stands for: a tensor for a dict, else the value itself."""
    if not isinstance(spec, dict):
        return spec
    size, dtype, how = spec["size"], DTYPES[spec["dtype"]], spec["how"]
    generator = torch.Generator().manual_seed(spec["seed"])

    def values(shape):
        if spec["fill"] == "bytes":
            return torch.randint(0, 256, shape, generator=generator).to(dtype)
        if spec["fill"] == "bits":
            return (torch.rand(shape, generator=generator) < 0.2).to(dtype)
        if spec["fill"] == "steps":
            return torch.randint(0, spec["most"] + 1, shape, generator=generator).to(dtype)
        if spec["fill"] == "most":
            return torch.full(shape, spec["most"], dtype=dtype)
        t = torch.randn(shape, generator=generator) / (4 if spec["fill"] == "small" else 1)
        if spec["fill"] == "specials":
            special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 3e38])
            pick = torch.randint(0, 40, shape, generator=generator)
            t = torch.where(pick < 5, special[pick.clamp(max=4)], t)
        return t.to(dtype)

    if how == "vast":
        return values([1 if s in VAST else s for s in size]).expand(size)
    if how == "sliced" and size:
        return values([*size[:-1], 2 * size[-1] + 1])[..., 1::2]
    if how == "permuted" and len(size) > 1:
        order = list(range(len(size)))
        random.Random(spec["seed"]).shuffle(order)
        inverse = [order.index(i) for i in range(len(size))]
        return values([size[i] for i in order]).permute(inverse)
    if how == "expanded" and size and size[0]:
        return values([1, *size[1:]]).expand(size)
    if how == "offset":
        flat = values([int(torch.Size(size).numel()) + 1])
        return flat[1:].view(size)
    if how == "flipped_dims" and size:
        dims = list(reversed(range(len(size))))
        return values(list(reversed(size))).permute(dims)
    return values(size)


def make_vast(rng: random.Random, arguments: dict) -> None:
    """Give all dimensions of one size another, so that arguments still fit each other."""
    tensors = [spec for spec in arguments.values() if isinstance(spec, dict)]
    sizes = sorted({s for spec in tensors for s in spec["size"] if 0 < s < VAST[0]})
    if not sizes:
        return
    old, new = rng.choice(sizes), rng.choice(VAST)
    for spec in tensors:
        if old in spec["size"]:
            size = [new if s == old else s for s in spec["size"]]
            if math.prod(size) < 2**60:  # PyTorch counts bytes in 64 bits
                spec.update(size=size, how="vast")


def is_vast(arguments: dict) -> bool:
    return any(isinstance(spec, dict) and spec["how"] == "vast" for spec in arguments.values())


def break_something(rng: random.Random, arguments: dict) -> None:
    """Change one argument to something of the same kind that may be wrong."""
    if rng.random() < 0.1:
        return make_vast(rng, arguments)
    name = rng.choice(list(arguments))
    value = arguments[name]
    if isinstance(value, dict):
        what = rng.randrange(6)
        size = value["size"]
        if what == 0:
            value["dtype"] = rng.choice(list(DTYPES))
        elif what == 1 and size:
            size[rng.randrange(len(size))] = rng.choice((0, 1, 2, 3, 5, 16, 17))
        elif what == 2:
            size.insert(rng.randint(0, len(size)), rng.choice((1, 2)))
        elif what == 3 and size:
            size.pop(rng.randrange(len(size)))
        elif what == 4:
            value["fill"] = rng.choice(("normal", "specials", "bytes"))
        else:
            value["how"] = rng.choice(("plain", "sliced", "permuted", "expanded", "offset", "flipped_dims"))
    elif isinstance(value, bool):
        arguments[name] = not value
    elif isinstance(value, float):
        arguments[name] = rng.choice((0.0, -1.0, 1e300, math.inf, math.nan))
    elif isinstance(value, int):
        arguments[name] = rng.choice((value + 1, value - 1, 0, 1, 2, 3, *HUGE))
    elif isinstance(value, list):
        what = rng.randrange(5)
        if what == 0 and value:
            value.pop(rng.randrange(len(value)))
        elif what == 1:
            value.insert(rng.randint(0, len(value)), rng.choice((0, 1, 2)))
        elif what == 2 and value:
            value[rng.randrange(len(value))] = rng.choice(HUGE)
        elif value:
            value[rng.randrange(len(value))] = rng.choice((0, 1, 2, 3, 4, 5, 7, 16, 255))


@dataclass(frozen=True)
class Op:
    """How to fuzz one op: arguments that it takes, and what it then has to give."""

    name: str
    valid: Callable[[random.Random], dict]
    check: Callable[[dict, tuple], str | None]  # what is wrong with the results, None if nothing

    def call(self, arguments: dict):
        made = {name: make(spec) for name, spec in arguments.items()}
        return made, getattr(torch.ops.cnnlstm_fast, self.name).default(**made)


# ---------------------------------------------------------------- blocks

#: How many numbers an activation has.
NUMBERS = {2: 2, 3: 1, 4: 1}


def _block(rng: random.Random, activations: int = 10) -> dict:
    winograd = rng.random() < 0.25
    groups = 1 if winograd else rng.choice((1, 1, 1, 1, 2, 3, 4, 16))
    c, co = groups * rng.choice((1, 2, 3, 5, 8, 16)), groups * rng.choice((1, 2, 5, 8, 16, 17, 33))
    kernel = [3, 3] if winograd else [rng.choice((1, 2, 3, 3, 5)) for _ in range(2)]
    strides, dilations = ((1, 1), (1, 1)) if winograd else ((1, 1, 2, 3), (1, 1, 1, 2, 3))
    pool = []
    if rng.random() < 0.7:
        window = [rng.choice((1, 2, 2, 3, 4, 5, 16)) for _ in range(2)]
        pool = [
            *window, *(rng.choice((1, 2, 2, 3)) for _ in range(2)), *(rng.randint(0, k // 2) for k in window),
            *(rng.choice((1, 1, 1, 2)) for _ in range(2)), rng.randint(0, 1),
        ]  # fmt: skip
    order = [0, 1, 2, 3]
    if rng.random() < 0.6:
        rng.shuffle(order)
    dtype = "float32" if winograd else rng.choice(("float32", "float32", "bfloat16"))
    activation = rng.choice((0, 1, 1, rng.randrange(activations)))
    return {
        "x": tensor(rng, [rng.choice((0, 1, 1, 2, 3, 9)), c, *rng.choices((1, 4, 7, 12, 19), k=2)], dtype),
        "weight": tensor(rng, [co, c // groups, *kernel], dtype),
        "conv": [
            *rng.choices(strides, k=2), *(rng.choice((0, 1, k // 2, k)) for k in kernel),
            *rng.choices(dilations, k=2), groups, *([1, 0] if rng.random() < 0.1 else []),
        ],
        "activation": activation,
        "act": sorted(rng.uniform(-1, 1) for _ in range(NUMBERS.get(activation, 0))),
        "pool": pool,
        "order": order,
        "plan": 3 if winograd else rng.randint(1, 2),
    }  # fmt: skip


def _channels(rng: random.Random, block: dict, dtype: str, share: float = 0.8) -> dict | None:
    """A value for every output channel, or none."""
    return tensor(rng, block["weight"]["size"][:1], dtype) if rng.random() < share else None


def _sizes(block: dict) -> tuple[list[int], list[int]]:
    """(H, W) of the map and of the result; at least 1, so that wrong sizes also make a call."""
    size = map_size(block["x"]["size"][2:], block["weight"]["size"][2:], block["conv"])
    return [max(s, 1) for s in size], [max(s, 1) for s in pool_size(size, block["pool"])]


def _kept(rng: random.Random, block: dict) -> tuple[dict, dict]:
    """A gradient, and codes of the right size that no forward wrote: random bytes."""
    n, co = block["x"]["size"][0], block["weight"]["size"][0]
    _, size = _sizes(block)
    pool = block["pool"]
    window = pool[0] * pool[1] if pool else 1
    codes = [n, *size, -(-co // 16), 8 if window <= 14 else 16]
    codes = codes if keeps_codes(block["activation"], pool) else [0]
    grad = tensor(rng, raw_shape(block["order"], n, co, size), block["x"]["dtype"])
    return grad, {**tensor(rng, codes, "uint8", "bytes"), "how": "plain"}


def _forward(rng: random.Random) -> dict:
    block = _block(rng)
    bias = _channels(rng, block, block["x"]["dtype"])
    return {
        "x": block.pop("x"),
        "weight": block.pop("weight"),
        "bias": bias,
        **block,
        "keep": rng.random() < 0.5,
    }


def _backward(rng: random.Random) -> dict:
    block = _block(rng)
    grad, codes = _kept(rng, block)
    return {
        "grad": grad, "x": block.pop("x"), "weight": block.pop("weight"), "codes": codes, **block,
        **{f"need_{which}": rng.random() < 0.7 for which in ("x", "weight", "bias")},
    }  # fmt: skip


def _norm_forward(rng: random.Random) -> dict:
    block = _block(rng)
    dtype = rng.choice((block["x"]["dtype"], "float32"))
    given = float(rng.random() < 0.5)
    names = {"gamma": 0.8, "beta": 0.8, "mean": given, "var": given}
    return {
        "x": block["x"], "weight": block["weight"], "bias": _channels(rng, block, dtype),
        **{name: _channels(rng, block, dtype, share) for name, share in names.items()}, "eps": 1e-5,
        **{name: block[name] for name in ("conv", "activation", "act", "pool", "order", "plan")},
        "keep": rng.random() < 0.5, "keep_map": rng.random() < 0.5,
    }  # fmt: skip


def _norm_backward(rng: random.Random) -> dict:
    block = _block(rng)
    grad, codes = _kept(rng, block)
    dtype, co = block["x"]["dtype"], block["weight"]["size"][0]
    size, _ = _sizes(block)
    given, pooled = rng.random() < 0.5, bool(block["pool"])
    has_map = not pooled or (not given and rng.random() < 0.5)
    made = [block["x"]["size"][0], *size, co] if has_map else [0]
    return {
        "grad": grad, "x": block["x"], "weight": block["weight"], "stats": _plain(rng, [4, co], "float64"),
        "codes": codes if pooled else _plain(rng, [0], "uint8"),
        "kept": _plain(rng, grad["size"] if pooled else [0], dtype),
        "map": _plain(rng, made, dtype), "eps": 1e-5,
        **{name: block[name] for name in ("conv", "activation", "act", "pool", "order", "plan")},
        "given": given, "need_x": rng.random() < 0.7, "need_weight": rng.random() < 0.7,
    }  # fmt: skip


def _plain(rng: random.Random, size: list[int], dtype: str = "float32", fill: str = "small") -> dict:
    """A tensor as the ops themselves make them."""
    return {**tensor(rng, size, dtype, fill), "how": "plain"}


def _fold(rng: random.Random) -> dict:
    block = _block(rng)
    dtype = block["weight"]["dtype"]
    return {
        "weight": block["weight"],
        **{name: _channels(rng, block, dtype) for name in ("bias", "gamma", "beta")},
        **{name: _channels(rng, block, dtype, 1) for name in ("mean", "var")},
        "eps": 1e-5,
    }


def _moments(rng: random.Random) -> dict:
    block = _block(rng)
    block["conv"][6] = 1
    return {"x": block["x"], "weight": block["weight"], "conv": block["conv"]}


def _windows(rng: random.Random) -> dict:
    images, rows, windows, k, m, count, columns = (rng.choice((1, 2, 3, 5, 16, 17)) for _ in range(7))
    return {
        "x": tensor(rng, [images, rows, windows, k, count, columns]),
        "matrix": tensor(rng, [k, m]),
        "out": _plain(rng, [images, rows, windows, m, count, columns]),
        "add": rng.random() < 0.3,
    }


def _check_windows(a: dict, results: tuple) -> str | None:
    if a["add"] or not a["out"].is_contiguous() or not a["out"].numel():
        return None
    return _near(a["out"], torch.einsum("irwkcj,km->irwmcj", *_doubles(a, "x", "matrix")), 64)


def _products(rng: random.Random) -> dict:
    places, rows, c_out, taps, channels = (rng.choice((1, 2, 3, 5, 16, 17, 40)) for _ in range(5))
    return {
        "grad": tensor(rng, [places, rows, c_out]),
        "x": tensor(rng, [places + taps - 1, rows, channels]),
        "out": _plain(rng, [rows, c_out, taps, channels]),
    }


def _new(rng: random.Random) -> dict:
    return {
        "like": tensor(rng, [2, 3]),
        "size": [rng.choice((0, 1, 5, 700, 2000)) for _ in range(rng.randint(1, 3))],
    }


def _near(result: torch.Tensor, true: torch.Tensor, slack: float) -> str | None:
    if result.shape != true.shape or not result.is_contiguous():
        return (
            f"result of shape {tuple(result.shape)}, strides {result.stride()}, expected {tuple(true.shape)}"
        )
    if not result.isfinite().all() or not true.isfinite().all():
        return None  # NaN and infinity are the tests' business
    error, norm = (result.double() - true).norm(), true.norm()
    if error > slack * torch.finfo(result.dtype).eps * (norm + true.numel() ** 0.5):
        return f"result is off by {error.item():.3e} of {norm.item():.3e}"
    return None


def _doubles(a: dict, *names: str) -> list[torch.Tensor | None]:
    return [None if a[name] is None else a[name].double() for name in names]


def _block_in_double(a: dict, norm: tuple | None = None) -> torch.Tensor:
    block = [a[name] for name in ("conv", "activation", "act", "pool", "order")]
    return conv_block_by_args(*_doubles(a, "x", "weight", "bias"), *block, norm=norm)


def _is_defined(a: dict, results: tuple) -> bool:
    """Whether PyTorch has an answer to compare with."""
    return bool(results[0].numel()) and a.get("eps", 1) > 0 and a["act"] == sorted(a["act"])


def _check_forward(a: dict, results: tuple) -> str | None:
    return _near(results[0], _block_in_double(a), 64) if _is_defined(a, results) else None


def _check_norm_forward(a: dict, results: tuple) -> str | None:
    if not _is_defined(a, results):
        return None
    mean, var, gamma, beta = _doubles(a, "mean", "var", "gamma", "beta")
    true = _block_in_double(a, (mean, var, gamma, beta, a["eps"]))
    # A channel whose values hardly differ makes much of rounding.
    exact = results[0].dtype == torch.float32 and mean is not None
    return _near(results[0], true if exact else results[0].double(), 2**12)


def _check_shapes(a: dict, results: tuple, needed: dict[str, list[int]]) -> str | None:
    """``needed`` are the sizes of results by the flag that asks for them."""
    for result, (flag, size) in zip(results, needed.items(), strict=False):
        expected = tuple(size) if a.get(flag, True) else (0,)
        if tuple(result.shape) != expected:
            return f"{flag}: a result of shape {tuple(result.shape)}, expected {expected}"
    return None


def _check_backward(a: dict, results: tuple) -> str | None:
    weight = a["weight"].shape
    return _check_shapes(a, results, {"need_x": a["x"].shape, "need_weight": weight, "need_bias": weight[:1]})


def _check_norm_backward(a: dict, results: tuple) -> str | None:
    weight = a["weight"].shape
    return _check_shapes(a, results, {"need_x": a["x"].shape, "need_weight": weight, "sums": [2, weight[0]]})


def _check_fold(a: dict, results: tuple) -> str | None:
    return _check_shapes(a, results, {"folded": a["weight"].shape, "shift": a["weight"].shape[:1]})


def _check_moments(a: dict, results: tuple) -> str | None:
    taps = a["weight"][0].numel()
    return _check_shapes(a, results, {"moments": [taps + 1, taps]})


# ---------------------------------------------------------------- recurrent layers

WEIGHTS = [f"{name}{way}" for way in ("", "_r") for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
GATES = {0: 4, 1: 3}


def _weights(
    rng: random.Random, dtype: str, mode: int, inputs: int, hidden: int, width: int, bias: bool
) -> dict:
    """Of one direction, in the op's order."""
    rows = GATES[mode] * hidden
    sizes = {
        "w_ih": [rows, inputs], "w_hh": [rows, width], "b_ih": [rows] if bias else None,
        "b_hh": [rows] if bias else None, "w_hr": [width, hidden] if width < hidden else None,
    }  # fmt: skip
    return {n: None if size is None else tensor(rng, size, dtype, "small") for n, size in sizes.items()}


def _layer(rng: random.Random) -> dict:
    mode, directions, batch_first = rng.randrange(2), rng.choice((1, 2)), rng.random() < 0.5
    inputs, hidden = rng.choice((1, 2, 5, 16, 33)), rng.choice((1, 3, 16, 17, 33))
    width = rng.randint(1, hidden) if mode == 0 and rng.random() < 0.3 else hidden
    steps, batch = rng.choice((1, 2, 5, 8)), rng.choice((0, 1, 2, 3, 9))
    dtype, bias = rng.choice(("float32", "float32", "bfloat16")), rng.random() < 0.7
    packed = rng.random() < 0.2  # sequences of one length, so that their data are whole steps
    batch_first &= not packed
    leading = [batch, steps] if batch_first else [steps, batch]
    fill = "most" if packed else "steps"
    ways = [_weights(rng, dtype, mode, inputs, hidden, width, bias) for _ in range(directions)]
    weights = [w for way in ways for w in way.values()] + [None] * 5
    states = {"h0": [directions, batch, width], "c0": [directions, batch, hidden]}
    return {
        "x": tensor(rng, [*([steps * batch] if packed else leading), inputs], dtype),
        **{
            n: tensor(rng, size, dtype) if rng.random() < (0.05 if n == "c0" and mode else 0.6) else None
            for n, size in states.items()
        },
        **dict(zip(WEIGHTS, weights, strict=False)),
        "reset": tensor(rng, leading, "bool", "bits") if rng.random() < 0.4 and not packed else None,
        "lengths": {**tensor(rng, [batch], "int64", fill), "most": steps}
        if packed or rng.random() < 0.4
        else None,
        "mode": mode,
        "batch_first": batch_first,
    }


def _layer_rows(rng: random.Random, a: dict) -> int:
    """A right value of ``rows``."""
    if len(a["x"]["size"]) == 2:
        return a["x"]["size"][0]
    steps, batch, _ = a["x"]["size"]
    return -1 if a["lengths"] or rng.random() < 0.5 else steps * batch


def _layer_forward(rng: random.Random) -> dict:
    a = _layer(rng)
    flags = {"keep": rng.random() < 0.5, "keep_out": rng.random() < 0.5}
    return {**a, **flags, "rows": _layer_rows(rng, a)}


def _layer_sizes(a: dict, keep_out: bool, kept_rows: int) -> tuple[list[int], list[int], list[int]]:
    """Sizes of h_n, c_n and of what is kept; of specs."""
    if len(a["x"]["size"]) == 2:
        steps, batch = a["lengths"]["most"], a["lengths"]["size"][0]
    else:
        steps, batch = a["x"]["size"][:2][:: -1 if a["batch_first"] else 1]
    rows, width = a["w_hh"]["size"]
    hidden, directions = rows // GATES[a["mode"]], 1 if a["w_ih_r"] is None else 2
    kept = saved_shape(a["mode"], directions, steps, batch, hidden, keep_out, kept_rows)
    return [directions, batch, width], [directions, batch, hidden], kept


def _layer_backward(rng: random.Random) -> dict:
    """With results and gates that no forward made."""
    a = _layer(rng)
    keep_out = rng.random() < 0.5
    h, c, kept = _layer_sizes(a, keep_out, _layer_rows(rng, a))
    dtype = a["x"]["dtype"]
    out = [*a["x"]["size"][:-1], h[0] * h[2]]
    grads = {"grad_out": out, "grad_h_n": h, "grad_c_n": c}
    mode, batch_first = a.pop("mode"), a.pop("batch_first")
    return {
        **{
            n: tensor(rng, size, dtype)
            if rng.random() < (0.05 if n == "grad_c_n" and mode else 0.7)
            else None
            for n, size in grads.items()
        },
        **a, "out": None if keep_out else _plain(rng, out, dtype), "saved": _plain(rng, kept),
        "mode": mode, "batch_first": batch_first,
        **{f"need_{which}": rng.random() < 0.7 for which in ("x", "state", "weights")},
    }  # fmt: skip


def _check_layer(a: dict, results: tuple) -> str | None:
    x, directions = a["x"].double(), 1 if a["w_ih_r"] is None else 2
    floats = [t for t in a.values() if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.numel()]
    if not results[0].numel() or a["x"].dtype != torch.float32 or max(t.abs().max() for t in floats) > 100:
        return None  # large weights make the recurrence chaotic
    hidden, width = a["w_hh"].shape[0] // GATES[a["mode"]], a["w_hh"].shape[1]
    lengths = a["lengths"]
    if x.dim() == 2:
        if (lengths != lengths[0]).any():
            return None
        x, lengths = x.view(-1, len(lengths), x.shape[1]), None
    batch = x.shape[0 if a["batch_first"] else 1]
    state = [
        x.new_zeros(directions, batch, size) if a[name] is None else a[name].double()
        for name, size in (("h0", width), ("c0", hidden))
    ]
    options = dict(
        bidirectional=directions == 2, batch_first=a["batch_first"], bias=a["b_ih"] is not None,
        reset=a["reset"], lengths=lengths,
    )  # fmt: skip
    params = [a[name].double() for name in WEIGHTS if a[name] is not None]
    if a["mode"] == 0:
        projected = 0 if a["w_hr"] is None else width
        true, _ = reference.lstm(x, tuple(state), params, proj_size=projected, **options)
    else:
        true, _ = reference.gru(x, state[0], params, **options)
    true = true.flatten(0, 1) if a["x"].dim() == 2 else true
    return _near(results[0], true.contiguous(), 2**12)


def _check_layer_backward(a: dict, results: tuple) -> str | None:
    expected = {"need_x": [a["x"]], "need_state": [a["h0"], a["c0"]], "need_weights": [a[n] for n in WEIGHTS]}
    found = iter(results)
    for flag, like in expected.items():
        for t in like:
            size = tuple(t.shape) if t is not None and a[flag] else (0,)
            if tuple((result := next(found)).shape) != size:
                return f"{flag}: a gradient of shape {tuple(result.shape)}, expected {size}"
    return None


def _stream_sizes(rng: random.Random) -> tuple[int, int, int, int]:
    mode, inputs = rng.randrange(2), rng.choice((1, 2, 5, 33))
    hidden = rng.choice((1, 3, 16, 17, 33))
    width = rng.randint(1, hidden) if mode == 0 and rng.random() < 0.3 else hidden
    return mode, inputs, hidden, width


def _pack(rng: random.Random) -> dict:
    mode, inputs, hidden, width = _stream_sizes(rng)
    weights = _weights(rng, "float32", mode, inputs, hidden, width, rng.random() < 0.7)
    return {**{n: w and {**w, "how": "plain"} for n, w in weights.items()}, "mode": mode}


def _step(rng: random.Random) -> dict:
    """Packed weights of the right number that no pack made."""
    mode, inputs, hidden, width = _stream_sizes(rng)
    layers, batch = rng.choice((1, 1, 2, 3)), rng.choice((0, 1, 2, 7))
    numbers = 0
    for layer in range(layers):
        weights = _weights(rng, "float32", mode, width if layer else inputs, hidden, width, True)
        made = [w and torch.zeros(w["size"]) for w in weights.values()]
        numbers += torch.ops.cnnlstm_fast.recurrent_stream_pack.default(*made, mode).numel()
    padded = [-(-size // UNIT_GROUP) * UNIT_GROUP for size in (width, hidden)]
    return {
        "x": _plain(rng, [batch, inputs]),
        "h": _plain(rng, [layers, 2, batch, padded[0]]),
        "c": _plain(rng, [0] if mode else [layers, batch, padded[1]]),
        "packed": _plain(rng, [numbers]),
        "reset": tensor(rng, [batch], "bool", "bits") if rng.random() < 0.4 else None,
        "mode": mode, "hidden": hidden, "width": width, "step": rng.randrange(3),
    }  # fmt: skip


def _library(rng: random.Random) -> dict:
    block = _block(rng)
    return {"x": block["x"], "weight": block["weight"], "conv": block["conv"], "out_width": rng.randint(0, 9)}


def _check_step(a: dict, results: tuple) -> str | None:
    return _check_shapes(a, results, {"out": [len(a["x"]), a["width"]]})


OPS = {op.name: op for op in (
    Op("conv_block", _forward, _check_forward),
    Op("conv_block_backward", _backward, _check_backward),
    Op("conv_norm_block", _norm_forward, _check_norm_forward),
    Op("conv_norm_block_backward", _norm_backward, _check_norm_backward),
    Op("fold_norm", _fold, _check_fold),
    Op("patch_moments", _moments, _check_moments),
    Op("suits_winograd", lambda rng: {"weight": _plain(rng, [*rng.choices((1, 5, 16, 33), k=2), 3, 3])},
       lambda a, results: None),
    Op("library_limits", _library, lambda a, results: None),
    Op("fingerprint", lambda rng: {name: _plain(rng, rng.choices((1, 3, 17), k=2), rng.choice(list(DTYPES)))
                                   for name in ("first", "second", "third", "fourth")},
       lambda a, results: None),
    Op("transform_windows", _windows, _check_windows),
    Op("add_products", _products, lambda a, results: None),
    Op("new_spectra", _new, lambda a, results: None),
    Op("recurrent_layer", _layer_forward, _check_layer),
    Op("recurrent_layer_backward", _layer_backward, _check_layer_backward),
    Op("recurrent_stream_pack", _pack, lambda a, results: None),
    Op("recurrent_stream_step", _step, _check_step),
)}  # fmt: skip


# ---------------------------------------------------------------- the loop


class Coverage:
    """The map of edges that tests/native/coverage.cpp counts, if that is loaded."""

    def __init__(self) -> None:
        self.map = self.seen = None
        try:
            find = ctypes.CDLL(None).cnnlstm_fast_coverage
        except AttributeError:
            return
        find.restype = ctypes.POINTER(ctypes.c_uint8)
        pointer = ctypes.cast(find(), ctypes.POINTER(ctypes.c_uint8 * 65536))
        self.map = torch.frombuffer(pointer.contents, dtype=torch.uint8)
        self.seen = torch.zeros(65536, dtype=torch.uint8)

    def clear(self) -> None:
        if self.map is not None:
            self.map.zero_()

    def is_new(self) -> bool:
        """Whether the call since :meth:`clear` reached an edge, or a power of two of it, first."""
        if self.map is None:
            return False
        reached = torch.bucketize(self.map, torch.tensor([0, 1, 2, 3, 7, 15, 31, 127])).to(torch.uint8)
        bits = (1 << reached.long()).to(torch.uint8) * (reached > 0)
        new = bits & ~self.seen
        self.seen |= bits
        return bool(new.any())

    @property
    def edges(self) -> int:
        return 0 if self.seen is None else int((self.seen > 0).sum())


def too_large(arguments: dict) -> bool:
    """Whether a call that is accepted would take longer or need more than a fuzzer has."""
    sizes = [
        math.prod(max(s, 1) for s in spec["size"]) for spec in arguments.values() if isinstance(spec, dict)
    ]
    sizes = [s for s in sizes if s <= MOST_ELEMENTS]  # nobody's memory: must be refused
    conv, x, weight = (arguments.get(name) for name in ("conv", "x", "weight"))
    if (
        conv
        and len(conv) in (7, 9)
        and len(x["size"]) == len(weight["size"]) == 4
        and min(conv) >= 0 < min(conv[:2])
    ):
        padded = [x["size"][2 + axis] + 2 * conv[2 + axis] for axis in (0, 1)]
        maps = math.prod(p // s + 1 for p, s in zip(padded, conv[:2], strict=True))
        beyond = maps > MOST_ELEMENTS
        sizes += [] if beyond else [x["size"][1] * math.prod(padded), x["size"][0] * weight["size"][0] * maps]
    return sum(sizes) > 2**20 or sum(sizes[:4]) > 2**17


def case(op: Op, rng: random.Random, kept: list[dict]) -> dict:
    arguments = json.loads(json.dumps(rng.choice(kept))) if kept and rng.random() < 0.6 else op.valid(rng)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        break_something(rng, arguments)
    return arguments


def run(op: Op, arguments: dict) -> tuple[str, str | None]:
    """("refused" or "accepted", what is wrong or None)."""
    try:
        made, results = op.call(arguments)
    except RuntimeError as error:  # what the dispatcher and the ops raise
        return "refused", None if str(error) else "an error without a message"
    if is_vast(arguments):  # in an argument that this call does not read
        return "accepted", None
    return "accepted", op.check(made, results if isinstance(results, tuple) else (results,))


def fuzz(seconds: float, cases: int | None, seed: int, journal: str | None) -> dict:
    """Fuzz all ops in turn; returns counts, and raises SystemExit at a wrong result."""
    torch.set_num_threads(1 + seed % 2)
    coverage, rng = Coverage(), random.Random(seed)
    kept: dict[str, list[dict]] = {name: [] for name in OPS}
    counts = {name: {"refused": 0, "accepted": 0} for name in OPS}
    file = None if journal is None else os.open(journal, os.O_CREAT | os.O_WRONLY)
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end and (cases is None or number < cases):
        op = rng.choice(list(OPS.values()))
        arguments = case(op, rng, kept[op.name])
        number += 1
        if too_large(arguments):
            continue
        line = json.dumps({"op": op.name, "arguments": arguments})
        if file is not None:  # what ran last is there after a crash
            os.pwrite(file, line.ljust(1 << 14).encode(), 0)
        coverage.clear()
        try:
            outcome, wrong = run(op, arguments)
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            outcome, wrong = (
                "refused",
                None if isinstance(error, OverflowError) else f"{type(error).__name__}: {error}",
            )
        if wrong:
            raise SystemExit(f"wrong: {wrong}\n{line}")
        counts[op.name][outcome] += 1
        if coverage.is_new():
            kept[op.name].append(arguments)
    return {
        "seed": seed, "instruction set": torch.ops.cnnlstm_fast.isa(), "torch": torch.__version__,
        "seconds": seconds, "calls": number, "of": counts, "edges": coverage.edges,
        "kept": sum(map(len, kept.values())), "guided": coverage.map is not None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CNNLSTM_FAST_SEED", "0")))
    parser.add_argument("--journal", help="file that always holds the call that runs")
    parser.add_argument("--output", type=Path, help="JSON file to which what ran is added")
    parser.add_argument("--repeat", help="file with one call, as --journal leaves it")
    asked = parser.parse_args()
    if asked.repeat:
        with open(asked.repeat) as file:
            found = json.load(file)
        print(*run(OPS[found["op"]], found["arguments"]))
        return
    found = fuzz(asked.seconds, asked.cases, asked.seed, asked.journal)
    print(json.dumps(found))
    if asked.output:
        runs = json.loads(asked.output.read_text()) if asked.output.exists() else []
        asked.output.write_text(json.dumps([*runs, found], indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
