"""Whether this thread captures a model for :func:`cnnlstm_fast.freeze`.

Blocks are then PyTorch's operators, which freezing plans anew, and recurrent layers are one op.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _State(threading.local):
    active = False


_state = _State()


def active() -> bool:
    return _state.active


@contextlib.contextmanager
def on() -> Iterator[None]:
    _state.active = True
    try:
        yield
    finally:
        _state.active = False
