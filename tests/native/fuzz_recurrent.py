"""The fuzzer's arguments and checks of the recurrent ops."""

from __future__ import annotations

import random

import torch
from fuzz_arguments import _check_shapes, _near, _plain, tensor

from cnnlstm_fast import reference
from cnnlstm_fast.ops.recurrent import UNIT_GROUP, saved_shape

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


def _check_step(a: dict, results: tuple) -> str | None:
    return _check_shapes(a, results, {"out": [len(a["x"]), a["width"]]})
