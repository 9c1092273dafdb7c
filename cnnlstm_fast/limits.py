"""Sizes at which fast paths begin, or that are worked on at a time: measured, and set by tests."""

from __future__ import annotations

import os

import torch

from cnnlstm_fast import _ext


def limit(name: str, usual: int, least: int) -> int:
    """``usual``, unless the environment variable ``CNNLSTM_FAST_<name>`` holds another number.

    With ``CNNLSTM_FAST_LEAST=1`` every limit that has no variable of its own is at its ``least``. Those of
    the C++ code (``csrc/limits.h``) are read by the same rule.
    """
    one = os.environ.get(f"CNNLSTM_FAST_{name}")
    if one:
        return max(least, int(one))
    return least if os.environ.get("CNNLSTM_FAST_LEAST") == "1" else usual


def kernel_limit(name: str) -> int:
    """The value in force of a limit of the C++ code; 0 where there are no kernels."""
    return torch.ops.cnnlstm_fast.limit(name) if _ext.loaded else 0
