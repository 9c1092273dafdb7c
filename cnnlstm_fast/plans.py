"""Which plan runs a block, why, and why not the others. The only place that decides.

- ``direct``: our own convolution; the whole block stays in registers and cache.
- ``chunked``: the library's convolution over as many frames as stay in cache, then one pass for
  bias, activation, pool and layout.
- ``reference``: PyTorch's own operators. Always right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlstm_fast import _ext
from cnnlstm_fast.spec import ACTIVATIONS, BYTE_WINDOW, BlockSpec

PLANS = ("auto", "direct", "chunked", "reference")

#: Set by `explain` while it watches a model run: told of every block and of every module that is
#: not fused (:class:`cnnlstm_fast.explain.Recorder`).
observer = None

_DTYPES = (torch.float32, torch.bfloat16)


def why_not_fused(spec: BlockSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why neither ``direct`` nor ``chunked`` can run this call, as a sentence; None if they can.

    ``x`` is (N, C, H, W) and ``weight`` (Cout, C / groups, KH, KW).
    """
    if spec.activation not in ACTIVATIONS:
        return f"the activation {spec.activation!r} has no fused kernel"
    if spec.window > BYTE_WINDOW:
        return f"the pool's window of {spec.window} elements is larger than {BYTE_WINDOW}"
    if x.dtype not in _DTYPES:
        return f"the fused kernels compute float32 and bfloat16, not {str(x.dtype)[6:]}"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "input and parameters differ in dtype"
    if x.device.type == "cpu":
        if not _ext.loaded:
            return f"the compiled kernels are missing: {_ext.error}"
    elif x.device.type == "cuda":
        if not triton_available():
            return "Triton is not installed"
    else:
        return f"there are no kernels for the device {x.device.type!r}"
    if weight.device != x.device:
        return f"the input is on {x.device} and the weight on {weight.device}"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.overrides.has_torch_function((x, weight)) or not _is_plain(x) or not _is_plain(weight):
        return "the input or a parameter is a Tensor subclass"
    if x.is_quantized or x.layout != torch.strided or x.is_conj() or x.is_neg():
        return "the input is not a plain strided tensor"
    if torch.onnx.is_in_onnx_export():
        return "ONNX export needs standard operators"
    return None


_triton: bool | None = None


def triton_available() -> bool:
    """Whether the Triton package is installed; looks once, imports nothing."""
    global _triton
    if _triton is None:
        import importlib.util

        _triton = importlib.util.find_spec("triton") is not None
    return _triton


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_plain(t: Tensor) -> bool:
    if type(t) in _PLAIN or torch.compiler.is_compiling():
        return True
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, (FakeTensor, FunctionalTensor))


def choose(
    plan: str, spec: BlockSpec, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[str, str, str]:
    """The plan for a call: (forward plan, backward plan, the reason in words).

    Raises:
        ValueError: ``plan`` names a plan that cannot run this call; the message says why.
    """
    if plan == "reference":
        return "reference", "reference", "asked for"
    why_not = why_not_fused(spec, x, weight, bias)
    if why_not is not None:
        if plan != "auto":
            raise ValueError(
                f'plan="{plan}" cannot run here: {why_not}. Pass plan="auto" to let '
                "the package choose, or plan=\"reference\" for PyTorch's own operators"
            )
        return "reference", "reference", why_not
    if plan != "auto":
        return plan, plan, "asked for"
    return "direct", "direct", "default"
