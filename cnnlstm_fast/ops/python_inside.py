"""Passing on exceptions of Python code that runs inside a C++ op.

LibTorch's stable ABI turns every exception of a kernel written in Python into a ``RuntimeError``, even a
``KeyboardInterrupt``, a signal handler's own error or a ``MemoryError``.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable

import torch

__all__ = ["call", "noting"]


class _Noted(threading.local):
    begun = False
    error: BaseException | None = None


_noted = _Noted()


def noting(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel for ``Library.impl`` whose exceptions :func:`call` can raise."""

    @functools.wraps(kernel)
    def run(*args):
        try:
            _noted.begun = True
            kernel(*args)
        except BaseException as error:
            _noted.error = error
            raise

    return run


def call(op: Callable, *args):
    """``op(*args)``, which calls such kernels in this thread; raises their exceptions."""
    if torch.compiler.is_compiling():
        return op(*args)
    _noted.begun, _noted.error = False, None
    try:
        return op(*args)
    except RuntimeError as error:
        failed = error
    noted, _noted.error = _noted.error, None
    if not _noted.begun and _only_ctrl_c_raises():
        # A signal handler runs in the first Python code after the signal. That may be the kernel's entry,
        # where nothing is noted yet. If the op failed for another reason, it fails again here.
        op(*args)
        raise KeyboardInterrupt
    raise noted or failed


def _only_ctrl_c_raises() -> bool:
    """Whether handlers of this thread's signals raise a ``KeyboardInterrupt`` if they raise anything."""
    handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
    return (
        threading.current_thread() is threading.main_thread()
        and handlers.pop(signal.SIGINT, None) is signal.default_int_handler
        and not any(map(callable, handlers.values()))
    )
