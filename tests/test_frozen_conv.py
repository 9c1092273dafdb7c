"""Convolutions and matrix products on packed weights, held to the rules of the blocks."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    LAYOUTS,
    POOL_2X2,
    WINOGRAD,
    Block,
    PoolCase,
    as_2d,
    assert_close_as_torch,
    field_blocks,
    integer_tensors,
    needs_extension,
    normal_tensors,
    our_activation,
    random_blocks,
    strided,
    torch_block,
)
from test_numbers import SPECIAL_BLOCKS, with_specials
from torch import Tensor

from cnnlstm_fast.functional.arguments import make_spec
from cnnlstm_fast.ops import frozen_conv as frozen
from cnnlstm_fast.spec import ACTIVATIONS as ACTIVATION_IDS
from cnnlstm_fast.spec import LAYOUTS as ORDERS

pytestmark = needs_extension

FIRST, LAST = [0, 1, 2, 3], [0, 2, 3, 1]
AUTO, DIRECT, WINOGRADS = 0, 1, 2
methods = pytest.mark.parametrize("method", [AUTO, DIRECT, WINOGRADS], ids=["auto", "direct", "winograd"])
threads = pytest.mark.parametrize("threads", [1, 2])


def run(
    block: Block, tensors: dict[str, Tensor], added: Tensor | None = None, *, in_order=LAST, out_order=LAST,
    method: int = AUTO,
) -> Tensor:  # fmt: skip
    """The block on packed weights, its result (N, C, H, W) again."""
    block, tensors = as_2d(block, tensors)
    spec, why = make_spec(
        tuple(tensors["weight"].shape), False, block.stride, block.padding, block.dilation, block.groups,
        None, our_activation(block), block.pool_module(), "channels_first",
    )  # fmt: skip
    assert spec is not None, why
    weight, bias = tensors["weight"], tensors.get("bias")
    packed = frozen.pack_op(weight, bias, spec.conv_args, spec.pool_args, in_order, out_order)
    y = frozen.op(
        tensors["x"], packed, added, list(weight.shape), spec.conv_args, ACTIVATION_IDS[spec.activation],
        spec.act_args, spec.pool_args, in_order, out_order, method,
    )  # fmt: skip
    assert y.is_contiguous()
    return y.permute([out_order.index(axis) for axis in range(4)])


def expected(block: Block, tensors: dict[str, Tensor], added: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch, in the tensors' dtype."""
    block, tensors = as_2d(block, tensors)
    if added is None:
        return torch_block(block, **tensors)
    z = torch_block(replace(block, activation=None, pool=None), **tensors) + added
    y, p = ACTIVATIONS[block.activation].module(z), block.pool
    return y if p is None else F.max_pool2d(y, p.kernel, p.stride, p.padding, p.dilation, p.ceil_mode)


def assert_right(block: Block, tensors: dict[str, Tensor], added: Tensor | None = None, **how) -> None:
    def double(t):
        return None if t is None else t.double()

    def last(t):
        return strided(t, "channels_last") if t is not None and t.dim() == 4 else t

    true = expected(block, {k: double(t) for k, t in tensors.items()}, double(added))
    ways = [expected(block, tensors, added), expected(block, {k: last(t) for k, t in tensors.items()}, added)]
    assert_close_as_torch(run(block, tensors, added, **how), ways, true, f"{how}")


def map_like(block: Block, tensors: dict[str, Tensor]) -> Tensor:
    """A random tensor of the size of the convolution's map, channels first or last."""
    block, tensors = as_2d(block, tensors)
    z = torch.randn(torch_block(replace(block, activation=None, pool=None), **tensors).shape)
    return z.contiguous(memory_format=random.choice([torch.contiguous_format, torch.channels_last]))


@pytest.mark.instruction_sets
@random_blocks(60)
@threads
def test_error_is_as_pytorchs(block, threads):
    torch.set_num_threads(threads)
    assert_right(block, normal_tensors(block, torch.float32), in_order=random.choice([FIRST, LAST]))


@pytest.mark.instruction_sets
@random_blocks(30)
def test_whole_numbers_are_exact(block):
    tensors, _ = integer_tensors(block, torch.float32)
    assert torch.equal(run(block, tensors), expected(block, tensors))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("channels", [16, 64, 130])
def test_windows_of_a_map_of_two_columns(channels):
    """Rows so short take several panels at a time, and their windows pool in registers."""
    block = Block(2, 3, (3, 11), channels, (5, 5), (2, 4), (2, 0), pool=POOL_2X2)
    tensors, _ = integer_tensors(block, torch.float32)
    assert torch.equal(run(block, tensors), expected(block, tensors))


@pytest.mark.instruction_sets
@random_blocks(40, **WINOGRAD)
@methods
def test_three_by_three(block, method):
    assert_right(block, normal_tensors(block, torch.float32), method=method)


@field_blocks
@methods
def test_blocks_of_the_field(block, method):
    for order in (FIRST, LAST):
        assert_right(block, normal_tensors(block, torch.float32), in_order=order, method=method)


@pytest.mark.instruction_sets
@random_blocks(20)
@pytest.mark.parametrize("activation", list(ACTIVATIONS), ids=str)
def test_activations(block, activation):
    block = replace(block, activation=activation)
    assert_right(block, normal_tensors(block, torch.float32))


@pytest.mark.instruction_sets
@random_blocks(30)
@pytest.mark.parametrize("activation", [None, "relu", "hardtanh", "silu"], ids=str)
def test_what_is_added(block, activation):
    block = replace(block, activation=activation)
    tensors = normal_tensors(block, torch.float32)
    assert_right(block, tensors, map_like(block, tensors))


@pytest.mark.instruction_sets
@random_blocks(20, **WINOGRAD)
@methods
def test_what_is_added_to_three_by_three(block, method):
    block = replace(block, c=max(block.c, 8), c_out=max(block.c_out, 8))
    tensors = normal_tensors(block, torch.float32)
    assert_right(block, tensors, map_like(block, tensors), method=method)


@random_blocks(12)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(block, layout):
    order = ["NCHW".index(axis) for axis in ORDERS[layout][0]]
    tensors = normal_tensors(block, torch.float32)
    assert_right(block, tensors, out_order=order)


@random_blocks(20)
@pytest.mark.parametrize("how", ["channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("in_order", [FIRST, LAST], ids=["first", "last"])
def test_inputs_of_any_strides(block, how, in_order):
    block, tensors = as_2d(block, normal_tensors(block, torch.float32))
    x = tensors["x"]
    if how == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif how == "sliced":
        x = torch.cat([x.transpose(2, 3), x.transpose(2, 3)], 1)[:, : block.c].transpose(2, 3)
    else:
        x = x[:, :, :1].expand(x.shape)
    assert_right(block, tensors | {"x": x}, in_order=in_order)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 13, 15, 30, 200])
@pytest.mark.parametrize("inputs, outputs", [(7, 5), (512, 260), (1030, 64), (3136, 33), (4096, 17)])
def test_products(rows, inputs, outputs):
    block = Block(1, inputs, (1, rows), outputs, (1, 1), activation="relu")
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] = strided(tensors["x"], "channels_last")
    assert_right(block, tensors)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("inputs, outputs", [(65, 130), (1030, 64), (4096, 80)])
def test_a_products_bits_do_not_depend_on_the_other_rows(inputs, outputs):
    block = Block(1, inputs, (1, 150), outputs, (1, 1))
    tensors = normal_tensors(block, torch.float32)
    tensors["x"] = strided(tensors["x"], "channels_last")
    torch.set_num_threads(2)
    together = run(block, tensors)
    for rows in (1, 2, 3, 5, 14, 43):
        at = random.randrange(150 - rows)
        some = tensors | {"x": tensors["x"][..., at : at + rows]}
        torch.set_num_threads(random.choice([1, 2]))
        assert torch.equal(run(block, some), together[..., at : at + rows])


@pytest.mark.instruction_sets
@random_blocks(20)
def test_bits_depend_neither_on_threads_nor_on_the_other_images(block):
    block = replace(block, n=max(block.n, 3))
    _, tensors = as_2d(block, normal_tensors(block, torch.float32))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(block, tensors))
    assert torch.equal(*found)
    part = run(replace(block, n=1), tensors | {"x": tensors["x"][1:2]})
    assert torch.equal(part, found[0][1:2])


@pytest.mark.instruction_sets
@pytest.mark.parametrize("block", SPECIAL_BLOCKS.values(), ids=SPECIAL_BLOCKS)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
@methods
def test_specials_in_the_input(block, special, method):
    """Exactly where PyTorch has them, and whole numbers beside them."""
    tensors, _ = with_specials(replace(block, c=max(block.c, 8), c_out=40), torch.float32, [special])
    ours, theirs = run(block, tensors, method=method), expected(block, tensors)
    assert ((ours == theirs) | (ours.isnan() & theirs.isnan())).all()


@pytest.mark.parametrize("how", ["a corner", "an input's", "an output's"])
def test_taps_that_are_nearly_zero_go_direct(how):
    """A loud input that no tap sees would round the rest of its tile."""
    block = Block(2, 32, (20, 23), 48, (3, 3), padding=(1, 1), bias=False)
    tensors = normal_tensors(block, torch.float32)
    weight = tensors["weight"]
    (
        weight[:, :, 2, 2]
        if how == "a corner"
        else weight[:, 5, 0]
        if how == "an input's"
        else weight[7, :, :, 2]
    ).zero_()
    tensors["x"][:, 5, 7, ::5] = 1e6
    assert torch.equal(run(block, tensors, method=WINOGRADS), run(block, tensors, method=DIRECT))


@pytest.mark.parametrize(
    "block",
    [
        Block(1, 256, (4, 26), 512, (3, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 1), (0, 1), (1, 1))),
        Block(9, 64, (31, 33), 66, (3, 3), padding=(1, 1), pool=POOL_2X2),
        Block(
            1, 17, (1, 9000), 40, (1, 7), padding=(0, 3), pool=PoolCase((1, 3), (1, 2), (0, 1), (1, 1), True)
        ),
        Block(2, 3, (120, 171), 32, (5, 5), stride=(2, 2)),
        Block(1, 512, (9, 31), 70, (1, 1), stride=(2, 2)),
        Block(1, 1024, (5, 30), 70, (1, 1), stride=(1, 1)),
        Block(3, 40, (60, 50), 40, (3, 3), padding=(1, 1), groups=40, pool=POOL_2X2),
        Block(1, 32, (30, 200), 32, (21, 11), stride=(2, 1), padding=(10, 5)),
    ],
    ids=[
        "many channels",
        "several items",
        "a long signal",
        "video",
        "strided",
        "a page",
        "depthwise",
        "many taps",
    ],
)
@threads
@pytest.mark.parametrize("in_order", [FIRST, LAST], ids=["first", "last"])
def test_blocks_of_real_size(block, threads, in_order):
    torch.set_num_threads(threads)
    tensors = normal_tensors(block, torch.float32)
    if in_order is LAST:
        tensors["x"] = strided(tensors["x"], "channels_last")
    assert_right(block, tensors, in_order=in_order)


def test_padding_after():
    """More zeros behind the last row and column, as padding="same" has them with even kernels."""
    x, weight = torch.randn(2, 5, 9, 11), torch.randn(6, 5, 4, 2)
    conv = [1, 1, 1, 0, 1, 1, 1, 1, 1]
    packed = frozen.pack_op(weight, None, conv, [], LAST, FIRST)
    y = frozen.op(x, packed, None, [6, 5, 4, 2], conv, 0, [], [], LAST, FIRST)
    z = F.pad(x.double(), (0, 1, 1, 2))
    assert_close_as_torch(y, F.conv2d(x, weight, padding="same"), F.conv2d(z, weight.double()))


@random_blocks(10)
@pytest.mark.parametrize("out_order", [FIRST, LAST], ids=["first", "last"])
def test_the_fake_kernel_knows_the_shape(block, out_order):
    block, tensors = as_2d(block, normal_tensors(block, torch.float32))
    spec, _ = make_spec(
        tuple(tensors["weight"].shape), False, block.stride, block.padding, block.dilation, block.groups,
        None, our_activation(block), block.pool_module(), "channels_first",
    )  # fmt: skip
    packed = frozen.pack_op(tensors["weight"], None, spec.conv_args, spec.pool_args, LAST, out_order)
    given = (
        tensors["x"], packed, None, list(tensors["weight"].shape), spec.conv_args, 0, [], spec.pool_args,
        LAST, out_order,
    )  # fmt: skip
    torch.library.opcheck(frozen.op, given, test_utils=("test_schema", "test_faketensor"))


def test_no_image():
    block = Block(0, 5, (9, 9), 6, (3, 3), pool=POOL_2X2)
    assert run(block, normal_tensors(block, torch.float32)).shape == (0, 6, 3, 3)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(size=[6, 4, 3, 3]), "x"),
        (dict(size=[6, 5, 3]), "size"),
        (dict(conv=[1, 1, 0, 0, 1, 1]), "conv"),
        (dict(conv=[0, 1, 0, 0, 1, 1, 1]), "conv"),
        (dict(conv=[1, 1, 0, 0, 1, 1, 2]), "channels|x"),
        (dict(pool=[2, 2]), "pool"),
        (dict(pool=[9, 9, 1, 1, 0, 0, 1, 1, 0]), "too small"),
        (dict(activation=99), "activation"),
        (dict(act=[1.0]), "activation"),
        (dict(in_order=[0, 1, 2, 2]), "order"),
        (dict(method=7), "method"),
        (dict(added=torch.zeros(2, 6, 9, 9)), "added"),
        (dict(packed=torch.zeros(3)), "packed"),
    ],
    ids=str,
)
def test_wrong_arguments(change, says):
    conv = [1, 1, 0, 0, 1, 1, 1]
    given = dict(
        x=torch.randn(2, 5, 9, 9), added=None, size=[6, 5, 3, 3], conv=conv, activation=1, act=[], pool=[],
        in_order=LAST, out_order=LAST, method=0,
    )  # fmt: skip
    given["packed"] = frozen.pack_op(torch.randn(6, 5, 3, 3), None, conv, [], LAST, LAST)
    assert frozen.op(**given).shape == (2, 7, 7, 6)
    with pytest.raises(RuntimeError, match=says):
        frozen.op(**(given | change))
