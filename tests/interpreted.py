"""Triton kernels in the interpreter, beside the same on a CUDA device.

The interpreter's copy of the kernels is a module of its own, made while Triton's switch is on; nothing else
in the process sees the switch.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

interpreter_and_cuda = pytest.fixture(
    scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def kernels_of(name: str, device: str, make: Callable[[Any, str], Any]) -> Iterator[Any]:
    """``make(module, torch device)`` of ``cnnlstm_fast.kernels.name`` on ``"interpreter"`` or ``"cuda"``."""
    if device == "cuda":
        yield make(importlib.import_module(f"cnnlstm_fast.kernels.{name}"), "cuda")
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    patches = (
        # sanitizing triples the time of every operation
        mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)),
        mock.patch.object(interpreter, "_convert_float", partial(_convert_float, interpreter._convert_float)),
        mock.patch.object(interpreter.ReduceOps, "generic_reduce", _reduce_by_halves),
        mock.patch.object(interpreter, "_patch_lang", partial(_patch_once, interpreter._patch_lang)),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield make(_interpreted(name), "cpu")


def _patch_once(patch, function):
    """The language is patched for a launch; for every function of a kernel once more, it took a third."""
    import triton.language as tl
    from triton.runtime import interpreter

    within_a_launch = not tl.core.is_builtin(tl.load)
    return interpreter._LangPatchScope() if within_a_launch else patch(function)


def _convert_float(convert, values, source, target, rounding):
    """The interpreter's conversion of types; to the nearest bfloat16, as devices do it, where it cuts off."""
    import triton.language as tl

    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(values, source, target, rounding)
    rounded = torch.from_numpy(values.view("int32")).view(torch.float32).bfloat16()
    return rounded.view(torch.int16).numpy().view("uint16")


def _reduce_by_halves(operation, inputs):
    """A reduction of one tensor, whose axis is a power of two, where the interpreter goes by elements."""
    (tensor,) = inputs
    data = tensor.handle.data
    while data.shape[operation.axis] > 1:
        halves = np.split(data, 2, operation.axis)
        data = operation.combine_fn.fn(*[operation.to_tensor(h, tensor.dtype) for h in halves]).handle.data
    return [operation.to_tensor(data.squeeze(operation.axis), tensor.dtype)]


def _interpreted(name: str):
    """``cnnlstm_fast.kernels.name`` and the modules whose kernels it shares, imported anew."""
    import triton

    import cnnlstm_fast.kernels as package

    prefix = f"{package.__name__}."
    before = {key: sys.modules.pop(key) for key in [*sys.modules] if key.startswith(prefix)}
    attributes = dict(vars(package))
    for key in before:  # or else `from cnnlstm_fast.kernels import conv_block` would find the old one
        vars(package).pop(key.removeprefix(prefix), None)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        module = importlib.import_module(prefix + name)
    for key in [key for key in sys.modules if key.startswith(prefix)]:
        del sys.modules[key]
    sys.modules.update(before)
    vars(package).clear()
    vars(package).update(attributes)
    return module


@contextlib.contextmanager
def in_bounds(*tensors: Tensor) -> Iterator[None]:
    """Interpreted kernels may read and write these tensors' memory only."""
    from triton.runtime.interpreter import interpreter_builder as builder

    ranges = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)]

    def checked(access, mask_at: int):
        def run(pointers, *args):
            at = pointers.data[args[mask_at].data.astype(bool)].astype(np.uint64)
            size = pointers.get_element_ty().primitive_bitwidth // 8
            inside = [(at >= begin) & (at + size <= end) for begin, end in ranges]
            assert np.logical_or.reduce(inside).all(), "a kernel leaves the memory of its arguments"
            return access(pointers, *args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
            patch.setattr(builder, name, checked(getattr(builder, name), mask_at))
        yield


def launch_in_bounds(kernel, programs: int, args: dict, options: dict, others=()) -> None:
    """Any choice of ``cnnlstm_fast.kernels.launching.launch``; in the interpreter each access is checked."""
    from cnnlstm_fast.kernels.launching import launch

    programs, tiles, options = random.choice([(programs, {}, options), *others])
    args = args | tiles
    tensors = [t for t in args.values() if isinstance(t, Tensor)]
    with in_bounds(*tensors) if not tensors[0].is_cuda else contextlib.nullcontext():
        launch(kernel, programs, args, options)


def no_launch(*_) -> None:
    """In place of a launch, where none may be."""
    raise AssertionError("a kernel was started")


def with_open_sizes(
    args: dict[str, Any], open_dims: dict[str, tuple[int, ...]]
) -> tuple[Any, dict[str, Any]]:
    """The guards of a trace, and ``args`` as fake tensors in it; only the sizes ``open_dims`` are free."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def fake(name: str, t: Tensor) -> Tensor:
        free = open_dims.get(name, ())
        dims = [DimDynamic.DYNAMIC if d in free else DimDynamic.STATIC for d in range(t.dim())]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dims))

    return env, {n: fake(n, value) if isinstance(value, Tensor) else value for n, value in args.items()}
