"""Denormal numbers, which many processors compute ten to a hundred times as slowly as others.

Gradients through many steps fade into them: 0.5 to the 140th power is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def aside(work: Callable[[], T], stopped: threading.Event, *, flush: bool) -> T:
    """``work()`` in a thread of its own; with ``flush``, denormals are zero there.

    So they are in the threads that share its operators' work: these inherit it from who starts them, and end
    with it. The caller's stay as they are. ``stopped`` is set if the caller is interrupted, who then waits
    for ``work`` to end.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_flush_denormal, initargs=(flush,)) as pool:
        try:
            return pool.submit(work).result()
        except BaseException:
            stopped.set()
            raise


def are_flushed() -> bool:
    """Whether denormals are zero here and in all threads that share an operator's work."""
    denormals = torch.full((2**20,), 1e-39)
    return not (denormals * 1).any()
