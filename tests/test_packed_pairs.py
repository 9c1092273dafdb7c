"""Convolutions and linear layers of frozen models in bfloat16, on weights packed for the processor's unit."""

from __future__ import annotations

import copy
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    SEED,
    STRIDED,
    UNIT,
    Block,
    PoolCase,
    after_conv,
    assert_close_as_torch,
    integer_tensors,
    needs_extension,
    normal_tensors,
    random_block,
    strided,
    torch_block,
    torch_ways,
)
from test_bfloat16 import OTHERS
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.freeze.program import Program
from cnnlstm_fast.functional.arguments import fused_activation

pytestmark = [
    needs_extension,
    pytest.mark.skipif(not UNIT, reason="the processor or this build has no unit for bfloat16"),
]

ORDERS = ([0, 2, 3, 1], [0, 1, 2, 3], [3, 0, 1, 2])


def block_node(block: Block, order=(0, 2, 3, 1)) -> dict:
    """The block as a node on packed weights, of the slots x, weight, bias and perhaps added."""

    def both(values, fill):
        return [fill] * (2 - len(values)) + list(values)

    name, act = fused_activation(block.activation and ACTIVATIONS[block.activation].module)
    p = block.pool
    pool = [] if p is None else [
        *both(p.kernel, 1), *both(p.stride, 1), *both(p.padding, 0), *both(p.dilation, 1), int(p.ceil_mode)
    ]  # fmt: skip
    return {
        "op": "block", "x": "x", "weight": "weight", "bias": "bias" if block.bias else None, "added": None,
        "signal": block.rank == 3,
        "conv": [*both(block.stride, 1), *both(block.padding, 0), *both(block.dilation, 1), block.groups],
        "activation": name, "act": list(act), "pool": pool, "order": list(order), "plans": [[1.0, "packed"]],
        "out": "out",
    }  # fmt: skip


def packed(block: Block, x: Tensor, weight: Tensor, bias: Tensor | None = None, added=None, **node) -> Tensor:
    inputs = {"x": x} | ({} if added is None else {"added": added})
    program = {
        "inputs": [*inputs], "state": {}, "prelude": [], "outputs": ["out"],
        "nodes": [block_node(block) | {"added": None if added is None else "added"} | node],
    }  # fmt: skip
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return Program(program, weights).run([*inputs.values()])[0]


def draw(number: int, **fixed) -> Block:
    rng = random.Random(f"{SEED} pairs {number}")
    return random_block(rng, **{"groups": 1, "activation": rng.choice((None, "relu", *ACTIVATIONS))} | fixed)


@torch.no_grad()
@pytest.mark.parametrize("number", range(60))
def test_random_blocks(number):
    block = draw(number)
    torch.set_num_threads(1 + number % 2)
    tensors = normal_tensors(block, torch.bfloat16)
    ways, true = torch_ways(block, tensors, None)
    found = packed(block, **tensors, order=ORDERS[number % 3])
    assert_close_as_torch(found, [way["out"] for way in ways], true["out"], str(block))


@torch.no_grad()
@pytest.mark.parametrize("number", range(30))
def test_whole_numbers_are_exact(number):
    """Also where the input lies in any memory, and where another thread has the other half."""
    block = draw(number, activation=("relu", None)[number % 2])
    torch.set_num_threads(1 + number % 2)
    with torch.enable_grad():
        tensors, _ = integer_tensors(block, torch.bfloat16)
    how = STRIDED[number % len(STRIDED)]
    x = strided(tensors["x"], how)
    true = torch_block(block, **{k: t.double() for k, t in (tensors | {"x": x}).items()})
    assert torch.equal(packed(block, **tensors | {"x": x}).double(), true), (block, how)


@torch.no_grad()
@pytest.mark.parametrize("number", range(20))
def test_sums(number):
    """A tensor is added before the activation, one that lies anyhow."""
    block = draw(number)
    tensors = normal_tensors(block, torch.bfloat16)
    plain = Block(**{**vars(block), "activation": None, "pool": None})
    added = torch.randn(plain.out_shape()).bfloat16()
    if number % 3:
        added = strided(added, STRIDED[number % len(STRIDED)])
    found = packed(block, **tensors, added=added)

    def way(dtype):
        y = torch_block(plain, **{k: t.to(dtype) for k, t in tensors.items()})
        return after_conv(block, y + added.to(dtype))

    assert_close_as_torch(found, way(torch.bfloat16), way(torch.float64), str(block))


#: Rows of these are whole words, some are read as they lie; panels have several parts, or threads share them.
LARGE = [
    Block(3, 64, (9, 11), 96, (1, 1)),
    Block(1, 512, (2, 13), 160, (3, 3), padding=(1, 1)),
    Block(1, 96, (1, 1), 40, (1, 1)),
    Block(2, 1, (84, 84), 32, (8, 8), (4, 4)),
    Block(1, 3, (63, 70), 32, (5, 5), (2, 2)),
    Block(4, 64, (16, 25), 33, (3, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 2), (0, 0), (1, 1))),
    Block(2, 32, (300,), 64, (1,), (1,), (0,), (1,)),
    Block(5, 128, (3, 1), 65, (1, 1)),
    Block(7, 64, (1, 5), 17, (1, 1), (1, 2)),
]


@torch.no_grad()
@pytest.mark.parametrize("block", LARGE, ids=range(len(LARGE)))
@pytest.mark.parametrize("layout", ["as it is", "channels_last", "offset"])
def test_sizes_of_the_field(block, layout):
    tensors = normal_tensors(block, torch.bfloat16)
    x = tensors["x"] if layout == "as it is" else strided(tensors["x"], layout)
    ways, true = torch_ways(block, tensors, None)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = packed(block, **tensors | {"x": x})
        assert_close_as_torch(found, [way["out"] for way in ways], true["out"], str(block))


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_a_nan_goes_where_it_is_read(value, kernel):
    """And nowhere else: what fills up rows is never a neighbour's number."""
    block = Block(2, 5, (9, 10), 19, (kernel, kernel), (2, 2), padding=(kernel // 2,) * 2)
    tensors = normal_tensors(block, torch.bfloat16)
    clean = packed(block, **tensors)
    tensors["x"][1, 3, 4, 6] = value
    found = packed(block, **tensors)
    mask = torch.zeros(2, 1, 9, 10)
    mask[1, 0, 4, 6] = 1
    reads = F.conv2d(mask, torch.ones(1, 1, kernel, kernel), None, 2, kernel // 2) > 0
    assert torch.equal(found.isfinite() | reads, torch.ones_like(found, dtype=torch.bool))
    assert torch.equal(torch.where(reads, 0, found), torch.where(reads, 0, clean))
    expected = torch_block(block, **tensors)
    assert torch.equal(found.isnan(), expected.isnan())


@torch.no_grad()
def test_linear_layers():
    """Odd sizes, one row to many, all activations, on one thread and two."""
    sizes = [64, 96, 130, 7, 33, 256, 1, 40, 21, 17, 34, 600, 5, 65, 3]
    names = list(ACTIVATIONS)
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        module = ACTIVATIONS[names[number % len(names)]].module
        layer = nn.Linear(inputs, outputs, bias=number % 3 != 1)
        model = nn.Sequential(layer, module).bfloat16()
        name, act = fused_activation(None if names[number % len(names)] is None else module)
        node = {
            "op": "linear", "x": "x", "weight": "weight", "bias": None if layer.bias is None else "bias",
            "activation": name, "act": list(act), "out": "out",
        }  # fmt: skip
        program = {"inputs": ["x"], "state": {}, "prelude": [], "nodes": [node], "outputs": ["out"]}
        frozen, exact = Program(program, dict(layer.named_parameters())), copy.deepcopy(model).double()
        strided_rows = torch.randn(2, 3, 2 * inputs)[..., ::2]
        for x in (*(torch.randn(rows, inputs) for rows in (1, 2, 15, 16, 17, 33, 300)), strided_rows):
            torch.set_num_threads(1 + len(x) % 2)
            (found,) = frozen.run([x := x.bfloat16()])
            assert_close_as_torch(found, model(x), exact(x.double()), f"{tuple(x.shape)} to {outputs}")
        assert frozen.run([x[:0]])[0].shape == (0, 3, outputs)


def test_what_is_not_packed_says_so():
    block = Block(2, 4, (5, 5), 6, (3, 3))
    tensors = normal_tensors(block, torch.bfloat16)
    grouped = Block(2, 4, (5, 5), 6, (3, 3), groups=2)
    with pytest.raises(RuntimeError, match="one group"):
        packed(grouped, **normal_tensors(grouped, torch.bfloat16))
    with pytest.raises(RuntimeError, match="transformed"):
        packed(block, **tensors, plans=[[1.0, "packed winograd"]])


def run_again(only: str, **env: str) -> None:
    """These tests in a process of its own."""
    root = Path(cf.__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider",
         "tests/test_packed_pairs.py", "-k", only],
        env=os.environ | {"PYTHONPATH": str(root), "MALLOC_PERTURB_": "128"} | env, cwd=root,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}{ran.stderr[-2000:]}"


ALL = "not again and not elsewhere"


@pytest.mark.first
@pytest.mark.skipif(
    "CNNLSTM_FAST_LEAST" in os.environ, reason="this run is itself with all limits at their least"
)
def test_again_with_every_limit_at_its_least():
    run_again(ALL, CNNLSTM_FAST_LEAST="1")


@pytest.mark.first
@pytest.mark.skipif("CNNLSTM_FAST_BFLOAT16" in os.environ, reason="this run is itself by another unit")
@pytest.mark.parametrize("unit", OTHERS)
def test_again_by_other_units(unit):
    run_again(ALL, CNNLSTM_FAST_BFLOAT16=unit, CNNLSTM_FAST_SHARE=os.environ.get("CNNLSTM_FAST_SHARE", "3"))
