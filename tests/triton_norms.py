"""What the tests of the Triton kernels of blocks with a batch norm share."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
from helpers import Block, PoolCase, as_2d
from interpreted import kernels_of, launch_in_bounds
from norms import assert_normed
from torch import Tensor
from triton_blocks import ORDERS, PLANS, _op_args

from cnnlstm_fast.ops import conv_norm as op
from cnnlstm_fast.planning import support

modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
FORWARD_OP, BACKWARD_OP = op.forward_op, op.backward_op


class Kernels:
    """The host functions of the kernels, and where their tensors have to be."""

    def __init__(self, module, device: str):
        self.module, self.device = module, device

    def block(self, *, order=(0, 1, 2, 3), keep_map=False):
        """A function like :func:`norms.ours` whose ops are these host functions."""

        def call(block: Block, x, weight, bias, norm, *, plan: str, layout="channels_first") -> Tensor:
            signal = block.rank == 3
            flat, tensors = as_2d(block, {"x": x, "weight": weight})
            affine = [tensors["x"], tensors["weight"], bias, norm.weight, norm.bias]
            of_batch = support.of_batch(norm)
            statistics = (None, None) if of_batch else (norm.running_mean, norm.running_var)
            given = [None if t is None else t.to(self.device) for t in (*affine, *statistics)]
            args = (*_op_args(flat), list(order), PLANS[plan])
            raw, stats = op.ConvNormFunction.apply(*given, norm.eps, *args, keep_map)
            if of_batch:
                count = raw.shape[order.index(0)] * math.prod(_map_size(flat))
                op.update_running(norm, bias, stats[0].cpu(), stats[1].cpu(), count)
            out = raw.permute([order.index(axis) for axis in range(4)]).cpu()
            return out.squeeze(2) if signal else out

        return call

    def assert_normed(self, block, tensors, norm, *, plan, order=None, keep_map=None, **options):
        """As :func:`norms.assert_normed`."""
        order = random.choice(ORDERS) if order is None else order
        keep_map = random.random() < 0.5 if keep_map is None else keep_map
        our = self.block(order=order, keep_map=keep_map)
        return assert_normed(block, tensors, norm, plan=plan, our=our, **options)


def norm_kernels(device: str):
    """The kernels on a device, in place of the ops that run there."""
    for found in kernels_of("conv_norm", device, Kernels):
        module = found.module
        forward, backward = (partial(f, run=launch_in_bounds) for f in (module.forward, module.backward))
        with mock.patch.multiple(op, forward_op=forward, backward_op=backward):
            yield found


def _map_size(block: Block) -> tuple[int, ...]:
    return replace(block, activation=None, pool=None).out_shape()[2:]


# ---------------------------------------------------------------- numbers


SMALL = Block(3, 2, (6, 7), 18, (2, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 2), (0, 0), (1, 1)))


# ---------------------------------------------------------------- what is asked for, bits


def _forward(kernels, block, tensors, *, plan, given=False, keep=True, keep_map=False, order=(0, 2, 3, 1)):
    """(the op's arguments without the plan's, its results) of a norm with weights."""
    x, weight, bias = (tensors[name].to(kernels.device) for name in ("x", "weight", "bias"))
    statistics = (bias, bias.abs() + 0.5) if given else (None, None)
    args = (1e-5, *_op_args(block), list(order), PLANS[plan])
    results = kernels.module.forward(x, weight, bias, bias, bias, *statistics, *args, keep, keep_map)
    return x, weight, args, results
