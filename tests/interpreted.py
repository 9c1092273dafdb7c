"""Triton kernels in the interpreter, beside the same on a CUDA device.

The interpreter's copy of the kernels is a module of its own, made while Triton's switch is on; nothing else
in the process sees the switch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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
