"""What Python code inside an op of C++ raises comes out of the op as it is.

The stable ABI of LibTorch hands a ``RuntimeError`` on in place of everything that a kernel written in Python
raises: Ctrl-C, a signal handler's own error, a ``MemoryError``.
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
    """A kernel for ``Library.impl`` whose errors :func:`call` knows."""

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
    """``op(*args)``, which calls one such kernel or more in this thread."""
    if torch.compiler.is_compiling():
        return op(*args)
    _noted.begun, _noted.error = False, None
    try:
        return op(*args)
    except RuntimeError as error:
        failed = error
    noted, _noted.error = _noted.error, None
    if not _noted.begun and _only_ctrl_c_raises():
        # A signal's handler runs in the first Python code after it, which may be the kernel's entry: no code
        # of Python's can note that. An op that fails for another reason fails again.
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
