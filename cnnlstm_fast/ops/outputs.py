"""Whether the memory of a large result is free: the C++ code asks before it reuses that memory.

The memory of a large result is a storage of PyTorch's, so that it can be resized and freed like any other
(``csrc/memory.cpp``). The C++ code keeps a tensor of each such storage, up to 256 MiB in all. A new result
gets a storage that nothing else holds, because clearing fresh pages costs as much as a convolution.
LibTorch's stable ABI does not give a storage's reference count, so it is read here.
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
    """Reference counts of a storage: in C++, of its Python object, and weak ones."""
    storage = t.untyped_storage()
    return (
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
        weakref.getweakrefcount(storage),
    )


def _state(t: Tensor, alone: tuple[int, int, int]) -> int:
    storage = t.untyped_storage()
    # The program has emptied it, resized it, or moved it to shared memory.
    if storage.nbytes() != t.numel() or not storage.resizable():
        return FOREIGN
    del storage
    return NOBODY if _counts(t) == alone else SOMEBODY


def _interrupt_again() -> None:
    """Raise the KeyboardInterrupt again in a moment, since the op cannot pass it on."""
    timer = threading.Timer(0.01, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _holders(tensors: list[Tensor]) -> list[int]:
    """Whether anything else holds the storage of each tensor.

    The C++ code calls this without tensors when a KeyboardInterrupt ended the call before.
    """
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
