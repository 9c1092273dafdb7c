"""Random blocks that race, and the plans that are named with them."""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from importlib import import_module

import pytest
import torch
from helpers import needs_extension
from racing import no_clock

import cnnlstm_fast as cf
from benchmarks import blocks
from benchmarks.race import WrongResult

pytestmark = pytest.mark.usefixtures("one_thread")


def test_blocks_are_drawn_alike_from_a_seed():
    drawn = blocks.draw_blocks(200, seed=3)
    assert drawn == blocks.draw_blocks(200, seed=3) != blocks.draw_blocks(200, seed=4)
    assert len(set(drawn)) == 200 and {b.family for b in drawn} == set(blocks._FAMILIES)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_blocks_are_valid_and_described(seed):
    for block in blocks.draw_blocks(60, seed):
        call = block.function(cf.reference.conv_block, training=False)
        meta = {n: w.to("meta") for n, w in block.weights(torch.Generator()).items()}
        if block.norm:
            call = partial(call.func, **(call.keywords | {"norm": call.keywords["norm"].to("meta")}))
        out = call(torch.empty(block.shape, device="meta"), **meta)
        assert out.numel() > 0
        conv = torch.nn.functional.conv1d if len(block.size) == 1 else torch.nn.functional.conv2d
        x = torch.empty(block.shape, device="meta")
        y = conv(x, **meta, stride=block.stride, padding=block.padding, groups=block.groups)
        assert tuple(y.shape[2:]) == block.conv_size, block.describe()


TINY = blocks.Block(
    "image", 2, 3, (9, 8), 10, (3, 3), (1, 1), (1, 1), pool=("Max", (2, 2), (2, 2), (0, 0)), layout="features"
)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "block",
    [TINY, dataclasses.replace(TINY, norm=True), dataclasses.replace(TINY, channels=12, groups=2)],
    ids=lambda b: b.describe(),
)
def test_a_block_races_and_names_its_plan(monkeypatch, never_ours, block, mode):
    monkeypatch.setattr(blocks, "ROUNDS", 3)
    monkeypatch.setattr(blocks, "FLOOR", 0.0)
    found = blocks.race_block(block, mode, seed=random.randrange(10**6), turn_s=0.0)
    assert found.rounds == blocks.ROUNDS and found.reason
    assert found.ratio.p50 == pytest.approx(found.eager_ms / found.ours_ms, rel=2)
    assert found.plan == "reference"


AVERAGED = next(b for b in blocks.draw_blocks(400, 0) if b.pool is not None and b.pool[0] == "Avg")


@needs_extension
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "block",
    [AVERAGED, *{b.family: b for b in blocks.draw_blocks(60, 1)}.values()],
    ids=lambda b: b.describe(),
)
def test_the_plan_that_is_named_is_the_one_that_runs(monkeypatch, block, mode):
    functional = import_module("cnnlstm_fast.functional.conv_block")  # by name, it is the function
    block, ran = dataclasses.replace(block, batch=min(block.batch, 4)), []
    for where, name, plan in (
        (functional.CallPlan, "run", lambda call, *_: call.plan),
        (functional, "_reference", lambda *_: "reference"),
    ):
        run = getattr(where, name)
        monkeypatch.setattr(
            where, name, lambda *args, run=run, plan=plan: (ran.append(plan(*args)), run(*args))[1]
        )
    monkeypatch.setattr(blocks, "ROUNDS", 1)
    monkeypatch.setattr(blocks, "FLOOR", 0.0)
    found = blocks.race_block(block, mode, seed=random.randrange(10**6), turn_s=0.0)
    assert set(ran) == {found.plan}
    if block.pool is not None and block.pool[0] == "Avg":
        assert found.plan != "reference" and "AvgPool2d is PyTorch's own" in found.reason


def test_a_slow_block_gets_more_rounds_and_loses_none(monkeypatch):
    monkeypatch.setattr(blocks, "FLOOR", float("inf"))
    monkeypatch.setattr(blocks, "MOST_ROUNDS", 20)
    monkeypatch.setattr(blocks, "turn", lambda run, batches, seconds: [1.0])
    assert blocks.race_block(TINY, "inference", seed=random.randrange(10**6)).rounds == 20


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_wrong_block_is_never_timed(monkeypatch, mode):
    right = cf.functional.conv_block
    monkeypatch.setattr(cf.functional, "conv_block", lambda *a, **k: right(*a, **k) * (1 + 1e-4))
    monkeypatch.setattr(blocks, "turn", no_clock)
    with pytest.raises(WrongResult, match="2x3x9x8 -> 10, k3x3"):
        blocks.race_block(TINY, mode, seed=random.randrange(10**6))
