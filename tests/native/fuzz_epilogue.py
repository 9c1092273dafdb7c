"""The fuzzer's arguments and checks of the op ``epilogue``."""

from __future__ import annotations

import random

from fuzz_arguments import _check_shapes, _doubles, _near, _plain

from cnnlstm_fast.reference import epilogue_by_args
from cnnlstm_fast.spec import ADD_STAGE, FIRST_ACTIVATION, NORM_STAGE, bits_shape, keeps_bits

#: Programs as stages: a norm, a sum, and activations by number.
PROGRAMS = (
    [0], [0, 3], [0, 1, 3], [0, 1, 5], [1], [1, 4], [3, 0], [5, 0, 7], [7, 0, 1, 3], [0, 9, 1], [3], [12, 0],
)  # fmt: skip


def _map(rng: random.Random, dtype: str) -> dict:
    size = [
        rng.choice((0, 1, 2, 3)),
        rng.choice((1, 2, 5, 16, 33)),
        *rng.choices((1, 2, 3, 7, 19), k=rng.randint(0, 3)),
    ]
    return {**_plain(rng, size, dtype), "how": rng.choice(("plain", "plain", "offset"))}


def _program(rng: random.Random) -> dict:
    stages = list(rng.choice(PROGRAMS))
    numbers = [value for _ in stages for value in (rng.choice((0.25, 0.5, 1.0)), rng.choice((0.75, 2.0)))]
    return {"stages": stages, "numbers": numbers, "eps": 1e-5}


def _positions(z: dict) -> int:
    size = 1
    for extent in z["size"][2:]:
        size *= extent
    return size


def epilogue_forward(rng: random.Random) -> dict:
    dtype = rng.choice(("float32", "float32", "bfloat16"))
    z, program = _map(rng, dtype), _program(rng)
    channels = z["size"][1:2]
    given = rng.random() < 0.5 or z["size"][0] * _positions(z) < 2
    of_norm = [_plain(rng, channels, "float32") if rng.random() < 0.7 else None for _ in range(2)]
    statistics = [{**_plain(rng, channels, "uint8", "bits"), "dtype": "float32"} for _ in range(2)]
    return {
        "z": z, "gamma": of_norm[0], "beta": of_norm[1],
        **dict(zip(("mean", "var"), statistics if given else (None, None), strict=True)), "moments": None,
        "added": _plain(rng, z["size"], dtype) if ADD_STAGE in program["stages"] else None, **program,
        "keep": rng.random() < 0.5,
    }  # fmt: skip


def check_epilogue(a: dict, results: tuple) -> str | None:
    values = _doubles(a, "z", "gamma", "beta", "mean", "var", "added")
    if a["z"].numel() == 0:
        return None if results[0].shape == a["z"].shape else "a result of another shape"
    *before, added = values
    try:
        true = epilogue_by_args(*before, added, a["stages"], a["numbers"], a["eps"])
    except (RuntimeError, ValueError):  # PyTorch refuses numbers that ours takes: a negative epsilon
        return None
    return _near(results[0].contiguous(), true.contiguous(), 2000)


def epilogue_backward(rng: random.Random) -> dict:
    dtype = rng.choice(("float32", "bfloat16"))
    grad, program = _map(rng, dtype), _program(rng)
    n, c, *_ = grad["size"]
    stages = program["stages"]
    bits = bits_shape(n, c, _positions(grad), False) if keeps_bits(stages) else [0]
    stats = {**_plain(rng, [4, c] if NORM_STAGE in stages else [0], "float64", "bits")}
    return {
        "grad": grad, "z": _plain(rng, grad["size"], dtype), "passed": _plain(rng, bits, "uint8", "bytes"),
        "stats": stats, **program, "given": rng.random() < 0.5, "need_z": rng.random() < 0.7,
        "need_added": ADD_STAGE in stages and rng.random() < 0.7,
    }  # fmt: skip


def check_epilogue_backward(a: dict, results: tuple) -> str | None:
    needed = {"need_z": a["grad"].shape, "need_added": a["grad"].shape}
    return _check_shapes(a, results, needed)


def epilogue_moments(rng: random.Random) -> dict:
    z, program = _map(rng, "float32"), _program(rng)
    z["size"][0] = 2 * max(1, z["size"][0])
    if NORM_STAGE not in program["stages"]:
        program |= {"stages": [FIRST_ACTIVATION + 1, NORM_STAGE], "numbers": [0.0] * 4}
    return {"z": z, "stages": program["stages"], "numbers": program["numbers"]}


def check_epilogue_moments(a: dict, results: tuple) -> str | None:
    return _check_shapes(a, results, {"moments": [2, a["z"].shape[1]]})
