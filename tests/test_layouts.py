"""Every layout by name: its values, shape, memory and gradients, against indexing done here."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import (
    LAYOUTS,
    Block,
    PoolCase,
    assert_block,
    in_layout,
    integer_tensors,
    our_block,
    plans,
    random_blocks,
    torch_block,
)

from cnnlstm_fast import functional, reference

layouts = pytest.mark.parametrize("layout", LAYOUTS)
BLOCK = Block(3, 5, (9, 14), 18, (3, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 2), (0, 0), (1, 1)))
SIGNAL = Block(3, 5, (15,), 18, (3,), (1,), (1,), (1,), pool=PoolCase((2,), (2,), (0,), (1,)))

# contract.md, for the blocks above: a map of 3 x 18 x 4 x 7 and one of 3 x 18 x 7
SHAPES = {
    "channels_first": ((3, 18, 4, 7), (3, 18, 7)),
    "channels_last": ((3, 18, 4, 7), (3, 18, 7)),
    "locations": ((3, 28, 18), (3, 7, 18)),
    "locations_time_major": ((28, 3, 18), (7, 3, 18)),
    "features": ((3, 504), (3, 126)),
    "columns": ((3, 7, 72), (3, 7, 18)),
    "columns_time_major": ((7, 3, 72), (7, 3, 18)),
    "rows": ((3, 4, 126), (3, 1, 126)),
    "rows_time_major": ((4, 3, 126), (1, 3, 126)),
    "columns_channels_last": ((3, 7, 72), (3, 7, 18)),
    "columns_channels_last_time_major": ((7, 3, 72), (7, 3, 18)),
    "rows_channels_last": ((3, 4, 126), (3, 1, 126)),
    "rows_channels_last_time_major": ((4, 3, 126), (1, 3, 126)),
}


def test_every_layout_is_tested():
    assert set(LAYOUTS) == set(SHAPES)
    from cnnlstm_fast import spec

    assert set(LAYOUTS) == set(spec.LAYOUTS)


@plans
@layouts
@pytest.mark.parametrize("block", [BLOCK, SIGNAL], ids=["image", "signal"])
def test_shape_values_memory_and_gradients(plan, layout, block):
    tensors, grad = integer_tensors(block, torch.float32)
    out = assert_block(block, tensors, grad, plan=plan, layout=layout, exact=True)["out"]
    assert tuple(out.shape) == SHAPES[layout][block.rank == 3]
    if layout != "channels_last":
        assert out.is_contiguous()
    elif block.rank == 4:
        assert out.is_contiguous(memory_format=torch.channels_last)
    else:
        assert out.transpose(1, 2).is_contiguous()
    assert out.storage_offset() == 0 and out.untyped_storage().nbytes() == out.nbytes, "larger memory"


@pytest.mark.instruction_sets
@random_blocks(24)
@plans
def test_random_blocks_in_a_random_layout(block, plan):
    layout = random.choice(LAYOUTS)
    tensors, grad = integer_tensors(block, torch.float32)
    assert_block(block, tensors, grad, plan=plan, layout=layout, exact=True)


@plans
@layouts
def test_bfloat16(plan, layout):
    tensors, grad = integer_tensors(BLOCK, torch.bfloat16)
    assert_block(BLOCK, tensors, grad, plan=plan, layout=layout, exact=True)


@plans
@layouts
@pytest.mark.parametrize("channels_last_input", [False, True], ids=["from_nchw", "from_nhwc"])
def test_memory_does_not_depend_on_the_inputs(plan, layout, channels_last_input):
    tensors, _ = integer_tensors(BLOCK, torch.float32)
    expected = our_block(BLOCK, **tensors, plan=plan, layout=layout)
    if channels_last_input:
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
    out = our_block(BLOCK, **tensors, plan=plan, layout=layout)
    assert out.stride() == expected.stride()
    assert torch.equal(out, expected)


@plans
@layouts
@pytest.mark.parametrize("rank", [3, 4])
def test_dimensions_of_size_1(plan, layout, rank):
    ones = (1,) * (rank - 2)
    block = Block(1, 3, (6, 4)[: rank - 2], 1, tuple(3 * k for k in ones), ones, ones, ones)
    tensors, grad = integer_tensors(block, torch.float32)
    out = assert_block(block, tensors, grad, plan=plan, layout=layout, exact=True)["out"]
    assert out.is_contiguous()
    assert torch.equal(out.view(-1), in_layout(torch_block(block, **tensors), layout).reshape(-1))


@layouts
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 7), (1, 1, 1, 1), (0, 3, 4, 5), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "permuted"])
def test_to_layout(layout, shape, memory):
    y = torch.randn(shape)
    if memory == "permuted":
        y = y.movedim(1, -1).contiguous().movedim(-1, 1)
    out = reference.to_layout(y, layout)
    assert torch.equal(out, in_layout(y, layout))


def test_both_signatures_are_one():
    import inspect

    assert inspect.signature(functional.conv_block) == inspect.signature(reference.conv_block)
