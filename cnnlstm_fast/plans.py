"""Which plan runs a block, why, and why not the others. The only place that decides.

- ``direct``: our own convolution; the whole block stays in registers and cache.
- ``chunked``: the library's convolution over as many frames as stay in cache, then one pass for
  bias, activation, pool and layout.
- ``winograd``: as ``chunked``, with our own convolution of 3x3 taps, which takes 16 products where others
  take 36.
- ``fft``: a convolution by Fourier transforms along one axis, which takes fewer multiplications for large
  kernels (:mod:`cnnlstm_fast.ops.conv_fft`), then one pass as ``chunked``.
- ``reference``: PyTorch's own operators. Always right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cnnlstm_fast import _ext, backends
from cnnlstm_fast.errors import WrongShape
from cnnlstm_fast.spec import BYTE_WINDOW, BlockSpec

PLANS = ("auto", "direct", "chunked", "winograd", "fft", "reference")
#: Those whose rounding is that of the loudest place nearby (:data:`cnnlstm_fast.backends.allow_transforms`).
TRANSFORMS = ("winograd", "fft")


class Observer(Protocol):
    """Who is told of every block, recurrent layer and module that is not fused, as it runs.

    Attributes:
        alone: whether nobody else listens to all modules; only then blocks stay fused.
    """

    alone: bool

    def block_begins(
        self,
        spec: BlockSpec | None,
        x: Tensor,
        weight: Tensor,
        norm: nn.Module | None,
        activation: Any,
        pool: nn.Module | None,
        layout: str,
        plan: str,
        reason: str,
    ) -> None: ...

    def block_ends(self, out: Tensor) -> None: ...

    def layer_runs(self, plan: str, reason: str) -> None: ...

    def as_is(self, module: nn.Module, reason: str) -> None: ...


#: Set by `explain` while it watches a model run (:class:`cnnlstm_fast.explain.Recorder`).
observer: Observer | None = None

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


def folds(norm) -> bool:
    """Whether a norm is folded into the convolution; its weight's gradient would be a difference of sums."""
    return not of_batch(norm) and not (torch.is_grad_enabled() and needs_gradient(norm.weight))


def why_not_normed(spec: BlockSpec, x: Tensor, weight: Tensor, norm) -> str | None:
    """Why a block with this batch norm is not fused, as a sentence; None if it is."""
    tensors = _, _, mean, var = norm_tensors(norm)
    if (mean is None) != (var is None):
        return "the norm has one running statistic without the other"
    for t in tensors:
        if t is not None and (t.device != x.device or t.dtype not in (x.dtype, torch.float32)):
            return "the norm's parameters are on another device or of another dtype"
        if t is not None and not _is_plain(t):
            return "a parameter of the norm is a Tensor subclass"
    if mean is not None and mean.requires_grad:
        return "the norm's running statistics want gradients"
    if of_batch(norm):
        height, width = spec.conv_size(x.shape[2:], weight.shape[2:])
        if x.shape[0] * height * width < 2:
            return "one value per channel has no variance"
        if norm.momentum is None and torch.compiler.is_compiling():
            return "a cumulative average reads its count"
    return None


def keeps_map(weight_shape: Sequence[int]) -> bool:
    """Whether a pooled block under batch statistics keeps the map, because it costs much to compute again."""
    return weight_shape[1] * weight_shape[2] * weight_shape[3] > 384


#: Taps up to which batch statistics come from their products.
_MOST_TAPS_BY_PATCHES = 64


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
    if weight.shape[1] * weight.shape[2] * weight.shape[3] > _MOST_TAPS_BY_PATCHES:
        return "the kernel has many taps"
    return None


def why_not_fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why neither ``direct`` nor ``chunked`` takes these tensors, as a sentence; None if they do.

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
    if torch.autograd.forward_ad._current_level >= 0:
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


def why_not_call(spec: BlockSpec, x: Tensor, weight: Tensor, bias: Tensor | None, norm) -> str | None:
    """Why neither plan takes this call whatever its sizes, as a sentence; None if one does."""
    return why_not_fused(x, weight, bias) or (None if norm is None else why_not_normed(spec, x, weight, norm))


#: Elements of one image's scratch and map that the direct plan's 32-bit offsets reach.
_DIRECT_ELEMENTS = 2**29


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


def _has_winograd(spec: BlockSpec, weight_shape: tuple, dtype: torch.dtype) -> bool:
    plain = spec.stride == spec.dilation == (1, 1) and spec.groups == 1
    return plain and tuple(weight_shape[2:]) == (3, 3) and dtype == torch.float32


def _winograd_pays(c: int, co: int, window: int, training: bool, needs_x: bool, normed: bool) -> bool:
    """Whether fewer products outweigh passes over inputs and map that ``direct`` does without."""
    if normed:
        return c >= (16 if needs_x else 32) and co >= 16
    if training:
        return co >= 32 and c >= (32 if window > 2 else 24 if co < 48 else 16)
    return co >= 32 and c >= (8 if co >= 64 else 12)


def _fft_pays(spec: BlockSpec, shape: tuple, weight_shape: tuple, dtype: torch.dtype) -> bool:
    """Whether ``fft`` computes the convolution faster than the library, forward and backward, on the CPU.

    Read off races of both: a kernel must be long along one axis, with enough products per transform
    (channels, and taps along the other axis), and its spectra must serve enough places.
    """
    if dtype != torch.float32 or spec.groups > 1 or max(spec.dilation) > 1:
        return False
    taps = [-(-k // s) for k, s in zip(weight_shape[2:], spec.stride, strict=True)]
    short, long = min(*taps), max(*taps)
    channels, weights = min(*weight_shape[:2]), math.prod(weight_shape)
    conv = spec.conv_size(shape[2:], weight_shape[2:])
    places = shape[0] * conv[0] * conv[1]
    if channels < 16 or weights > 2**22:
        return False
    if short < 3:
        pays, least = long >= 24, 2**25
        if pays and shape[2] == weight_shape[2] == 1:  # a signal, where `direct` too beats the library
            pays = long * channels >= (1200 if channels >= 48 else 2048)
    else:
        pays, least = long >= (7 if max(spec.stride) == 1 else 9) and long**2 * channels >= 1500, 2**29
        pays = pays and max(*conv) >= 24
    # The map's size and then the batch's last: under the compiler, asking for them is a guard. In a map
    # shorter than a quarter of the kernel, most of what is transformed is not used.
    return (
        pays
        and 4 * max(*conv) > max(*weight_shape[2:])
        and weights <= 2**9 * places
        and weights * places >= least
    )


class _Sizes(NamedTuple):
    """What the rules for one block ask.

    Attributes:
        taps: of one output channel.
        window: elements of the pool's window; 1 without a pool.
        outputs: of the convolution's map, over the whole batch.
        signal: 1-d, as an image of one row.
        longest: the kernel's longest side.
        column: the kernel is one: its patches are not runs of memory.
        tall: a column of at least 16 taps over one channel: its patches are single values.
        bridge: the result lies as a recurrent layer reads it.
        last: the input is channels-last, which the library reads slower than its own layouts.
        any_batch: the batch's size is not to be asked: under the compiler that is a guard.
        work: multiplications of one pass; of one image under ``any_batch``.
        transforms: whether convolutions may be computed by transforms.
    """

    spec: BlockSpec
    dtype: torch.dtype
    training: bool
    needs_x: bool
    norm: str | None
    channels: int
    out_channels: int
    taps: int
    weights: int
    window: int
    conv: tuple[int, int]
    outputs: int
    signal: bool
    pointwise: bool
    longest: int
    column: bool
    tall: bool
    depthwise: bool
    bridge: bool
    last: bool
    any_batch: bool
    work: int
    transforms: bool

    def smaller(self, outputs: int) -> bool:
        """Whether the map is known to have fewer elements."""
        return not self.any_batch and self.outputs < outputs

    def narrower(self, width: int) -> bool:
        """Whether the map is known to have fewer columns; under the compiler a signal may have any length."""
        return not self.any_batch and self.conv[1] < width

    @property
    def strided(self) -> bool:
        return max(self.spec.stride) > 1

    @property
    def rgb(self) -> bool:
        """Whether the library has a kernel of its own: for images of three channels or one, in its layout."""
        return self.channels in (1, 3) and not self.signal and self.spec.layout != "channels_last"

    @property
    def fixed(self) -> bool:
        """Whether the map's sizes may be asked: one that varies is a symbol, and its answer a guard."""
        return not any(isinstance(size, torch.SymInt) for size in self.conv)

    @property
    def in_planes(self) -> bool:
        """Whether contiguous images stay so: ``direct`` may read and write plane after plane."""
        first = self.spec.layout == "channels_first" and not self.last
        return first and self.window == 1 and self.dtype == torch.float32

    @property
    def planes(self) -> bool:
        """Whether ``direct`` is a product of matrices, planes of places into planes."""
        spec = self.spec
        padded = any((*spec.padding, *spec.padding_after))
        plain = self.pointwise and max(*spec.stride, spec.groups) == 1 and not padded
        return plain and self.in_planes and self.channels <= 1536  # kMostPlanes of csrc/conv_block.cpp

    @property
    def alone(self) -> bool:
        """Whether there is nothing but a convolution."""
        return self.spec.activation is None and self.norm is None and self.window == 1 and not self.bridge


#: What the rules answer: forward plan, backward plan, reason.
_Choice = tuple[str, str, str]


def _choice(plan: str, reason: str) -> _Choice:
    return plan, plan, reason


def _winograd_or_none(s: _Sizes) -> _Choice | None:
    normed = s.norm == "batch" or (s.norm == "given" and s.training)
    height, width = s.conv
    little = not s.training and not s.any_batch and s.window == 1 and s.work < 2**27
    if not normed and s.fixed and (s.training or little):
        if 4 * (height + height % 2) * (width + width % 2) > 5 * height * width:
            return None  # a quarter of what is computed lies beyond an odd map
    if not _winograd_pays(s.channels, s.out_channels, s.window, s.training, s.needs_x, normed):
        return None
    if not s.any_batch:  # weights are transformed at every call
        places = s.outputs // s.out_channels
        if places < (256 if normed else 16):
            return None
        most = 5000
        if little:
            if s.work < 2**25 or 4 * s.out_channels < s.channels:
                return None
            most = 600
        if s.weights > most * places:
            return None
    return _choice("winograd", "3x3 taps over many channels: 16 products in place of 36")


def _is_long_signal(s: _Sizes) -> bool:
    """Whether a long kernel slides along a signal, which the library computes far from the machine's peak."""
    long = s.signal and s.longest >= 24 and s.channels >= 8 and not s.narrower(64)
    if s.training:
        fits = s.out_channels <= 128
    else:
        fits = s.longest >= 32 or 2 * s.out_channels > s.channels
    plain = s.spec.groups == 1 and s.dtype == torch.float32
    return long and fits and plain and s.weights <= 3 * 2**16 and (s.any_batch or s.work >= 2**23)


def _with_norm(s: _Sizes) -> _Choice:
    """Under the batch's statistics, or under given ones that train."""
    by_patches = s.norm == "batch" and not s.needs_x and s.spec.groups == 1 and s.dtype == torch.float32
    by_patches = by_patches and s.taps <= _MOST_TAPS_BY_PATCHES
    if s.smaller(2**17 if by_patches and s.training else 2**14):
        return _choice("reference", "a small map: the calls alone cost more")
    if by_patches:
        long_rows = s.channels == 1 and s.taps >= 48 and not s.tall
        if s.window == 1 and s.out_channels < 2 * s.taps and not long_rows:
            return _choice("reference", "few channels: products of patches cost more than the convolution")
        return _choice("direct", "statistics from the patches: the map never exists")
    if 2 * s.out_channels <= s.channels and s.longest < 25:
        return _choice("reference", "few channels of many: the library is as fast")
    if _direct_with_norm(s):
        return _choice("direct", "few channels: our convolution, then normalised in cache")
    if s.window == 1 and not s.needs_x and s.taps > 384 and s.dtype == torch.float32:
        if s.spec.layout == "channels_last" and not s.smaller(2**19):
            return _choice(
                "chunked", "on its way to a convolution: normalised in the layout that this one reads"
            )
    few_taps = (s.taps <= 16 or s.window > 1) if s.needs_x else (s.taps <= 128 and s.window > 1)
    if not few_taps:
        return _choice("reference", "bound by arithmetic: the library is as fast")
    if (s.window == 1 or s.taps > 384) and s.smaller(2**18):
        return _choice("reference", "a small map: the library is as fast")
    if s.window == 1 and (s.depthwise or s.out_channels < 4 * s.taps):
        return _choice("reference", "few channels: the library is as fast")
    ours = s.needs_x and not s.depthwise and s.dtype == torch.float32 and s.taps <= 384
    return _choice("direct" if ours else "chunked", "normalised in cache: each map passes memory once")


def _direct_with_norm(s: _Sizes) -> bool:
    """Whether our convolution of more than a few taps, then one pass over its map, beats the library's."""
    if s.norm != "batch" or s.spec.groups > 1 or s.dtype != torch.float32:
        return False
    if s.out_channels < 16 or (s.pointwise and s.window == 1):
        return False
    if s.window > 1:
        narrow = s.column or s.narrower(12)
        few = s.channels <= 64 and s.taps <= 1600 and s.weights <= 2**17
        return not s.needs_x and few and not narrow and not s.smaller(2**15)
    if s.signal and s.needs_x:
        few = s.channels <= 24 and s.out_channels <= 128
        return few and not s.narrower(96) and not s.smaller(2**16)
    if s.signal:
        return s.channels <= 24 and not s.smaller(2**15)
    return s.needs_x and s.channels <= 24 and s.taps <= 400 and not s.column and not s.smaller(2**17)


def _folded(s: _Sizes) -> _Choice | None:
    """In inference, under a norm by given statistics; None where the rules without a norm decide."""
    least = 2**17
    if s.window > 1 or s.bridge or s.longest >= 24:
        least = 2**13
    elif s.pointwise or s.strided:
        least = 2**16 if s.last and not s.pointwise else 2**18
    if s.smaller(least):
        return _choice("reference", "a small map: folding the norm costs more than it saves")
    if s.window == 1 and _library_is_as_fast(s):
        return _as_fast()
    if s.weights <= 2**19 and s.taps <= 2304:
        return _choice("direct", "the norm is folded into the weights")
    return None


def _library_is_as_fast(s: _Sizes) -> bool:
    """Whether a convolution without a pool gains nothing by ending in registers, in inference."""
    if s.pointwise:
        few = s.strided or s.out_channels <= 16 or s.channels >= 512
        return not s.bridge and (few or s.conv[1] < 12)
    if s.strided and s.rgb and s.longest <= 3 and not s.bridge:
        return True
    return s.strided and s.taps >= 1024 and not s.last


def _of_planes(s: _Sizes) -> _Choice:
    """In inference; up to 16 images the library multiplies matrices too, where it has one thread."""
    if s.any_batch:
        pays = s.channels <= 64
    else:
        area = s.conv[0] * s.conv[1]
        places = s.outputs // s.out_channels
        if places >= 16 * area:
            pays = places * (s.channels + s.out_channels) >= 2**19 and (s.channels < 160 or area >= 64)
        else:
            pays = s.channels <= (32 if s.spec.activation in ("silu", "gelu") else 64) and s.outputs >= 2**19
    if not pays:
        return _as_fast()
    return _choice("direct", "pointwise: a product of matrices, the rest in registers")


def _depthwise_pays(s: _Sizes) -> bool:
    """Whether our depthwise convolution of planes beats the library's and what follows it, in inference."""
    if s.alone or not s.in_planes or not s.fixed:
        return False
    normed = s.norm == "given"
    wide = s.conv[0] >= 4 and s.conv[1] >= (28 if s.strided else 24)
    few = s.taps <= 9 if s.strided or not normed else s.taps <= 25
    return wide and few and (normed or not s.strided) and not s.smaller(2**17)


def _in_inference(s: _Sizes) -> _Choice:
    if s.window > 1 and s.taps >= 2**10 and 2**17 <= s.weights <= 2**20:
        return _choice("chunked", "many taps: the library's convolution, then the rest while in cache")
    image = s.spec.layout == "channels_first" and not s.strided and s.channels > 1 and not s.signal
    if s.window == 1 and image and s.taps <= 32 and s.dtype == torch.float32:
        if s.any_batch or s.smaller(2**23):
            return _choice("reference", "nothing to save: the map is the result, in the library's own layout")
    if s.out_channels <= 16 and s.taps >= 800:
        return _choice("reference", "few channels and many taps: the library is as fast")
    if s.pointwise and s.window == 1 and s.norm is None:
        if s.work < (2**23 if s.alone else 2**22) or (s.alone and s.taps < 32):
            return _choice("reference", "little arithmetic: there is nothing to save")
        if _library_is_as_fast(s):
            return _as_fast()
    if s.window == 1 and s.taps <= 16 and s.signal and s.strided:
        return _choice("reference", "a strided signal: the library is as fast")
    if s.taps <= 32 or (s.window > 1 and s.weights <= 2**20):
        return _choice("direct", "bound by memory: the map before the pool never exists")
    if not s.any_batch and s.outputs >= (2**21 if s.taps < 400 else 2**23):
        return _choice("direct" if s.weights <= 2**19 else "chunked", "a large map: kept in cache")
    map_size = s.out_channels * s.conv[0] * s.conv[1]
    if s.weights <= 2**14 and (s.signal or s.taps < 128 or (map_size > 2**14 and s.taps < 400)):
        return _choice("direct", "bound by memory: bias and activation while in registers")
    many = s.channels >= 8 and s.out_channels >= (64 if s.pointwise or s.taps >= 400 else 17)
    many = many and not (s.strided and not s.signal and s.weights > 2**17)
    least = 2**26 if s.strided and not s.signal else 2**22
    if s.window == 1 and many and s.weights <= 2**19 and s.conv[1] > 3 and s.work >= least:
        return _choice("direct", "bias and activation while in registers")
    return _by_arithmetic()


def _in_training(s: _Sizes) -> _Choice:
    if s.window == 1:
        if s.alone or (s.pointwise and s.taps >= 4 and not s.bridge):
            return _as_fast()
        if s.signal and s.strided and s.taps <= 16 and not s.bridge:
            return _choice("reference", "a strided signal: the library is as fast")
        if not (s.signal or s.bridge) and s.smaller(2**17):
            return _choice("reference", "a small map: the calls alone cost more")
        few = s.weights <= 2**13
        if s.needs_x:
            if s.taps <= 32 or (s.signal and s.taps >= 96 and few):
                return _choice("direct", "few weights")
            if s.bridge and s.signal and s.weights <= 2**14:
                return _choice("direct", "a bridge: written straight into its layout")
        elif (
            s.taps <= 16 or (s.taps >= 128 and few and not s.rgb) or (s.signal and s.bridge and s.taps <= 128)
        ):
            return _choice("direct", "few weights")
        return _by_arithmetic()
    most = 2**17 if s.window > 4 or s.taps <= 704 else 5 * 2**14
    if s.weights <= most and (s.window > 2 or s.taps <= 704):
        return _choice("direct", "gradients go to the winners only")
    if s.window > 2 and s.weights <= 2**18:
        return _choice("chunked", "many taps: the library's convolution and gradients, in chunks")
    if s.window > 2 and s.weights <= 2**20 and not s.smaller(2**19):
        return "direct", "chunked", "large weights: the library's gradients, in chunks"
    return _by_arithmetic()


def _as_fast() -> _Choice:
    return _choice("reference", "little to fuse: the library is as fast")


def _by_arithmetic() -> _Choice:
    return _choice("reference", "bound by arithmetic over large weights: the library is as fast")


def _by_sizes(
    spec: BlockSpec,
    shape: tuple,
    weight_shape: tuple,
    dtype: torch.dtype,
    training: bool,
    needs_x: bool,
    norm: str | None,
    last: bool,
    transforms: bool,
) -> tuple[str | None, str, str, str]:
    """What follows from sizes alone: (why nothing is fused or None, forward plan, backward plan, reason).

    The plans are the fastest by rules read off ``python -m benchmarks blocks`` and off the blocks of
    published models: ``direct`` wins by what it need not write and read, the map before the pool and its
    gradient. The library's convolutions win where arithmetic over large weights dominates, and where a
    block is so small that there is less to save than a call costs.
    """
    reference = "reference", "reference"
    check_sizes(spec, shape[2:], weight_shape[2:])
    if shape[1] == 0:
        return "there are no channels", *reference, ""
    if spec.window > BYTE_WINDOW:
        return f"the pool's window of {spec.window} elements is larger than {BYTE_WINDOW}", *reference, ""
    if not spec.windows_meet(shape[2:], weight_shape[2:]):
        return "the pool has windows without an element", *reference, ""
    if norm == "batch" and shape[0] == 0:
        return "an empty batch has no statistics", *reference, ""
    if transforms and _fft_pays(spec, shape, weight_shape, dtype):
        return None, *_choice("fft", "a large kernel: products of spectra take fewer multiplications")
    out_channels, channels_per_group, kh, kw = weight_shape
    taps = channels_per_group * kh * kw
    conv = spec.conv_size(shape[2:], weight_shape[2:])
    any_batch = torch.compiler.is_compiling()  # where asking for its size is a guard
    s = _Sizes(
        spec, dtype, training, needs_x, norm,
        channels=shape[1], out_channels=out_channels, taps=taps, weights=taps * out_channels,
        window=spec.window, conv=conv, outputs=shape[0] * out_channels * conv[0] * conv[1],
        signal=shape[2] == kh == 1, pointwise=kh == kw == 1, longest=max(kh, kw), column=kw == 1 < kh,
        tall=channels_per_group * kw == 1 and kh >= 16,
        depthwise=spec.groups == out_channels and channels_per_group == 1 and spec.groups > 1,
        bridge=spec.layout not in ("channels_first", "channels_last"), last=last, any_batch=any_batch,
        work=taps * out_channels * conv[0] * conv[1] * (1 if any_batch else shape[0]), transforms=transforms,
    )  # fmt: skip
    return None, *_ruled(s, weight_shape)


def _ruled(s: _Sizes, weight_shape: tuple) -> _Choice:
    spec, training, norm, dtype = s.spec, s.training, s.norm, s.dtype
    if s.transforms and _has_winograd(spec, weight_shape, dtype) and (choice := _winograd_or_none(s)):
        return choice
    if _is_long_signal(s):
        return _choice("direct", "a long kernel along a signal: the library is far from the machine's peak")
    if norm == "batch" or (norm == "given" and training):
        return _with_norm(s)
    if s.depthwise and not training and _depthwise_pays(s):
        return _choice("direct", "depthwise: a plane at a time, the rest in registers")
    if spec.groups > 1:
        if s.window > 1 and not s.smaller(2**16):
            plan = "chunked" if s.depthwise else "direct"
            return _choice(plan, "grouped: one pass for all but the convolution")
        return _choice("reference", "grouped convolutions: the library is as fast")
    if dtype == torch.bfloat16 and s.window == 1 and (training or s.taps > 128):
        return _choice("reference", "the library's bfloat16 arithmetic is faster over many taps")
    if dtype == torch.bfloat16 and s.window > 1 and s.taps > 64:
        return _choice("chunked", "the library's bfloat16 arithmetic is faster over many taps")
    if not training and s.window == 1 and s.channels == 1 and not s.bridge and not any(spec.padding_after):
        if s.tall or (spec.padding == (0, 0) and s.taps >= 48 and s.out_channels <= 16):
            return _choice("reference", "one channel and a long kernel: the library is as fast")
    if s.planes and not training and not s.alone:
        return _of_planes(s)
    if norm == "given" and (choice := _folded(s)):
        return choice
    return _in_training(s) if training else _in_inference(s)


_by_sizes_cached = lru_cache(maxsize=4096)(_by_sizes)


def why_not_direct(spec: BlockSpec, x: Tensor, weight: Tensor) -> str | None:
    """Why ``direct`` cannot run a call that the fused plans can, as a sentence; None if it can."""
    height, width = (s + 2 * p + 1 for s, p in zip(x.shape[2:], spec.padding, strict=True))
    out = spec.conv_size(x.shape[2:], weight.shape[2:])
    taps = weight.shape[1] * weight.shape[2] * weight.shape[3]
    read, computed = height * width * x.shape[1], out[0] * out[1] * max(taps, 64)
    if read > _DIRECT_ELEMENTS or computed > _DIRECT_ELEMENTS:
        return "one image is too large for the direct plan"
    return None


def why_not_winograd(spec: BlockSpec, x: Tensor, weight: Tensor) -> str | None:
    """Why ``winograd`` cannot run a call that the fused plans can, as a sentence; None if it can."""
    if x.device.type == "cpu" and _has_winograd(spec, weight.shape, x.dtype):
        return None
    return "the plan winograd takes float32 on the CPU, 3x3 kernels with stride 1, no dilation and no groups"


def why_not_fft(spec: BlockSpec, x: Tensor, weight: Tensor) -> str | None:
    """Why ``fft`` cannot run a call that the fused plans can, as a sentence; None if it can."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return f"FFT convolutions are float32 on the CPU, not {str(x.dtype)[6:]} on {x.device}"
    if spec.groups > 1 or max(spec.dilation) > 1:
        return "FFT convolutions take neither groups nor dilation"
    return None


_WHY_NOT = {"direct": why_not_direct, "winograd": why_not_winograd, "fft": why_not_fft}


def _lies_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def choose(
    plan: str, spec: BlockSpec, x: Tensor, weight: Tensor, bias: Tensor | None, norm=None
) -> tuple[str, str, str]:
    """The plan for a call: (forward plan, backward plan, the reason in words).

    Raises:
        ValueError: ``plan`` names a plan that cannot run this call; the message says why. Or the input
            is too small for the kernel or the pool.
    """
    if plan == "reference":
        check_sizes(spec, x.shape[2:], weight.shape[2:])
        return "reference", "reference", "asked for"
    why_not = why_not_call(spec, x, weight, bias, norm)
    if why_not is None:
        needs_x = x.requires_grad
        training = torch.is_grad_enabled() and (
            needs_x
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (norm is not None and needs_gradient(norm.weight, norm.bias))
        )
        mode = None if norm is None else "batch" if of_batch(norm) else "given"
        by_sizes = _by_sizes if torch.compiler.is_compiling() else _by_sizes_cached
        sizes = spec, x.shape, weight.shape, x.dtype, training, needs_x, mode, _lies_channels_last(x)
        why_not, forward, backward, reason = by_sizes(*sizes, backends.allow_transforms)
        if not backends.allow_transforms and by_sizes(*sizes, True)[1] in TRANSFORMS:
            reason += "; cnnlstm_fast.backends.allow_transforms is False"
    if why_not is None and plan in TRANSFORMS and not backends.allow_transforms:
        why_not = "cnnlstm_fast.backends.allow_transforms is False"
    if why_not is None and (plan != "auto" or x.device.type == "cpu"):
        why_not_plan = _WHY_NOT.get(forward if plan == "auto" else plan)
        why_not = why_not_plan(spec, x, weight) if why_not_plan else None
    if plan != "auto":
        if why_not:
            raise ValueError(
                f'plan="{plan}" cannot run here: {why_not}. Pass plan="auto" to let '
                'the package choose, or plan="reference" for PyTorch\'s own operators'
            )
        return plan, plan, "asked for"
    if why_not:
        return "reference", "reference", why_not
    if x.device.type == "cuda":
        cudnn: Any = torch.backends.cudnn
        tf32 = x.dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32"
        by_bytes = _by_bytes if torch.compiler.is_compiling() else _by_bytes_cached
        if norm is not None and folds(norm):
            mode = "folded"
        return by_bytes(spec, x.shape, weight.shape, x.dtype, tf32, training, needs_x, mode)
    return forward, backward, reason


# ---- Blocks on CUDA

#: Multiply-adds, times two, that a data-centre GPU of today does while it moves one byte.
_CUDA_BALANCE = {"float32": 14.0, "tf32": 90.0, "half": 180.0}
#: Shares of that rate which the library's convolution and our own, which gathers its patches, are taken
#: to reach until devices have filled in their own.
_LIBRARY_SHARE, _OWN_SHARE = 0.6, 0.2


def cuda_costs(
    spec: BlockSpec,
    shape: tuple,
    weight_shape: tuple,
    dtype: torch.dtype,
    tf32: bool,
    training: bool,
    needs_x: bool,
    norm: str | None = None,
) -> dict[str, tuple[float, float]]:
    """What each plan costs on CUDA: {plan: (forward, backward)}, in bytes moved or the arithmetic of as many.

    A kernel takes the longer of its two; ``chunked`` runs the convolution's kernels and then the pass that
    finishes, or the pass that spreads the gradient and then the convolution's. Under a ``norm`` by the
    batch's statistics ("batch") ``direct`` convolves once for the sums, once for the result and once for
    the gradient, whose convolution is the library's; ``chunked`` reads its map once more for the sums. A
    norm by given ones that trains ("given") adds a pass over the gradient; one that is "folded" nothing.
    """
    size = dtype.itemsize
    conv = spec.conv_size(shape[2:], weight_shape[2:])
    pooled = spec.out_size(shape[2:], weight_shape[2:])
    taps = weight_shape[1] * weight_shape[2] * weight_shape[3]
    channels = weight_shape[0]
    x_bytes = shape[0] * shape[1] * shape[2] * shape[3] * size
    map_size = shape[0] * channels * conv[0] * conv[1]
    out_size = shape[0] * channels * pooled[0] * pooled[1]
    map_bytes, out_bytes = map_size * size, out_size * size
    code_bytes = out_size if training else 0  # one byte at most
    balance = _CUDA_BALANCE["tf32" if tf32 else "float32" if dtype == torch.float32 else "half"]

    def kernel(moved: float, multiplied: float, share: float) -> float:
        return max(moved, 2 * multiplied * taps / (balance * share))

    ways = 1 + needs_x
    read = x_bytes * ways  # by the weight's gradient, written by the input's
    direct = (
        kernel(x_bytes + out_bytes + code_bytes, out_size * spec.window, _OWN_SHARE),
        kernel(read + (out_bytes + code_bytes) * ways, map_size * ways, _OWN_SHARE),
    )
    chunked = (
        kernel(x_bytes + map_bytes, map_size, _LIBRARY_SHARE) + map_bytes + out_bytes + code_bytes,
        kernel(read + map_bytes * ways, map_size * ways, _LIBRARY_SHARE) + map_bytes + out_bytes + code_bytes,
    )
    kept = out_bytes if training and spec.pool else 0  # z of the winners
    passed = 2 * out_bytes  # the gradient and z of the winners, for the norm's own gradients
    if norm == "given":
        direct = direct[0] + kept, direct[1] + passed + out_bytes
        chunked = chunked[0] + kept, chunked[1] + passed + out_bytes
    if norm == "batch":
        stored = training and (not spec.pool or keeps_map(weight_shape))
        finish = map_bytes + out_bytes + code_bytes + kept
        spread = 2 * map_bytes + out_bytes + code_bytes
        gradients = passed + kernel(read + map_bytes * ways, map_size * ways, _LIBRARY_SHARE)
        library = kernel(x_bytes + map_bytes, map_size, _LIBRARY_SHARE)
        if stored:
            sums = kernel(x_bytes + map_bytes, map_size, _OWN_SHARE)
            direct = sums + finish, spread + gradients
        else:
            sums = kernel(x_bytes, map_size, _OWN_SHARE)
            pooled_again = kernel(x_bytes + out_bytes + code_bytes + kept, out_size * spec.window, _OWN_SHARE)
            spread_again = kernel(x_bytes + out_bytes + code_bytes + map_bytes, map_size, _OWN_SHARE)
            direct = sums + pooled_again, spread_again + gradients
        chunked = library + (1 + stored) * map_bytes + finish, (0 if stored else library) + spread + gradients
    return {"direct": direct, "chunked": chunked}


def _by_bytes(
    spec: BlockSpec,
    shape: tuple,
    weight_shape: tuple,
    dtype,
    tf32: bool,
    training: bool,
    needs_x: bool,
    norm: str | None = None,
) -> tuple[str, str, str]:
    """The plan on CUDA by sizes: (forward, backward, reason); ``norm`` as :func:`cuda_costs` takes it."""
    alone = norm is None and spec.activation is None and not spec.pool
    if alone and spec.layout in ("channels_first", "channels_last"):
        return "reference", "reference", "a convolution alone: there is nothing to fuse"
    costs = cuda_costs(spec, shape, weight_shape, dtype, tf32, training, needs_x, norm)
    if spec.groups > 1:  # tiles of tensor cores would be mostly empty
        return "chunked", "chunked", "a grouped convolution: the library's, then one pass"
    if norm in ("batch", "given"):  # one plan for both ways, which share what is kept
        both = {plan: forward + training * backward for plan, (forward, backward) in costs.items()}
        # given statistics without a pool: the map is kept, and the library computes it for both plans
        if both["direct"] <= both["chunked"] and (spec.pool or norm == "batch"):
            return (
                "direct",
                "direct",
                "by bytes and arithmetic: statistics as it convolves, the map never moves",
            )
        return (
            "chunked",
            "chunked",
            "by bytes and arithmetic: the library's convolution, then passes over its map",
        )
    forward, backward = (
        "direct" if costs["direct"][way] <= costs["chunked"][way] else "chunked" for way in range(2)
    )
    if forward == "direct":
        return forward, backward, "by bytes and arithmetic: the map before the pool never exists"
    return forward, backward, "by bytes and arithmetic: the library's convolution, then one pass"


_by_bytes_cached = lru_cache(maxsize=4096)(_by_bytes)


# ---- Recurrent layers

#: ``fused`` is our kernels, ``library`` PyTorch's own LSTM and GRU, ``reference`` the loop over steps.
RECURRENT_PLANS = ("auto", "fused", "library", "reference")


#: Hidden units up to which a program that reads all recurrent weights each step, 8 MB in bfloat16 at some
#: 100 GB/s, keeps up with the ten launches of a step in a loop.
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
    """Whether PyTorch's own recurrent functions take part in what is going on.

    Their oneDNN layers know no batching rule, no forward derivatives and, in what inductor makes of
    them, no backward.
    """
    return torch.onnx.is_in_onnx_export() or not (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def choose_recurrent(
    plan: str, x: Tensor, params: Sequence[Tensor], *, plain: bool, gru_step: bool = False
) -> tuple[str, str]:
    """The plan for an LSTM or GRU: (its name, the reason in words).

    ``plain`` says that neither resets nor lengths are given, which PyTorch's own layers take;
    ``gru_step`` that this is a GRU and but one step.

    Raises:
        ValueError: ``plan`` names a plan that cannot run this call; the message says why.
    """
    if plan == "reference":
        return "reference", "asked for"
    if plan == "library":
        if not plain:
            raise ValueError(
                'plan="library" cannot run here: PyTorch\'s own layers take neither reset nor lengths. '
                'Pass plan="auto" to let the package choose'
            )
        return "library", "asked for"
    why_not = why_not_fused_recurrent(x, params)
    if plan == "fused":
        if why_not:
            raise ValueError(
                f'plan="fused" cannot run here: {why_not}. Pass plan="auto" to let the package choose, '
                'or plan="reference" for a loop over the steps'
            )
        return "fused", "asked for"
    if why_not:
        return ("library" if plain and library_differentiates() else "reference"), why_not
    if x.device.type == "cuda" and plain:
        return "library", "cuDNN's kernels serve the plain case"
    if plain and gru_step and x.device.type == "cpu":
        return "library", "one step of a GRU: PyTorch's own operators are as fast"
    if plain:
        return "fused", "all steps in one call, gates kept in registers"
    return "fused", "resets and lengths are handled inside the kernels"
