"""The block op on CUDA: Triton kernels, imported on the first call so that nothing else imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

_lib = torch.library.Library("cnnlstm_fast", "IMPL")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kernels(x: Tensor):
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"got an input of {x.dtype}, the CUDA kernels compute float32, bfloat16 and float16: "
            'use plan="reference"'
        )
    from cnnlstm_fast.kernels import conv_block

    return conv_block


def _run_forward(x, weight, bias, conv, activation, act, pool, order, plan, keep):
    if activation > 1 or len(conv) > 7:
        raise ValueError('the CUDA kernels compute ReLU and even padding only: use plan="reference"')
    out, codes = _kernels(x).forward(x, weight, bias, conv, activation, pool, order, plan, keep)
    return out, codes, x.new_empty(0)


def _run_backward(grad, x, weight, codes, conv, activation, act, pool, order, plan, *needs):
    return _kernels(x).backward(grad, x, weight, codes, conv, activation, pool, order, plan, *needs)


def _forward(x, *args):
    # Launched through the traceable wrapper, a kernel would cost a millisecond of dispatch.
    with torch.cuda.device(x.device), set_wrap_triton_enabled(False):
        return _run_forward(x, *args)


def _backward(grad, x, *args):
    with torch.cuda.device(x.device), set_wrap_triton_enabled(False):
        return _run_backward(grad, x, *args)


def _trace_forward(mode, op, types, args, kwargs):
    if not _becomes_kernels(types, args[0]):
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return _run_forward(*args)


def _trace_backward(mode, op, types, args, kwargs):
    if not _becomes_kernels(types, args[1]):
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return _run_backward(*args)


def _becomes_kernels(types, x: Tensor) -> bool:
    """Whether AOTAutograd should see the kernels instead of the op, as `torch.library.triton_op` does it.

    An exported program keeps the op: Triton kernels cannot be saved with it.
    """
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    plain = (Tensor, FakeTensor, FunctionalTensor)
    return x.is_cuda and all(t in plain for t in types) and not custom_triton_ops_decomposition_disabled()


for _name, _kernel, _trace in (
    ("conv_block", _forward, _trace_forward),
    ("conv_block_backward", _backward, _trace_backward),
):
    _lib.impl(_name, _kernel, "CUDA")
    torch.library.register_torch_dispatch(f"cnnlstm_fast::{_name}", FunctionalTensorMode, _trace, lib=_lib)
