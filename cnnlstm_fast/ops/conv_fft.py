"""A convolution with a large kernel by Fourier transforms along one axis of the image. CPU, float32.

The method is overlap-save. The axis is cut into overlapping windows. The product of a window's spectrum and
the kernel's is the convolution, except at the window's ends. Along the other axis the kernel slides as usual,
so each frequency is an independent convolution whose kernel is one row or column. All frequencies together
are one grouped convolution, which the library computes at full speed. Products of spectra are summed over
channels as in M. Mathieu, M. Henaff, Y. LeCun, "Fast training of convolutional networks through FFTs", 2014.

- Windows are short, mostly 20 to 100 positions, so transforms are matrix products (:func:`transforms`).
- A complex product takes three real multiplications (Gauss). The sums that it needs are part of the matrices,
  so no complex numbers are left. A window of N positions has about 3N/2 "rows", and each row is an
  independent real convolution.
- A stride is split into phases, which are additional channels.
- A long kernel may be cut into ``parts``, one hop of the windows apart. The product then is a convolution
  along the windows.
- The backward is the forward's adjoint, step by step. Overlapping windows are added up.

The work is cut into chunks of windows and rows that stay in cache.

The block op calls these ops for the plan ``fft``: for its map (N, OH, OW, C_out), contiguous, and for the
gradients of input and weight. Schema terms are those of :mod:`cnnlstm_fast.ops.conv_block`; groups and
dilation are 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnlstm_fast.limits import limit
from cnnlstm_fast.ops.python_inside import noting
from cnnlstm_fast.reference import conv_backward_by_args, conv_block_by_args
from cnnlstm_fast.spec import map_size

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define("conv_fft(Tensor x, Tensor weight, Tensor? bias, int[] conv, Tensor(a!) map) -> ()")
_lib.define(
    "conv_fft_backward(Tensor grad, Tensor x, Tensor weight, int[] conv, Tensor(a!)? grad_x, "
    "Tensor(b!)? grad_weight) -> ()"
)
_lib.define("transform_windows(Tensor x, Tensor matrix, Tensor(a!) out, bool add) -> ()")
_lib.define("add_products(Tensor grad, Tensor x, Tensor(a!) out) -> ()")
_lib.define("new_spectra(Tensor like, int[] size) -> Tensor")

transform_op = torch.ops.cnnlstm_fast.transform_windows.default
products_op = torch.ops.cnnlstm_fast.add_products.default
forward_op = torch.ops.cnnlstm_fast.conv_fft.default
#: An unwritten tensor, in recycled memory if it is large, as the spectra of weights are in every call.
new_op = torch.ops.cnnlstm_fast.new_spectra.default


# ---- Sizes


class Tiling(NamedTuple):
    """How a convolution is cut. Axes are (other, transformed); a phase is a position modulo the stride."""

    transforms_height: bool  # H is transformed, otherwise W
    stride: tuple[int, int]
    padding: tuple[int, int]
    out: tuple[int, int]  # of the convolution's map
    other_taps: int  # of the other axis, per phase
    parts: int  # of the kernel along the transformed axis
    taps: int  # of a part, per phase
    hop: int  # outputs of a window

    @property
    def length(self) -> int:
        """Positions of a window, per phase."""
        return self.hop + self.taps - 1

    @property
    def rows(self) -> int:
        """Products of a window: 3 for each complex frequency, 1 for each real one."""
        return 3 * ((self.length - 1) // 2) + 2 - self.length % 2

    @property
    def tiles(self) -> int:
        return -(-self.out[1] // self.hop)

    @property
    def height(self) -> int:
        """Positions of the other axis that the kernel meets, per phase."""
        return self.out[0] + self.other_taps - 1


#: Least outputs of a window, and most positions of one unless the kernel needs more.
_LEAST_HOP, _MOST_POSITIONS = 8, 256
#: Gives nanoseconds of one of each of :func:`counts`. The planner sets it, which knows the processor.
rates: Callable[[], Mapping[str, float]] = dict


def counts(t: Tiling, n: int, channels: int, c_out: int) -> dict[str, float]:
    """What a forward of ``n`` images does, cut like ``t``.

    Returns:
        ``products``: multiply-adds of spectra; ``mixed``: those of transforms; ``moved``: elements copied.
    """
    channels *= t.stride[0] * t.stride[1]
    windows = n * (t.tiles + t.parts - 1) * t.height * channels
    results = n * t.tiles * t.out[0] * c_out
    weights = t.parts * t.other_taps * channels * c_out
    return {
        "products": n * t.tiles * t.out[0] * weights * t.rows,
        "mixed": (windows * t.length + results * t.hop + weights * t.taps) * t.rows,
        "moved": windows * (t.length + t.hop) + 2 * results * t.hop
        + (windows + results + 2 * weights) * t.rows,
    }  # fmt: skip


def tiling(size, kernel, n: int, channels: int, c_out: int, conv) -> Tiling:
    """The cheapest way to cut a convolution of ``n`` images of ``size`` (H, W), by :data:`rates`."""
    return tiling_of(tuple(size), tuple(kernel), n, channels, c_out, tuple(conv))


@lru_cache(maxsize=1024)
def tiling_of(size, kernel, n: int, channels: int, c_out: int, conv) -> Tiling:
    found, ns = [], rates()
    for transforms_height in (False, True):
        transpose: Callable[..., Any] = (lambda pair: pair[::-1]) if transforms_height else tuple
        pairs = conv[0:2], conv[2:4], map_size(size, kernel, conv)
        stride, padding, out = map(transpose, pairs)
        other_taps, phase_taps = (-(-k // s) for k, s in zip(transpose(kernel), stride, strict=True))
        least, most = min(_LEAST_HOP, out[1]), min(_MOST_POSITIONS, out[1])
        even_hops = {-(-out[1] // -(-out[1] // hop)) for hop in range(least, most + 1)}
        for parts in range(1, phase_taps + 1):
            taps = -(-phase_taps // parts)
            for hop in even_hops if parts == 1 else {taps}:
                if hop == least or (hop > least and hop + taps <= _MOST_POSITIONS):
                    t = Tiling(transforms_height, stride, padding, out, other_taps, parts, taps, hop)
                    cost = sum([ns[term] * count for term, count in counts(t, n, channels, c_out).items()])
                    found.append((cost, t))
    return min(found)[1]


class Transforms(NamedTuple):
    """Matrices such that ``y[o] = sum_k w[k] x[o + k]`` is ``of_y @ ((of_w @ w) * (of_x @ x))``.

    ``x`` has ``length`` positions, ``w`` has ``taps`` and ``y`` has ``hop``. All are contiguous,
    those transposed too.
    """

    of_x: Tensor
    of_w: Tensor
    of_y: Tensor
    of_x_t: Tensor
    of_w_t: Tensor
    of_y_t: Tensor


@lru_cache(maxsize=64)
def transforms(hop: int, taps: int) -> Transforms:
    """The transforms of windows with so many outputs and taps.

    A complex frequency's product (a + ib)(c + id) is k1 - k3 + i(k1 + k2) with k1 = c(a + b), k2 = a(d - c),
    k3 = b(c + d).
    """
    length = hop + taps - 1
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    of_x, of_w, of_y = [], [], []
    for frequency in range(length // 2 + 1):
        angle = positions * (2 * math.pi * frequency / length)
        cos, sin = angle.cos(), angle.sin()
        if 2 * frequency % length == 0:
            of_x += [cos]
            of_w += [cos]
            of_y += [cos / length]
        else:
            of_x += [cos - sin, cos, -sin]
            of_w += [cos, sin - cos, sin + cos]
            of_y += [row * (2 / length) for row in (cos - sin, -sin, -cos)]
    x, w, y = (torch.stack(rows).float() for rows in (of_x, of_w, of_y))
    w, y = w[:, :taps].contiguous(), y[:, :hop].contiguous()
    return Transforms(x, w, y.T.contiguous(), x.T.contiguous(), w.T.contiguous(), y)


# ---- The steps, each with its adjoint. Axes of an image are transposed: (N, C, other, transformed).

#: Bytes of the windows and of the spectra that are worked on at a time.
_WINDOW_BYTES, _SPECTRUM_BYTES = limit("WINDOW_BYTES", 2**22, 1), limit("SPECTRUM_BYTES", 2**21, 1)


class _Chunk(NamedTuple):
    """Tiles [first, last) of samples [begin, end)."""

    begin: int
    end: int
    first: int
    last: int


def _chunks(t: Tiling, n: int, channels: int) -> list[_Chunk]:
    window = 4 * t.height * t.length * channels * t.stride[0] * t.stride[1]
    tiles = max(1, _WINDOW_BYTES // window - t.parts + 1)
    samples = max(1, tiles // t.tiles)
    return [
        _Chunk(begin, min(begin + samples, n), first, min(first + tiles, t.tiles))
        for begin in range(0, n, samples)
        for first in range(0, t.tiles, tiles)
    ]


def _windows(x: Tensor, t: Tiling, chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor]:
    """A zeroed buffer for the windows of a chunk of images ``x``.

    Returns:
        the windows, which overlap: (N, height, windows, length, phases, phases * C); the part of the buffer
        inside the images, and that part of the images, both (N, other, transformed, C).
    """
    channels, first = x.shape[1], chunk.first * t.hop * t.stride[1] - t.padding[1]
    positions = (chunk.last - chunk.first + t.parts - 2) * t.hop + t.length
    buffer = x.new_zeros(chunk.end - chunk.begin, t.height * t.stride[0], positions * t.stride[1], channels)
    inside, over = [], []
    for start, length, size in (
        (-t.padding[0], buffer.shape[1], x.shape[2]),
        (first, buffer.shape[2], x.shape[3]),
    ):
        begin = max(start, 0)
        end = max(begin, min(start + length, size))
        inside.append(slice(begin, end))
        over.append(slice(begin - start, end - start))
    by_phase = buffer.view(len(buffer), t.height, t.stride[0], positions, t.stride[1], channels)
    windows = by_phase.unfold(3, t.length, t.hop).permute(0, 1, 3, 6, 2, 4, 5).flatten(5)
    images = x[chunk.begin : chunk.end, :, inside[0], inside[1]].permute(0, 2, 3, 1)
    return windows, buffer[:, over[0], over[1]], images


def _row_slices(t: Tiling, windows: Tensor) -> list[slice]:
    """Rows of the transforms of ``windows`` to work on at a time."""
    count = max(1, _SPECTRUM_BYTES * t.length // (4 * windows.numel()))
    return [slice(at, min(at + count, t.rows)) for at in range(0, t.rows, count)]


def _tiles(y: Tensor, t: Tiling) -> Tensor:
    """A buffer (N, other, positions, C) in tiles: (N, other, tiles, hop, 1, C)."""
    return y.unflatten(2, (-1, t.hop)).unsqueeze(4)


def _map_part(y: Tensor, t: Tiling, chunk: _Chunk) -> Tensor:
    """The part of a map that a chunk computes: (N, other, positions, C_out); the last tile may be cut off."""
    return y[chunk.begin : chunk.end, :, :, chunk.first * t.hop : chunk.last * t.hop].permute(0, 2, 3, 1)


def _gradient_tiles(grad: Tensor, t: Tiling, chunk: _Chunk) -> Tensor:
    """The gradient of a map in tiles, zero beyond the map."""
    part = _map_part(grad, t, chunk)
    n, other, positions, c_out = part.shape
    buffer = grad.new_zeros(n, other, (chunk.last - chunk.first) * t.hop, c_out)
    buffer[:, :, :positions].copy_(part)
    return _tiles(buffer, t)


def _weight_spectra(weight: Tensor, t: Tiling) -> Tensor:
    """(rows, C_out, parts, taps of the other axis, phases * C)."""
    c_out, channels, *kernel = weight.shape
    weight = F.pad(
        weight,
        (0, t.parts * t.taps * t.stride[1] - kernel[1], 0, t.other_taps * t.stride[0] - kernel[0]),
    ).view(c_out, channels, t.other_taps, t.stride[0], t.parts, t.taps, t.stride[1])
    by_tap = weight.permute(5, 0, 4, 2, 3, 6, 1).contiguous().view(t.taps, c_out, -1)
    spectra = new_op(weight, [t.rows, *by_tap.shape[1:]])
    transform_op(_columns(by_tap), transforms(t.hop, t.taps).of_w_t, _columns(spectra), False)
    return spectra.view(t.rows, c_out, t.parts, t.other_taps, -1)


def _weight_gradient(spectra: Tensor, t: Tiling, shape) -> Tensor:
    """The adjoint of :func:`_weight_spectra`; ``shape`` is the transposed weight's."""
    spectra = spectra.flatten(2)
    by_tap = spectra.new_empty(t.taps, *spectra.shape[1:])
    transform_op(_columns(spectra), transforms(t.hop, t.taps).of_w, _columns(by_tap), False)
    grad = by_tap.view(t.taps, shape[0], t.parts, t.other_taps, t.stride[0], t.stride[1], shape[1])
    grad = grad.permute(1, 6, 3, 4, 2, 0, 5).reshape(*shape[:2], t.other_taps * t.stride[0], -1)
    return grad[:, :, : shape[2], : shape[3]]


def _columns(t: Tensor) -> Tensor:
    """A tensor (K, n, C) as n images of one window each."""
    return t.transpose(0, 1)[:, None, None, :, None]


def _spectra(windows: Tensor, matrix: Tensor) -> Tensor:
    """Transforms of windows: (N, windows, height, rows, phases * C)."""
    n, height, count, _, phases, channels = windows.shape
    spectra = windows.new_empty(n, count, height, matrix.shape[1], phases * channels)
    transform_op(windows, matrix, _as_windows(spectra, phases), False)
    return spectra


def _as_maps(spectra: Tensor, t: Tiling) -> Tensor:
    """Spectra (N, windows, height, rows, C) as maps (N, rows * C, windows, height) for the library.

    Where the kernel meets one position of the other axis, the windows are the width: the library's kernels
    are fast along it.
    """
    maps = spectra.flatten(3)
    return (maps.transpose(1, 2) if t.height == 1 else maps).permute(0, 3, 1, 2)


def _from_maps(maps: Tensor, t: Tiling, rows: int) -> Tensor:
    """The inverse of :func:`_as_maps`."""
    spectra = maps.permute(0, 2, 3, 1).contiguous().unflatten(3, (rows, -1))
    return spectra.transpose(1, 2) if t.height == 1 else spectra


def _add_products(grads: Tensor, windows: Tensor, weight: Tensor) -> None:
    """Add the gradient of a weight's spectra (rows, C_out, parts, taps of the other axis, C).

    ``grads`` and ``windows`` are spectra (N, windows, height, rows, channels) of a chunk, where a window
    meets the gradients of those ``parts`` before it. The op computes
    ``out[r, o, k, c] += sum over i of grad[i, r, o] * x[i + k, r, c]``.
    """
    parts = weight.shape[2]
    if windows.shape[2] > 1:
        for image, grad in zip(windows, grads, strict=True):
            for tile, of_tile in enumerate(grad):
                for part in range(parts):
                    products_op(of_tile, image[tile + part], weight[:, :, part])
    elif parts > 1:
        for image, grad in zip(windows, grads, strict=True):
            products_op(grad[:, 0], image[:, 0], weight[:, :, :, 0])
    else:
        products_op(grads.flatten(0, 2), windows.flatten(0, 2), weight[:, :, 0])


def _as_windows(spectra: Tensor, phases: int) -> Tensor:
    """Spectra as windows (N, height, windows, rows, phases, C / phases)."""
    return spectra.transpose(1, 2).unflatten(4, (phases, -1))


def _as_kernels(spectra: Tensor, t: Tiling) -> Tensor:
    """Spectra of weights (rows, C_out, parts, taps, C) as kernels for such maps."""
    kernels = spectra.flatten(0, 1)
    return (kernels.transpose(1, 2) if t.height == 1 else kernels).permute(0, 3, 1, 2)


# ---- The ops


def _transposed(t: Tiling, *tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(2, 3) for tensor in tensors] if t.transforms_height else list(tensors)


def _tiling_of(x: Tensor, weight: Tensor, conv) -> Tiling:
    return tiling(x.shape[2:], weight.shape[2:], x.shape[0], x.shape[1], weight.shape[0], conv)


def _finite(t: Tensor) -> bool:
    return math.isfinite(t.sum())


#: Largest ratio of an image's loudest position to its quiet ones.
_MOST_CONTRAST = 64


def is_uneven(x: Tensor, weight: Tensor, conv) -> bool:
    """Whether images have quiet positions beside loud ones; the library then computes the convolution.

    A window rounds all its positions as its loudest one, which quiet ones would show. The loudness of a
    position along the transformed axis is its largest absolute value. The quiet positions are the lowest
    quarter of those that are not zero.
    """
    axis = 3 if _tiling_of(x, weight, conv).transforms_height else 2
    loud = x.abs().amax((1, axis))
    some = loud > 0
    at = (some.sum(1, keepdim=True) - 1).clamp_min(0) // 4
    quiet = loud.where(some, math.inf).sort(1).values.gather(1, at)
    return bool((loud.amax(1, keepdim=True) > _MOST_CONTRAST * quiet).any())


@torch.no_grad()
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, conv, map: Tensor) -> None:
    if is_uneven(x, weight, conv):
        return _library_map(x, weight, bias, conv, map)
    t = _tiling_of(x, weight, conv)
    matrices = transforms(t.hop, t.taps)
    images, kernels, out = _transposed(t, x, weight, map.permute(0, 3, 1, 2))
    kernels = _weight_spectra(kernels, t)
    for chunk in _chunks(t, *images.shape[:2]):
        windows, over, inside = _windows(images, t, chunk)
        over.copy_(inside)
        y = x.new_empty(len(windows), t.out[0], (chunk.last - chunk.first) * t.hop, weight.shape[0])
        for rows in _row_slices(t, windows):
            groups = rows.stop - rows.start
            maps = _as_maps(_spectra(windows, matrices.of_x_t[:, rows]), t)
            products = _from_maps(F.conv2d(maps, _as_kernels(kernels[rows], t), groups=groups), t, groups)
            transform_op(_as_windows(products, 1), matrices.of_y_t[rows], _tiles(y, t), rows.start > 0)
        part = _map_part(out, t, chunk)
        y = y[:, :, : part.shape[2]]
        part.copy_(y) if bias is None else torch.add(y, bias, out=part)
    if not _finite(map):  # a NaN fills the whole window through the transform
        _library_map(x, weight, bias, conv, map)


def _library_map(x: Tensor, weight: Tensor, bias: Tensor | None, conv, map: Tensor) -> None:
    map.copy_(conv_block_by_args(x, weight, bias, conv, 0, [], [], [0, 2, 3, 1]))


@torch.no_grad()
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, conv, grad_x: Tensor | None, grad_weight: Tensor | None
) -> None:
    need_x, need_weight = grad_x is not None, grad_weight is not None
    if need_weight and is_uneven(x, weight, conv):
        return _library_gradients(grad, x, weight, conv, grad_x, grad_weight)
    t = _tiling_of(x, weight, conv)
    matrices = transforms(t.hop, t.taps)
    grads, images, kernels = _transposed(t, grad, x, weight)
    grad_images = None if grad_x is None else _transposed(t, grad_x.zero_())[0]
    shape, channels = kernels.shape, x.shape[1] * t.stride[0] * t.stride[1]
    grad_spectra = new_op(
        x, [t.rows, weight.shape[0], t.parts, t.other_taps, channels if need_weight else 0]
    ).zero_()
    spectra = _weight_spectra(kernels, t) if need_x else None
    for chunk in _chunks(t, *images.shape[:2]):
        tiles = _gradient_tiles(grads, t, chunk)
        windows, over, inside = _windows(images if grad_images is None else grad_images, t, chunk)
        if need_weight:
            seen, over_x, inside_x = _windows(images, t, chunk)
            over_x.copy_(inside_x)
        for rows in _row_slices(t, windows):
            groups = rows.stop - rows.start
            of_tiles = _spectra(tiles, matrices.of_y[:, rows])
            if need_weight:
                _add_products(of_tiles, _spectra(seen, matrices.of_x_t[:, rows]), grad_spectra[rows])
            if spectra is not None:
                maps = x.new_empty(len(windows), windows.shape[2], t.height, groups, channels)
                of_maps, *_ = torch.ops.aten.convolution_backward(
                    _as_maps(of_tiles, t),
                    _as_maps(maps, t),  # of which only the shape is read
                    _as_kernels(spectra[rows], t),
                    None, (1, 1), (0, 0), (1, 1), False, (0, 0), groups, (True, False, False),
                )  # fmt: skip
                products = _as_windows(_from_maps(of_maps, t, groups), t.stride[0])
                transform_op(products, matrices.of_x[rows], windows, True)
        if need_x:
            inside.add_(over)
    if grad_weight is not None:
        _transposed(t, grad_weight)[0].copy_(_weight_gradient(grad_spectra, t, shape))
    found = [g for g in (grad_x, grad_weight) if g is not None]
    if not all(map(_finite, found)):
        _library_gradients(grad, x, weight, conv, grad_x, grad_weight)


def _library_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, conv, grad_x: Tensor | None, grad_weight: Tensor | None
) -> None:
    needs = [grad_x is not None, grad_weight is not None, False]
    found = conv_backward_by_args(grad, x, weight, conv, needs)
    for ours, theirs in zip((grad_x, grad_weight), found, strict=False):
        if ours is not None:
            ours.copy_(theirs)


_lib.impl("conv_fft", noting(_forward), "CPU")
_lib.impl("conv_fft_backward", noting(_backward), "CPU")
