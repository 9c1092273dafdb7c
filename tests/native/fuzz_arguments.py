"""Arguments of ops as the fuzzer draws, keeps and breaks them, and what its checks share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**62, -(2**62), -1)

#: Sizes that tensors may have where strides are 0, and that no op may take: products of them wrap.
VAST = (2**38 + 1, 2**42 + 2, 2**58 + 2**17, 2**62)
MOST_ELEMENTS = 2**40

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "bfloat16", "float64", "float16", "int64", "uint8", "bool", "complex64")
}


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

    if how == "vast" or max(size, default=0) >= VAST[0]:
        return values([1 if s >= VAST[0] else s for s in size]).expand(size)
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


def _plain(rng: random.Random, size: list[int], dtype: str = "float32", fill: str = "small") -> dict:
    """A tensor as the ops themselves make them."""
    return {**tensor(rng, size, dtype, fill), "how": "plain"}


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


def _check_shapes(a: dict, results: tuple, needed: dict[str, list[int]]) -> str | None:
    """``needed`` are the sizes of results by the flag that asks for them."""
    for result, (flag, size) in zip(results, needed.items(), strict=False):
        expected = tuple(size) if a.get(flag, True) else (0,)
        if tuple(result.shape) != expected:
            return f"{flag}: a result of shape {tuple(result.shape)}, expected {expected}"
    return None
