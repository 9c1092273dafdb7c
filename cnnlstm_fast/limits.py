"""Sizes at which fast paths begin, or that are worked on at a time: measured, and set by tests."""

from __future__ import annotations

import os


def limit(name: str, usual: int, least: int) -> int:
    """``usual``, unless the environment variable ``CNNLSTM_FAST_<name>`` holds another number.

    With ``CNNLSTM_FAST_LEAST=1`` every limit that has no variable of its own is at its ``least``. Those of
    the C++ code (``csrc/limits.h``) are read by the same rule.
    """
    one = os.environ.get(f"CNNLSTM_FAST_{name}")
    if one:
        return max(least, int(one))
    return least if os.environ.get("CNNLSTM_FAST_LEAST") == "1" else usual
