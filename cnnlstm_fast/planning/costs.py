"""What each plan costs on the CPU: the sum of its terms' counts times their rates.

The counts follow from sizes alone; the functions here give them. A rate is the nanoseconds of one count, as
measured for a kind of processor (``rates/*.json``, :mod:`cnnlstm_fast.planning.rates`). The terms are loads
and multiply-adds, as in XNNPACK's tile heuristic, and passes over memory by where their tensors fit.

Terms of a convolution:

- ``products <kind>``: vectors of multiply-adds, with the padding that the registers need.
- ``broadcasts``: elements of the input that are spread over a vector, once per 64 output channels.
- ``tiles``: weight vectors loaded, once per tile of output positions.
- ``weights``: elements of the weight, which are reordered in every call.

Terms of passes: elements of the input ``x``, the convolution's ``map`` and the ``out``put, by where they fit:
in cache, in ``memory``, or so ``large`` that their pages are fresh in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from cnnlstm_fast.limits import kernel_limit
from cnnlstm_fast.planning.problem import ConvProblem
from cnnlstm_fast.planning.rates import Rates
from cnnlstm_fast.spec import LAYOUTS

#: Output channels of a vector, in our kernels and the library's, and of a register tile.
_LANES, _TILE_CHANNELS = 16, 64
#: Output positions of a register tile.
_TILE_POSITIONS = 6
#: Bytes above which a tensor does not stay in cache, and above which the allocator returns its pages.
_CACHE_BYTES, _LARGE_BYTES = 1 << 20, 24 << 20
#: Bytes of maps that ``chunked`` works on at a time, and how many times the weights.
_CHUNK_BYTES, _CHUNK_WEIGHTS = kernel_limit("CHUNK_BYTES"), kernel_limit("CHUNK_WEIGHTS")
#: Elements of a single input, and the shorter side of a kernel, up to which PyTorch leaves the library.
_SMALL_INPUT, _SMALL_KERNEL = 20480, 3
#: Kernel columns up to which the library has loops of its own.
_ROW_KERNEL = 14
#: Taps up to which batch statistics come from products of patches (:mod:`cnnlstm_fast.ops.conv_norm`).
MOST_TAPS_BY_PATCHES = 64
#: Taps above which a pooled block under batch statistics keeps its map instead of computing it again.
MOST_TAPS_COMPUTED_AGAIN = 384

#: Activations that cost more than a few comparisons and products for each element.
_CURVED = ("elu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus", "mish")
#: Those that PyTorch computes by slow functions.
_SLOW = ("elu", "tanh", "softplus", "mish")
#: Those that are not monotone, so that they cannot be computed behind the pool.
_UNORDERED = ("silu", "gelu", "gelu_tanh", "softplus", "mish")

Counts = dict[str, float]


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def _passes(counts: Counts, name: str, elements: float, size: int) -> None:
    """A pass over ``elements`` of ``size`` bytes each."""
    counts[name] = elements
    if elements * size > _CACHE_BYTES:
        counts[f"{name} memory"] = elements
    if elements * size > _LARGE_BYTES:
        counts[f"{name} large"] = elements


def _is_narrow(p: ConvProblem) -> bool:
    """Whether the library has no blocks of channels for such groups."""
    groups = p.spec.groups
    if groups == 1 or (p.depthwise and p.out_channels == p.channels):
        return False
    return any(channels // groups % _LANES > 0 for channels in (p.channels, p.out_channels))


def _is_wide(p: ConvProblem) -> bool:
    """Whether the kernel's rows are too long for the library's own loops."""
    return p.kernel[1] > _ROW_KERNEL and p.spec.groups == 1


def _by_columns(p: ConvProblem) -> bool:
    """Whether the library multiplies matrices of patches: narrow groups, wide kernels, and small inputs."""
    if _is_wide(p) and not p.channels_last:
        return True
    if p.spec.groups > 1:
        return _is_narrow(p) and not p.channels_last
    alone = p.kernel == (1, 1) and max(p.spec.stride) == 1 and p.threads == 1 and p.batch < _LANES
    small = p.batch * p.channels * p.height * p.width <= _SMALL_INPUT and min(p.kernel) <= _SMALL_KERNEL
    return p.dtype.itemsize == 4 and (alone or (small and p.batch == 1))


def _kind(p: ConvProblem) -> str:
    """The kind of convolution for the library, whose kinds run at different rates."""
    if _by_columns(p):
        return "columns"
    if p.spec.groups > 1:
        return "narrow groups" if _is_narrow(p) else "depthwise" if p.depthwise else "groups"
    if p.kernel == (1, 1):
        return "pointwise" if max(p.spec.stride) == 1 else "strided"
    if max(p.spec.stride) > 1:
        return "strided image" if p.channels < _LANES else "strided"
    if p.channels < _LANES:
        return "plane" if p.channels == 1 else "image"
    if p.height == 1 or p.kernel[0] == 1 or p.kernel[1] == 1:
        return "row"
    return "dense"


def _seen(p: ConvProblem, axis: int) -> float:
    """The share of a kernel's taps along an axis that lie within the image, over all positions."""
    size, kernel, count = (p.height, p.width)[axis], p.kernel[axis], p.conv[axis]
    stride, padding, dilation = p.spec.stride[axis], p.spec.padding[axis], p.spec.dilation[axis]
    if padding == 0 or count == 0:
        return 1.0
    found = 0
    for first in range(-padding, -padding + kernel * dilation, dilation):  # what a tap sees at position 0
        begin, end = -(-max(-first, 0) // stride), -(-max(size - first, 0) // stride)
        found += max(min(end, count) - begin, 0)
    return found / (kernel * count)


def _library_products(p: ConvProblem, kind: str) -> Counts:
    """Vectors of multiply-adds, broadcasts and weight vectors of the library's convolution, or columns."""
    groups, area = p.spec.groups, float(p.kernel[0] * p.kernel[1])
    if kind != "columns":  # its loops leave out the taps beyond the image
        area *= _seen(p, 0) * _seen(p, 1)
    positions = p.batch * p.conv[0] * p.conv[1]
    per_group, deep = p.out_channels // groups, p.channels // groups
    if kind == "columns":
        along = p.batch * _up(p.conv[0] * p.conv[1], _LANES) / _LANES
        copied = positions * p.channels * area if area > 1 or max(p.spec.stride) > 1 else 0.0
        return {
            "products columns": along * p.out_channels * deep * area,
            "columns" if max(p.spec.stride) == 1 else "strided columns": copied, "matrices": p.batch * groups,
        }  # fmt: skip
    if kind == "depthwise":
        vectors = _up(p.out_channels, _LANES) / _LANES * area
        return {"products depthwise": positions * vectors, "tiles": p.batch * p.conv[0] * vectors}
    if kind not in ("plane", "image", "strided image", "pointwise") and not p.channels_last:
        deep = _up(deep, _LANES)
    vectors = groups * _up(per_group, _LANES) / _LANES * deep * area
    tiles = p.batch * p.conv[0] * -(-p.conv[1] // _TILE_POSITIONS)
    blocks = groups * -(-per_group // _TILE_CHANNELS)
    return {
        f"products {kind}": positions * vectors, "broadcasts": positions * blocks * deep * area,
        "tiles": tiles * vectors,
    }  # fmt: skip


def _backwards(p: ConvProblem) -> ConvProblem:
    """The convolution that gives the input's gradient has the channels of the other end."""
    return p._replace(channels=p.out_channels, out_channels=p.channels)


def _library(counts: Counts, p: ConvProblem, calls: float) -> None:
    """The library's convolution in ``calls`` parts."""
    counts.update(_library_products(p, _kind(p)))
    lies = " last" if p.channels_last else ""  # contiguous weights are reordered for such inputs
    counts[f"weights{lies}"] = p.out_channels * p.taps * calls
    counts["library calls"] = calls


def _library_gradients(counts: Counts, p: ConvProblem, calls: float, last: bool) -> None:
    """Replace the library's convolution in ``counts`` by its gradients, in ``calls`` parts.

    Args:
        last: the gradient of the map lies channels-last. Then the gradient of wide kernels of several rows
            comes from loops over single elements, unless the output channels fill vectors.
    """
    kind, wide = _kind(p), _is_wide(p)
    for name in _library_products(p, kind):
        del counts[name]
    if wide and last and p.kernel[0] > 1 and p.channels > 3 and p.out_channels % _LANES:
        counts["weight loops"] = p.batch * p.conv[0] * p.conv[1] * p.out_channels * p.taps
    else:
        done = _library_products(p, "columns" if wide else kind)
        counts.update({f"weight {name}": count for name, count in done.items()})
    if p.needs_x:
        kind = _kind(p._replace(channels_last=True)) if wide and last else kind
        done = _library_products(_backwards(p), kind)
        counts.update({f"input {name}": count for name, count in done.items()})
        counts["input weights"] = p.out_channels * p.taps * calls
        _passes(counts, "x gradient", _elements(p)[0], p.dtype.itemsize)


def _elements(p: ConvProblem) -> tuple[float, float, float]:
    """Elements of the input, of the convolution's map and of the result."""
    x = p.batch * p.channels * p.height * p.width
    of_map = p.batch * p.out_channels * p.conv[0] * p.conv[1]
    return x, of_map, p.batch * p.out_channels * p.pooled[0] * p.pooled[1]


def _is_copy(p: ConvProblem) -> bool:
    """Whether PyTorch's operators copy their result into the layout of the block."""
    layout = p.spec.layout
    if layout in ("channels_first", "features"):
        return p.channels_last
    return layout != "channels_last" or not p.channels_last


def reference_forward(p: ConvProblem) -> Counts:
    size = p.dtype.itemsize
    x, of_map, out = _elements(p)
    counts: Counts = {}
    _library(counts, p, 1)
    lies = "last" if p.channels_last else "first"
    _passes(counts, f"x {lies}", x, size)
    _passes(counts, f"map {lies}", of_map, size)
    activation = p.spec.activation
    if activation is not None:
        _passes(counts, "activation", of_map, size)
        if activation in _CURVED:
            counts["slow curve" if activation in _SLOW else "curve"] = of_map
    if p.norm is not None:
        _passes(counts, f"norm {p.norm}", of_map, size)
    if p.spec.pool is not None:
        signal = p.height == 1 and not p.training  # whose pools find no indices
        counts["windows of rows" if signal else f"windows {lies}"] = out * p.spec.window
        _passes(counts, f"out {lies}", out, size)
    if _is_copy(p):
        _passes(counts, "copied", out, size)
    counts["calls"] = (
        (activation is not None) + (p.norm is not None) + (p.spec.pool is not None) + _is_copy(p)
    )
    return counts


def reference_backward(p: ConvProblem) -> Counts:
    counts = reference_forward(p)
    _library_gradients(counts, p, 1, p.channels_last)
    if p.needs_x:
        counts["library calls"] += 1
    return counts


def chunks(p: ConvProblem) -> float:
    """How many times ``chunked`` calls the library's convolution."""
    size = p.dtype.itemsize
    of_image = p.out_channels * p.conv[0] * p.conv[1] * size
    together = max(_CHUNK_BYTES, _CHUNK_WEIGHTS * p.out_channels * p.taps * size)
    return -(-p.batch // min(max(together // of_image, 1), p.batch)) if p.batch else 0


def _epilogue(counts: Counts, p: ConvProblem, out: float, of_map: float, size: int) -> None:
    """The epilogue: what our kernels do with a map that is in registers or cache."""
    _passes(counts, "out", out, size)
    if p.training:
        counts["kept"] = of_map  # what the backward reads of the map
    if LAYOUTS[p.spec.layout][0][-1] != "C":  # rows lie across channels, so vectors of channels are split
        counts["out across"] = out
    if p.spec.pool is not None:
        counts["windows"] = out * p.spec.window
    activation = p.spec.activation
    if activation in _CURVED:
        counts["curve"] = of_map if activation in _UNORDERED else out
    if p.norm in ("given", "batch"):
        _passes(counts, f"norm {p.norm}", of_map, size)
    elif p.norm == "folded":
        counts["folds"] = 1
    counts["calls"] = 1


def chunked_forward(p: ConvProblem) -> Counts:
    size = p.dtype.itemsize
    x, of_map, out = _elements(p)
    counts: Counts = {}
    _library(counts, p, chunks(p))
    _passes(counts, f"x {'last' if p.channels_last else 'first'}", x, size)
    counts["map"] = of_map
    _epilogue(counts, p, out, of_map, size)
    return counts


def chunked_backward(p: ConvProblem) -> Counts:
    counts = chunked_forward(p)
    _library_gradients(counts, p, chunks(p), True)
    return counts


def _joined(p: ConvProblem) -> int:
    """How many groups ``direct`` joins into one, so that their output channels fill vectors."""
    groups, per_group = p.spec.groups, p.out_channels // p.spec.groups
    for joined in range(1, groups):
        if groups % joined == 0 and per_group * joined % _LANES == 0:
            return joined
    return groups


def _by_planes(p: ConvProblem) -> bool:
    """Whether ``direct`` reads and writes channels-first images plane by plane."""
    plain = p.spec.pool is None and p.spec.layout == "channels_first" and not p.channels_last
    return plain and not p.training and p.dtype.itemsize == 4


def _by_patches(p: ConvProblem) -> bool:
    """Whether batch statistics come from products of patches."""
    few = p.taps <= MOST_TAPS_BY_PATCHES and p.spec.groups == 1 and p.dtype.itemsize == 4
    return few and p.norm == "batch" and not p.needs_x


def _idle(p: ConvProblem, items: float) -> float:
    """The time of ``items`` whole pieces of work on the threads, over that of an even division."""
    return p.threads * -(-items // p.threads) / items if items else 1.0


def _direct_products(p: ConvProblem) -> tuple[str, float, float, float]:
    rows = p.batch * p.conv[0] * _idle(p, p.batch * p.pooled[0])
    positions = rows * p.conv[1]
    if p.depthwise and _by_planes(p):
        along_rows = rows * _up(p.conv[1], _LANES) / _LANES  # vectors of one channel's positions
        return "depthwise", along_rows * p.out_channels * p.taps, 0.0, 0.0
    joined = _joined(p)
    groups = p.spec.groups // joined
    per_group, taps = p.out_channels // groups, p.taps * joined
    vectors = groups * (_up(per_group, _LANES) // _LANES) * taps
    blocks = groups * -(-per_group // _TILE_CHANNELS)
    tiles = rows * -(-p.conv[1] // _TILE_POSITIONS)
    if _by_planes(p) and p.kernel == (1, 1) and max(*p.spec.stride, p.spec.groups) == 1:
        return "planes", positions * vectors, positions * blocks * taps, tiles * vectors
    kind = (
        "large" if per_group * taps * 4 > _CACHE_BYTES else "strided" if max(p.spec.stride) > 1 else "dense"
    )
    return kind, positions * vectors, positions * blocks * taps, tiles * vectors


def direct_forward(p: ConvProblem) -> Counts:
    size = p.dtype.itemsize
    x, of_map, out = _elements(p)
    kind, products, broadcasts, tiles = _direct_products(p)
    counts: Counts = {
        f"products {kind}": products, "broadcasts": broadcasts, "tiles": tiles,
        "weights": p.out_channels * p.taps * _joined(p),
    }  # fmt: skip
    _passes(counts, f"x {'last' if p.channels_last else 'first'}", x, size)
    if p.height > 1 and p.kernel[0] > 1 and not p.depthwise:
        counts["x again"] = x * (p.kernel[0] - 1) / p.spec.stride[0]
    _epilogue(counts, p, out, of_map, size)
    if kind == "depthwise":  # by rows of one channel, each in whole vectors
        counts["plane rows"] = p.batch * p.conv[0] * p.out_channels
        if "curve" in counts:
            counts["curve"] *= _up(p.conv[1], _LANES) / p.conv[1]
        del counts["out across"]
    if _by_patches(p):
        positions = p.batch * p.conv[0] * p.conv[1]
        counts["patches"] = positions * p.taps
        counts["patch products"] = positions * p.taps * p.taps
        counts["patch calls"] = 1
        for name in [name for name in counts if name.startswith("norm")]:
            del counts[name]
    return counts


def direct_backward(p: ConvProblem) -> Counts:
    size = p.dtype.itemsize
    x, of_map, out = _elements(p)
    kind, *ours = _direct_products(p)
    by_patches = _by_patches(p)
    sparse = (p.spec.pool is not None and p.norm is None) or by_patches  # only a window's winner has a slope
    share = out / of_map if sparse and of_map else 1.0
    of = "sparse" if sparse else kind
    counts: Counts = {"weights": p.out_channels * p.taps * _joined(p)}
    _gradients(counts, "weight", of, [share * count for count in ours])
    counts["weight rows"] = p.batch * p.conv[0] * p.kernel[0] * _up(p.out_channels, _LANES) / _LANES
    _passes(counts, f"x {'last' if p.channels_last else 'first'}", x, size)
    _epilogue(counts, p, out, of_map, size)
    if p.needs_x:
        _gradients(counts, "input", of, [share * count for count in _direct_products(_backwards(p))[1:]])
        _passes(counts, "x gradient", x, size)
    again = p.norm == "batch" and p.spec.pool is not None and p.taps <= MOST_TAPS_COMPUTED_AGAIN
    if again and not by_patches:
        counts[f"products {kind}"] = ours[0]
    if by_patches:
        counts["patch calls"] = 1
        for name in [name for name in counts if name.startswith("norm")]:
            del counts[name]
    return counts


def _gradients(counts: Counts, of: str, kind: str, count: Sequence[float]) -> None:
    """The products of one gradient."""
    names = f"products {kind}", "broadcasts", "tiles"
    counts.update({f"{of} {name}": found for name, found in zip(names, count, strict=True)})


#: A tile of Winograd's F(2x2, 3x3): outputs each way, and products of a channel pair.
_WINOGRAD_TILE, _WINOGRAD_PRODUCTS = 2, 16


def _winograd_tiles(p: ConvProblem) -> float:
    return p.batch * -(-p.conv[0] // _WINOGRAD_TILE) * -(-p.conv[1] // _WINOGRAD_TILE)


def winograd_forward(p: ConvProblem) -> Counts:
    size = p.dtype.itemsize
    x, of_map, out = _elements(p)
    tiles = _winograd_tiles(p)
    deep, wide = _up(p.channels, _LANES), _up(p.out_channels, _LANES)
    counts: Counts = {
        "products": tiles * _WINOGRAD_PRODUCTS * p.channels * wide / _LANES,
        "transformed x": tiles * deep, "transformed map": tiles * wide,
        "weights": p.out_channels * p.taps,
    }  # fmt: skip
    _passes(counts, f"x {'last' if p.channels_last else 'first'}", x, size)
    _epilogue(counts, p, out, of_map, size)
    return counts


def winograd_backward(p: ConvProblem) -> Counts:
    counts = winograd_forward(p)
    counts["weight products"] = counts.pop("products")
    if p.needs_x:
        counts["input products"] = counts["weight products"]
        counts["input weights"] = counts["weights"]
        x, _, _ = _elements(p)
        _passes(counts, "x gradient", x, p.dtype.itemsize)
    return counts


def fft_forward(p: ConvProblem) -> Counts:
    """Windows are taken as twice the kernel, along its longer axis (:mod:`cnnlstm_fast.ops.conv_fft`)."""
    size = p.dtype.itemsize
    x, of_map, out = _elements(p)
    along = 1 if p.kernel[1] >= p.kernel[0] else 0
    taps = -(-p.kernel[along] // p.spec.stride[along])
    other = -(-p.kernel[1 - along] // p.spec.stride[1 - along])
    hop = min(taps, p.conv[along])
    windows = p.batch * -(-p.conv[along] // hop) * p.conv[1 - along]
    rows = 1.5 * (hop + taps)
    phases = p.spec.stride[0] * p.spec.stride[1]
    weights = p.out_channels * p.channels * phases * other
    seen = windows * p.spec.stride[1 - along] * p.channels * phases
    counts: Counts = {
        "products": windows * rows * weights / _LANES,
        "transforms": (seen * (hop + taps) + windows * p.out_channels * hop) * rows / _LANES,
        "weight transforms": weights * taps * rows / _LANES,
        "spectra": (seen + windows * p.out_channels + 2 * weights) * rows,
        "weights": p.out_channels * p.taps, "steps": 1,
    }  # fmt: skip
    _passes(counts, "x", x, size)
    counts["map"] = of_map
    _epilogue(counts, p, out, of_map, size)
    return counts


def fft_backward(p: ConvProblem) -> Counts:
    counts = fft_forward(p)
    if p.needs_x:
        for name in ("products", "transforms", "weight transforms", "spectra", "steps"):
            counts[f"input {name}"] = counts[name]
    return counts


#: What a plan does in a forward and in a backward call.
COUNTS: Mapping[str, tuple[Callable[[ConvProblem], Counts], Callable[[ConvProblem], Counts]]] = {
    "reference": (reference_forward, reference_backward),
    "direct": (direct_forward, direct_backward),
    "chunked": (chunked_forward, chunked_backward),
    "winograd": (winograd_forward, winograd_backward),
    "fft": (fft_forward, fft_backward),
}


#: Terms that some convolutions of their kind pay and others do not; they count as if all did.
FEARED = ("weight loops",)
#: Terms that take as long however many threads there are.
SERIAL = ("calls", "recorded calls", "folds", "library calls", "patch calls", "steps", "input steps")


def shared(counts: Counts, share: float) -> Counts:
    """Counts of one of the threads, which do ``share`` of what can be divided."""
    return {term: count if term in SERIAL else share * count for term, count in counts.items()}


def nanoseconds(counts: Counts, rates: Mapping[str, float]) -> float:
    """The sum of ``counts`` times ``rates``; a term without a rate costs nothing."""
    return sum([count * rates.get(name, 0.0) for name, count in counts.items()])


def predict(problem: ConvProblem, rates: Rates, plans: Iterable[str]) -> dict[str, float]:
    """Nanoseconds that each plan takes, with the backward where a gradient is needed."""
    share = rates.threads / problem.threads
    found = {}
    for plan in plans:
        forward, backward = rates.of(problem.dtype, plan)
        counts = COUNTS[plan]
        found[plan] = nanoseconds(shared(counts[0](problem), share), forward)
        if problem.training:
            found[plan] += nanoseconds(shared(counts[1](problem), share), backward)
    return found


def _behind(elements: float, size: int, names: Iterable[str], calls: float, recorded: bool) -> Counts:
    """Passes of these names over maps of ``elements``, in ``calls`` calls."""
    counts: Counts = {"calls": calls}
    if recorded:
        counts["recorded calls"] = calls
    for name in names:
        once: Counts = {}
        _passes(once, name, elements, size)
        for term, count in once.items():
            counts[term] = counts.get(term, 0.0) + count
    return counts


def activation_kind(activation: str | None) -> str:
    """The kind of step that an activation is: ``"activation"``, a ``"curve"``, or one slow in PyTorch."""
    if activation not in _CURVED:
        return "activation"
    return "slow curve" if activation in _SLOW else "curve"


def steps_counts(elements: float, size: int, kinds: Sequence[str], of_batch: bool, recorded: bool) -> Counts:
    """Steps behind a convolution by PyTorch's operators, a pass each; forward and backward have one count.

    Args:
        elements, size: of the map; bytes of one.
        kinds: of the steps: ``"norm"``, ``"sum"``, or of :func:`activation_kind`.
        of_batch: the norm reads the statistics of the batch.
        recorded: a graph of gradients is built.
    """
    norm = "norm batch" if of_batch else "norm given"
    names = [{"norm": norm, "sum": "sum"}.get(kind, "activation") for kind in kinds]
    counts = _behind(elements, size, names, len(names), recorded)
    for kind in kinds:
        if kind.endswith("curve"):
            counts[kind] = counts.get(kind, 0.0) + elements
    return counts


def epilogue_counts(
    elements: float, size: int, kinds: Sequence[str], of_batch: bool, recorded: bool
) -> Counts:
    """The same steps as one epilogue; sums and products in registers are taken to cost nothing."""
    names = ["map"] + ["sum"] * ("sum" in kinds) + ["norm batch"] * of_batch
    counts = _behind(elements, size, names, 1, recorded)
    curves = sum([kind.endswith("curve") for kind in kinds])
    return counts | {"curve": curves * elements} if curves else counts


#: What runs the steps behind a convolution, and what it does in a forward or backward call.
PASSES: Mapping[str, Callable[[float, int, Sequence[str], bool, bool], Counts]] = {
    "steps": steps_counts,
    "epilogue": epilogue_counts,
}


def epilogue_saves(
    elements: int, dtype: torch.dtype, kinds: Sequence[str], of_batch: bool, training: bool, rates: Rates,
    threads: int,
) -> float:  # fmt: skip
    """Microseconds that an epilogue saves over PyTorch's operators.

    Args:
        elements, dtype: of the map.
        kinds, of_batch: as in :func:`steps_counts`.
        training: a backward follows.
        rates: of this processor.
        threads: how many may run.
    """
    share = rates.threads / threads
    took = {}
    for way, count in PASSES.items():
        counts = shared(count(elements, dtype.itemsize, kinds, of_batch, training), share)
        took[way] = sum(nanoseconds(counts, one) for one in rates.behind(dtype, way)[: 1 + training])
    return (took["steps"] - took["epilogue"]) / 1000


def conversion_us(elements: int, dtype: torch.dtype, training: bool, rates: Rates, threads: int) -> float:
    """Microseconds of an image's copy in another layout, with the one of its gradient when ``training``."""
    counts: Counts = {"calls": 1}
    _passes(counts, "copied", elements, dtype.itemsize)
    counts = shared(counts, rates.threads / threads)
    return sum(nanoseconds(counts, one) for one in rates.of(dtype, "reference")[: 1 + training]) / 1000
