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
#: Input channels up to which the library has a special convolution for images; channels of a wide group.
_IMAGE_CHANNELS, _NARROW_GROUP = 3, 16
#: Kernel columns up to which the library computes signals as it computes images.
_ROW_KERNEL = 14
#: Taps up to which batch statistics come from products of patches (:mod:`cnnlstm_fast.ops.conv_norm`).
MOST_TAPS_BY_PATCHES = 64
#: Taps above which a pooled block under batch statistics keeps its map instead of computing it again.
MOST_TAPS_COMPUTED_AGAIN = 384

#: Activations that cost more than a comparison for each element.
_CURVED = ("elu", "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "softplus")
#: Activations that are not monotone, so that they cannot be computed behind the pool.
_UNORDERED = ("silu", "gelu", "gelu_tanh", "softplus")

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


def _kind(p: ConvProblem) -> str:
    """The kind of convolution for the library, whose kinds run at different rates."""
    groups = p.spec.groups
    if p.depthwise:
        return "depthwise" if p.out_channels == p.channels else "multiplied"
    if groups > 1:
        narrow = min(p.channels, p.out_channels) // groups % _NARROW_GROUP
        return "narrow groups" if narrow else "groups"
    if p.channels <= _IMAGE_CHANNELS:
        return "image"
    if p.kernel == (1, 1):
        return "pointwise" if max(p.spec.stride) == 1 else "strided"
    if max(p.spec.stride) > 1:
        return "strided"
    if p.height == 1 or p.kernel[0] == 1 or p.kernel[1] == 1:
        return "long row" if p.kernel[1] > _ROW_KERNEL else "row"
    return "dense"


def _library_products(p: ConvProblem) -> tuple[str, float, float, float]:
    """Kind, vectors of multiply-adds, broadcasts and weight vectors of the library's convolution."""
    kind, groups = _kind(p), p.spec.groups
    positions = p.batch * p.conv[0] * p.conv[1]
    area = p.kernel[0] * p.kernel[1]
    if kind in ("depthwise", "multiplied"):
        vectors = _up(p.out_channels, _LANES) / _LANES * area
        return kind, positions * vectors, 0.0, p.batch * p.conv[0] * vectors
    per_group = p.out_channels // groups
    deep = p.channels // groups
    if deep > _IMAGE_CHANNELS:
        deep = _up(deep, _LANES if deep > _LANES else 4)
    vectors = groups * _up(per_group, _LANES) / _LANES * deep * area
    tiles = p.batch * p.conv[0] * -(-p.conv[1] // _TILE_POSITIONS)
    blocks = groups * -(-per_group // _TILE_CHANNELS)
    return kind, positions * vectors, positions * blocks * deep * area, tiles * vectors


def _library(counts: Counts, p: ConvProblem, calls: float) -> None:
    """The library's convolution in ``calls`` parts."""
    kind, products, broadcasts, tiles = _library_products(p)
    counts[f"products {kind}"] = products
    counts["broadcasts"] = broadcasts
    counts["tiles"] = tiles
    lies = " last" if p.channels_last else ""  # contiguous weights are reordered for such inputs
    counts[f"weights{lies}"] = p.out_channels * p.taps * calls
    counts["library calls"] = calls


def _library_gradients(counts: Counts, p: ConvProblem, calls: float) -> None:
    """Replace the library's convolution in ``counts`` by its gradients, in ``calls`` parts."""
    kind = _kind(p)
    wanted = ("weight", "input") if p.needs_x else ("weight",)
    for name in (f"products {kind}", "broadcasts", "tiles"):
        count = counts.pop(name)
        counts.update({f"{of} {name}": count for of in wanted})
    if p.needs_x:
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
        return layout == "features" and p.channels_last
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
            counts["curve"] = of_map
    if p.norm is not None:
        _passes(counts, f"norm {p.norm}", of_map, size)
    if p.spec.pool is not None:
        counts[f"windows {lies}"] = out * p.spec.window
        _passes(counts, f"out {lies}", out, size)
    if _is_copy(p):
        _passes(counts, "copied", out, size)
    counts["calls"] = (
        (activation is not None) + (p.norm is not None) + (p.spec.pool is not None) + _is_copy(p)
    )
    return counts


def reference_backward(p: ConvProblem) -> Counts:
    counts = reference_forward(p)
    _library_gradients(counts, p, 1)
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
    _library_gradients(counts, p, chunks(p))
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
    kind, products, broadcasts, _ = _direct_products(p)
    share = 1 / p.spec.window if (p.spec.pool is not None and p.norm is None) or _by_patches(p) else 1.0
    counts: Counts = {
        f"weight products {kind}": products * share, "weight broadcasts": broadcasts * share,
        "weights": p.out_channels * p.taps * _joined(p),
    }  # fmt: skip
    _passes(counts, f"x {'last' if p.channels_last else 'first'}", x, size)
    _epilogue(counts, p, out, of_map, size)
    if p.needs_x:
        counts[f"input products {kind}"] = products * share
        counts["input broadcasts"] = broadcasts * share
        _passes(counts, "x gradient", x, size)
    again = p.norm == "batch" and p.spec.pool is not None and p.taps <= MOST_TAPS_COMPUTED_AGAIN
    if again and not _by_patches(p):
        counts[f"products {kind}"] = products
    if _by_patches(p):
        counts["patch calls"] = 1
        for name in [name for name in counts if name.startswith("norm")]:
            del counts[name]
    return counts


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


#: Terms that take as long however many threads there are.
SERIAL = ("calls", "folds", "library calls", "patch calls", "steps", "input steps")


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


#: Bytes that a thread moves in a nanosecond, where they are in cache and where they are not; nanoseconds of a
#: call of an operator.
_CACHE_RATE, _MEMORY_RATE, _CALL_NS = 8.0, 3.0, 5000.0
#: By kind of step, the maps that PyTorch's operators read and write, forward and backward.
_PASSES: Mapping[str, tuple[int, int]] = {"norm": (2, 3), "sum": (3, 0)}
_ACTIVATION_PASSES = 2, 3


def epilogue_saves(
    elements: int, size: int, kinds: Sequence[str], of_batch: bool, training: bool, threads: int
) -> float:
    """Microseconds that an epilogue saves over PyTorch's operators, by the bytes that both move.

    Args:
        elements, size: of the map; bytes of one.
        kinds: of the steps (:class:`cnnlstm_fast.fusion.match.Part`).
        of_batch: the norm reads the statistics of the batch.
        training: a backward follows.
    """
    kinds = [kind for kind in kinds if kind != "identity"]
    passes = [_PASSES.get(kind, _ACTIVATION_PASSES) for kind in kinds]
    theirs, ours = sum(p[0] for p in passes) + of_batch, 2 + ("sum" in kinds) + of_batch
    calls = len(kinds) - 1.0
    if training:
        theirs += sum(p[1] for p in passes) + 2 * of_batch
        ours += 3 + ("sum" in kinds) + 2 * of_batch
        calls *= 2
    moved = elements * size
    rate = (_CACHE_RATE if moved < _CACHE_BYTES else _MEMORY_RATE) * threads
    return (moved * (theirs - ours) / rate + calls * _CALL_NS) / 1000
