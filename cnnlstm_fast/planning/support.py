"""Whether a plan can run a call: None, or why not, as a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from cnnlstm_fast import _ext
from cnnlstm_fast.errors import WrongShape
from cnnlstm_fast.planning import observer
from cnnlstm_fast.planning.costs import MOST_TAPS_BY_PATCHES, MOST_TAPS_COMPUTED_AGAIN
from cnnlstm_fast.planning.problem import Sizes
from cnnlstm_fast.spec import BYTE_WINDOW, BlockSpec

_DTYPES = (torch.float32, torch.bfloat16)


def needs_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def norm_tensors(norm: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias, running mean and running variance of a batch norm."""
    found: Any = norm
    try:  # ten times as fast as nn.Module.__getattr__
        parameters, buffers = norm._parameters, norm._buffers
        return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
    except KeyError:
        return found.weight, found.bias, found.running_mean, found.running_var


def of_batch(norm) -> bool:
    """Whether a batch norm normalises by the batch's own statistics."""
    _, _, mean, var = norm_tensors(norm)
    return norm.training or (mean is None and var is None)


def records_gradients() -> bool:
    """Whether autograd records what runs: in inference mode it does not, whatever the mode of gradients.

    The compiler cannot trace the question for inference mode.
    """
    return torch.is_grad_enabled() and (
        torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    )


def folds(norm) -> bool:
    """Whether a norm is folded into the convolution.

    It is not where its weight needs a gradient, which would be a difference of two large sums.
    """
    return not of_batch(norm) and not (records_gradients() and needs_gradient(norm.weight))


def why_not_normed(spec: BlockSpec, x: Tensor, weight: Tensor, norm) -> str | None:
    """Why a block with this batch norm is not fused, as a sentence; None if it is."""
    height, width = spec.conv_size(x.shape[2:], weight.shape[2:])
    return why_not_norm_tensors(x.device, x.dtype, norm, x.shape[0] * height * width)


def why_not_norm_tensors(device: torch.device, dtype: torch.dtype, norm, values: int) -> str | None:
    """Why a batch norm of a map is not fused, as a sentence; None if it is.

    Args:
        device, dtype: of the map.
        values: for each channel.
    """
    tensors = _, _, mean, var = norm_tensors(norm)
    if (mean is None) != (var is None):
        return "the norm has one running statistic without the other"
    for t in tensors:
        if t is not None and (t.device != device or t.dtype not in (dtype, torch.float32)):
            return "the norm's parameters are on another device or of another dtype"
        if t is not None and not _is_plain(t):
            return "a parameter of the norm is a Tensor subclass"
    if mean is not None and mean.requires_grad:
        return "the norm's running statistics want gradients"
    if of_batch(norm):
        if values < 2:
            return "one value per channel has no variance"
        if norm.momentum is None and torch.compiler.is_compiling():
            return "a cumulative average reads its count"
    return None


def why_not_fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why no fused plan takes these tensors, as a sentence; None if one does.

    Of a block ``x`` is (N, C, H, W) and ``weight`` (Cout, C / groups, KH, KW).
    """
    if x.dtype not in _DTYPES and not (x.dtype == torch.float16 and x.device.type == "cuda"):
        return f"the fused kernels compute float32 and bfloat16, not {str(x.dtype)[6:]}"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "input and parameters differ in dtype"
    if x.device.type == "cpu":
        if not _ext.loaded:
            _ext.warn_if_missing()
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
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed"
    if not _is_plain(x) or not _is_plain(weight):
        return "the input or a parameter is a Tensor subclass"
    if x.is_quantized or x.layout != torch.strided:
        return "the input is not a plain strided tensor"
    if not torch.compiler.is_compiling() and (x.is_conj() or x.is_neg()):  # dynamo cannot ask that
        return "the input is not a plain strided tensor"
    if torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():
        return "ONNX export and torch.jit.trace need standard operators"
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


def is_plain_call(x: Tensor, weight: Tensor) -> bool:
    """Whether a known plan can run these tensors: no transform, tracer, subclass or lazy negation."""
    return (
        type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not x.is_neg()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


def why_not_call(spec: BlockSpec, x: Tensor, weight: Tensor, bias: Tensor | None, norm) -> str | None:
    """Why no fused plan takes this call, whatever its sizes, as a sentence; None if one does."""
    return why_not_fused(x, weight, bias) or (None if norm is None else why_not_normed(spec, x, weight, norm))


def keeps_map(weight_shape: Sequence[int]) -> bool:
    """Whether a pooled block under batch statistics keeps the map, since computing it again costs more."""
    return weight_shape[1] * weight_shape[2] * weight_shape[3] > MOST_TAPS_COMPUTED_AGAIN


def why_not_by_patches(spec: BlockSpec, x: Tensor, weight: Tensor) -> str | None:
    """Why batch statistics come from the convolution's map and not from its patches."""
    if x.device.type != "cpu":
        return "products of patches are summed on the CPU only"
    if torch.is_grad_enabled() and x.requires_grad:
        return "the input wants a gradient"
    if spec.groups > 1:
        return "the convolution is grouped"
    if x.dtype != torch.float32:
        return "gradients of a folded norm would be rounded on their way"
    if weight.shape[1] * weight.shape[2] * weight.shape[3] > MOST_TAPS_BY_PATCHES:
        return "the kernel has many taps"
    return None


def check_sizes(spec: BlockSpec, size: Sequence[int], kernel: Sequence[int]) -> None:
    """Raise a ``ValueError`` if an input of ``size`` (H, W) leaves the convolution or the pool nothing."""
    conv = spec.conv_size(size, kernel)
    if any(extent < 1 for extent in (*conv, *size)):
        raise WrongShape(
            f"an input of {size[0]}x{size[1]} is too small for a {kernel[0]}x{kernel[1]} kernel with "
            f"padding={spec.padding} and dilation={spec.dilation}: nothing is left. Use a larger input "
            "or more padding"
        )
    if spec.pool is not None and min(spec.out_size(size, kernel)) < 1:
        raise WrongShape(
            f"the convolution gives {conv[0]}x{conv[1]}, too small for a pool of {spec.pool.kernel[0]}x"
            f"{spec.pool.kernel[1]}: nothing is left. Use a larger input or a smaller pool"
        )


def why_not_sizes(sizes: Sizes) -> str | None:
    """Why no fused plan takes a block of these sizes, as a sentence; None if one does.

    Raises:
        ValueError: the input is too small for the kernel or the pool.
    """
    spec, shape, weight_shape = sizes.spec, sizes.shape, sizes.weight_shape
    check_sizes(spec, shape[2:], weight_shape[2:])
    if shape[1] == 0:
        return "there are no channels"
    if spec.window > BYTE_WINDOW:
        return f"the pool's window of {spec.window} elements is larger than {BYTE_WINDOW}"
    if not spec.windows_meet(shape[2:], weight_shape[2:]):
        return "the pool has windows without an element"
    if sizes.norm == "batch" and shape[0] == 0:
        return "an empty batch has no statistics"
    return None


#: Elements of one image's scratch and map that the direct plan's 32-bit offsets reach.
_DIRECT_ELEMENTS = 2**29


def why_not_direct(sizes: Sizes) -> str | None:
    """Why ``direct`` cannot run a block that our plans can, as a sentence; None if it can."""
    if sizes.device != "cpu":
        return None
    spec, shape, weight_shape = sizes.spec, sizes.shape, sizes.weight_shape
    height, width = (s + 2 * p + 1 for s, p in zip(shape[2:], spec.padding, strict=True))
    out = spec.conv_size(shape[2:], weight_shape[2:])
    taps = weight_shape[1] * weight_shape[2] * weight_shape[3]
    read, computed = height * width * shape[1], out[0] * out[1] * max(taps, 64)
    if read > _DIRECT_ELEMENTS or computed > _DIRECT_ELEMENTS:
        return "one image is too large for the direct plan"
    return None


def why_not_winograd(sizes: Sizes) -> str | None:
    """Why ``winograd`` cannot run a block that our plans can, as a sentence; None if it can."""
    spec = sizes.spec
    plain = spec.stride == spec.dilation == (1, 1) and spec.groups == 1
    if plain and tuple(sizes.weight_shape[2:]) == (3, 3):
        if sizes.device == "cpu" and sizes.dtype == torch.float32:
            return None
    return "the plan winograd takes float32 on the CPU, 3x3 kernels with stride 1, no dilation and no groups"


def why_not_fft(sizes: Sizes) -> str | None:
    """Why ``fft`` cannot run a block that our plans can, as a sentence; None if it can."""
    if sizes.device != "cpu" or sizes.dtype != torch.float32:
        return f"FFT convolutions are float32 on the CPU, not {str(sizes.dtype)[6:]} on {sizes.device}"
    if sizes.spec.groups > 1 or max(sizes.spec.dilation) > 1:
        return "FFT convolutions take neither groups nor dilation"
    return None


#: Hidden units up to which our CUDA kernel is faster than a loop of ten launches per step. The kernel reads
#: all recurrent weights in each step: at this size 8 MB in bfloat16, at about 100 GB/s.
_CUDA_UNITS = 1024


def why_not_fused_recurrent(x: Tensor, params: Sequence[Tensor]) -> str | None:
    """Why the recurrent kernels don't take these tensors, as a sentence; None if they do.

    ``params`` are the weights and the given initial states.
    """
    if x.device.type == "cuda":
        rows, width = params[1].shape
        if rows > 4 * width:
            return "the CUDA kernels do not take projections (proj_size)"
        if width > _CUDA_UNITS:
            return (
                f"above {_CUDA_UNITS} units the CUDA kernels wait for their weights longer than a loop does"
            )
    for p in params:
        if p.dtype != x.dtype or p.device != x.device or type(p) not in _PLAIN:
            why_not = why_not_fused(x, p, None)
            if why_not:
                return why_not
    return why_not_fused(x, params[0], None)


def library_differentiates() -> bool:
    """Whether PyTorch's own recurrent functions support the modes that are active.

    Their oneDNN layers have no batching rule and no forward derivatives. Compiled by inductor, they have no
    backward either.
    """
    return torch.onnx.is_in_onnx_export() or not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def global_hooks() -> bool:
    """Whether hooks on all modules are set, other than those of the observer, which is told of fused ones."""
    return _has_any_global_hook() and (observer.current is None or not observer.current.alone)


def own_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has hooks, or a forward that is not its class's."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's forward and nothing else."""
    return not (own_hooks(module) or global_hooks())
