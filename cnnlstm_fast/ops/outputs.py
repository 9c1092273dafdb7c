"""Who holds the memory of a large result: the C++ code asks before it makes another result of it.

Large results are made of storages of PyTorch's own, so that they can be resized and emptied like any other
(``csrc/memory.cpp``). The C++ code keeps a tensor of each storage, up to 256 MiB in all, and makes a new
result of one that nobody else holds: clearing fresh pages costs as much as a convolution. LibTorch's stable
ABI does not say how many hold a storage, Python's does.
"""

from __future__ import annotations

import _thread
import sys
import threading
import weakref

import torch
from torch import Tensor

from cnnlstm_fast import _ext

#: What :func:`_holders` gives for a storage.
NOBODY, SOMEBODY, FOREIGN = 0, 1, 2


def _counts(t: Tensor) -> tuple[int, int, int]:
    """Owners in C++, owners of the Python object, weak references: whoever holds it is in one of them."""
    storage = t.untyped_storage()
    return (
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
        weakref.getweakrefcount(storage),
    )


def _state(t: Tensor, alone: tuple[int, int, int]) -> int:
    storage = t.untyped_storage()
    # Emptied, resized, or moved to shared memory by those who had it.
    if storage.nbytes() != t.numel() or not storage.resizable():
        return FOREIGN
    del storage
    return NOBODY if _counts(t) == alone else SOMEBODY


def _interrupt_again() -> None:
    """What interrupted this comes again in a moment, and then again until the op is done."""
    timer = threading.Timer(0.01, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _holders(tensors: list[Tensor]) -> list[int]:
    """Of each tensor whether anybody else holds its storage. Without any: the call before was interrupted."""
    try:
        if not tensors:
            _interrupt_again()
        alone = _counts(torch.empty(1, dtype=torch.uint8))
        return [_state(t, alone) for t in tensors]
    except KeyboardInterrupt:
        _interrupt_again()
        return [SOMEBODY] * len(tensors)


if _ext.loaded and hasattr(torch._C, "_storage_Use_Count"):
    _lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
    _lib.define("holders(Tensor[] tensors) -> int[]")
    _lib.impl("holders", _holders, "CompositeExplicitAutograd")
    torch.ops.cnnlstm_fast.recycle_outputs(True)
