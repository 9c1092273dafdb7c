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
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import cnnlstm_fast  # noqa: F401  (the ops)

HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**62, -(2**62), -1)
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
        t = torch.randn(shape, generator=generator)
        if spec["fill"] == "specials":
            special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 3e38])
            pick = torch.randint(0, 40, shape, generator=generator)
            t = torch.where(pick < 5, special[pick.clamp(max=4)], t)
        return t.to(dtype)

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


def break_something(rng: random.Random, arguments: dict) -> None:
    """Change one argument to something of the same kind that may be wrong."""
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


# ---------------------------------------------------------------- conv_block


def _block(rng: random.Random) -> dict:
    groups = rng.choice((1, 1, 1, 1, 2, 3, 4, 16))
    c, co = groups * rng.choice((1, 2, 3, 5, 8, 16)), groups * rng.choice((1, 2, 5, 8, 16, 17, 33))
    kernel = [rng.choice((1, 2, 3, 3, 5)) for _ in range(2)]
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
    dtype = rng.choice(("float32", "float32", "bfloat16"))
    return {
        "x": tensor(rng, [rng.choice((0, 1, 1, 2, 3, 9)), c, *rng.choices((1, 4, 7, 12, 19), k=2)], dtype),
        "weight": tensor(rng, [co, c // groups, *kernel], dtype),
        "conv": [
            *(rng.choice((1, 1, 2, 3)) for _ in range(2)), *(rng.choice((0, 1, k // 2, k)) for k in kernel),
            *(rng.choice((1, 1, 1, 2, 3)) for _ in range(2)), groups,
        ],
        "activation": rng.randint(0, 1),
        "pool": pool,
        "order": order,
        "plan": rng.randint(1, 2),
    }  # fmt: skip


def _forward(rng: random.Random) -> dict:
    block = _block(rng)
    bias = tensor(rng, block["weight"]["size"][:1], block["x"]["dtype"]) if rng.random() < 0.8 else None
    return {
        "x": block.pop("x"),
        "weight": block.pop("weight"),
        "bias": bias,
        **block,
        "keep": rng.random() < 0.5,
    }


def _backward(rng: random.Random) -> dict:
    """Often with codes of the right size that no forward wrote: random bytes."""
    block = _block(rng)
    n, co = block["x"]["size"][0], block["weight"]["size"][0]
    size = _out_size(block)
    nchw = [n, co, *size]
    pool = block["pool"]
    window = pool[0] * pool[1] if pool else 1
    kept = [n, *size, -(-co // 16), 8 if window <= 14 else 16] if block["activation"] or pool else [0]
    return {
        "grad": tensor(rng, [nchw[axis] for axis in block["order"]], block["x"]["dtype"]),
        "x": block.pop("x"),
        "weight": block.pop("weight"),
        "codes": {**tensor(rng, kept, "uint8", "bytes"), "how": "plain"},
        **block,
        **{f"need_{which}": rng.random() < 0.7 for which in ("x", "weight", "bias")},
    }


def _out_size(block: dict) -> list[int]:
    """(H, W) of the result; at least 1, so that wrong sizes also make a call."""
    conv, pool, out = block["conv"], block["pool"], []
    for axis in (0, 1):
        size, kernel = block["x"]["size"][2 + axis], block["weight"]["size"][2 + axis]
        size = (size + 2 * conv[2 + axis] - conv[4 + axis] * (kernel - 1) - 1) // conv[axis] + 1
        if pool and size > 0:
            before, span = size, size + 2 * pool[4 + axis] - pool[6 + axis] * (pool[axis] - 1) - 1
            size = (span + (pool[2 + axis] - 1 if pool[8] else 0)) // pool[2 + axis] + 1
            if pool[8] and (size - 1) * pool[2 + axis] >= before + pool[4 + axis]:
                size -= 1
        out.append(max(size, 1))
    return out


def _check_forward(a: dict, results: tuple) -> str | None:
    out = results[0]
    conv, pool = a["conv"], a["pool"]
    y = F.conv2d(
        a["x"].double(), a["weight"].double(), None if a["bias"] is None else a["bias"].double(),
        conv[0:2], conv[2:4], conv[4:6], conv[6],
    )  # fmt: skip
    y = F.relu(y) if a["activation"] else y
    if pool and y.numel():
        y = F.max_pool2d(y, pool[0:2], pool[2:4], pool[4:6], pool[6:8], bool(pool[8]))
    elif pool:
        return None
    y = y.permute(a["order"])
    if out.shape != y.shape or not out.is_contiguous():
        return f"result of shape {tuple(out.shape)}, strides {out.stride()}, expected {tuple(y.shape)}"
    if not out.isfinite().all() or not y.isfinite().all():
        return None  # NaN and infinity are the tests' business
    error, norm = (out.double() - y).norm(), y.norm()
    if error > 64 * torch.finfo(out.dtype).eps * (norm + y.numel() ** 0.5):
        return f"result is off by {error.item():.3e} of {norm.item():.3e}"
    return None


def _check_backward(a: dict, results: tuple) -> str | None:
    for name, result, like in zip(("x", "weight", "bias"), results, (a["x"], a["weight"], None), strict=True):
        shape = (
            (tuple(like.shape) if like is not None else (len(a["weight"]),)) if a[f"need_{name}"] else (0,)
        )
        if tuple(result.shape) != shape:
            return f"gradient of {name} has shape {tuple(result.shape)}, expected {shape}"
    return None


OPS = {op.name: op for op in (
    Op("conv_block", _forward, _check_forward),
    Op("conv_block_backward", _backward, _check_backward),
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
    total = 0
    for spec in arguments.values():
        if isinstance(spec, dict):
            size = 1
            for s in spec["size"]:
                size *= max(s, 1)
            total += size
    return total > 2**17


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
    return "accepted", op.check(made, results if isinstance(results, tuple) else (results,))


def fuzz(seconds: float, cases: int | None, seed: int, journal: str | None) -> dict:
    """Fuzz all ops in turn; returns counts, and raises SystemExit at a wrong result."""
    torch.set_num_threads(1 + seed % 2)
    coverage, rng = Coverage(), random.Random(seed)
    kept: dict[str, list[dict]] = {name: [] for name in OPS}
    counts = {"refused": 0, "accepted": 0}
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
        counts[outcome] += 1
        if coverage.is_new():
            kept[op.name].append(arguments)
    return {
        "seed": seed, "calls": number, **counts, "edges": coverage.edges,
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
    parser.add_argument("--repeat", help="file with one call, as --journal leaves it")
    asked = parser.parse_args()
    if asked.repeat:
        with open(asked.repeat) as file:
            found = json.load(file)
        print(*run(OPS[found["op"]], found["arguments"]))
        return
    print(json.dumps(fuzz(asked.seconds, asked.cases, asked.seed, asked.journal)))


if __name__ == "__main__":
    sys.exit(main())
