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
from pathlib import Path

import torch
from fuzz_arguments import (
    DTYPES,
    MOST_ELEMENTS,
    Op,
    _check_shapes,
    _doubles,
    _near,
    _plain,
    break_something,
    is_vast,
    tensor,
)
from fuzz_epilogue import (
    check_epilogue,
    check_epilogue_backward,
    check_epilogue_moments,
    epilogue_backward,
    epilogue_forward,
    epilogue_moments,
)
from fuzz_recurrent import (
    _check_layer,
    _check_layer_backward,
    _check_step,
    _layer_backward,
    _layer_forward,
    _pack,
    _step,
)

from cnnlstm_fast.ops.conv_block import keeps_codes
from cnnlstm_fast.reference import conv_block_by_args
from cnnlstm_fast.spec import map_size, pool_size, raw_shape

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


def _library(rng: random.Random) -> dict:
    block = _block(rng)
    return {"x": block["x"], "weight": block["weight"], "conv": block["conv"], "out_width": rng.randint(0, 9)}


# ---------------------------------------------------------------- all of them


OPS = {op.name: op for op in (
    Op("conv_block", _forward, _check_forward),
    Op("conv_block_backward", _backward, _check_backward),
    Op("conv_norm_block", _norm_forward, _check_norm_forward),
    Op("conv_norm_block_backward", _norm_backward, _check_norm_backward),
    Op("epilogue", epilogue_forward, check_epilogue),
    Op("epilogue_backward", epilogue_backward, check_epilogue_backward),
    Op("epilogue_moments", epilogue_moments, check_epilogue_moments),
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
