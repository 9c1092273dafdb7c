"""Triton kernels in the interpreter, beside the same on a CUDA device.

The interpreter's copy of the kernels is a module of its own, made while Triton's switch is on; nothing else
in the process sees the switch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

interpreter_and_cuda = pytest.fixture(
    scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def kernels_of(name: str, device: str, make: Callable[[Any, str], Any]) -> Iterator[Any]:
    """``make(module, torch device)`` of ``cnnlstm_fast.kernels.name`` on ``"interpreter"`` or ``"cuda"``."""
    if device == "cuda":
        yield make(importlib.import_module(f"cnnlstm_fast.kernels.{name}"), "cuda")
        return
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=False)  # triples every operation
    yield make(_interpreted(name), "cpu")
    interpreter_builder.options = options


def _interpreted(name: str):
    import triton

    path = Path(__file__).parents[1] / "kernels" / f"{name}.py"
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec = importlib.util.spec_from_file_location(f"interpreted_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
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


def launch_in_bounds(kernel, programs: int, args: dict, options: dict) -> None:
    """As ``cnnlstm_fast.kernels.launching.launch``; in the interpreter each access is checked."""
    from cnnlstm_fast.kernels.launching import launch

    tensors = [t for t in args.values() if isinstance(t, Tensor)]
    with in_bounds(*tensors) if not tensors[0].is_cuda else contextlib.nullcontext():
        launch(kernel, programs, args, options)


def no_launch(*_) -> None:
    """In place of a launch, where none may be."""
    raise AssertionError("a kernel was started")
