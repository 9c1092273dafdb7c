"""The description of a block, ``layout(pool(act(norm(conv(x)))))``, and all of its shape arithmetic.

Nothing here computes on tensors. Sizes are (H, W), and a signal has height 1. An op may be called with
anything, so csrc/block_description.cpp has the same in C++; tests/test_spec.py compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

#: By layout: the memory order of the pooled map (N, C, H, W), slowest axis first; and how many of these axes
#: each dimension of the result merges.
LAYOUTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "channels_first": ("NCHW", (1, 1, 1, 1)),
    "channels_last": ("NHWC", (1, 1, 1, 1)),
    "locations": ("NHWC", (1, 2, 1)),
    "locations_time_major": ("HWNC", (2, 1, 1)),
    "features": ("NCHW", (1, 3)),
    "columns": ("NWCH", (1, 1, 2)),
    "columns_time_major": ("WNCH", (1, 1, 2)),
    "rows": ("NHCW", (1, 1, 2)),
    "rows_time_major": ("HNCW", (1, 1, 2)),
    "columns_channels_last": ("NWHC", (1, 1, 2)),
    "columns_channels_last_time_major": ("WNHC", (1, 1, 2)),
    "rows_channels_last": ("NHWC", (1, 1, 2)),
    "rows_channels_last_time_major": ("HNWC", (1, 1, 2)),
}

#: Numbers of the activations that the fused plans compute, as the ops take them. Those below ``CURVED`` have
#: slopes 0 and 1 only, so that the backward needs only argmax codes.
ACTIVATIONS: dict[str | None, int] = {
    None: 0, "relu": 1, "hardtanh": 2, "leaky_relu": 3, "elu": 4, "tanh": 5, "sigmoid": 6, "silu": 7,
    "gelu": 8, "gelu_tanh": 9, "softplus": 10, "mish": 11, "hardswish": 12, "hardsigmoid": 13,
}  # fmt: skip
CURVED = ACTIVATIONS["leaky_relu"]
#: Curved activations where a slope of zero stops any gradient, be it infinite or NaN; the others multiply.
STOPPING = frozenset(ACTIVATIONS[name] for name in ("hardswish", "hardsigmoid"))
#: How many numbers an activation has; the others have none.
ACTIVATION_NUMBERS = {
    ACTIVATIONS["hardtanh"]: 2, ACTIVATIONS["leaky_relu"]: 1, ACTIVATIONS["elu"]: 1,
    ACTIVATIONS["softplus"]: 2,
}  # fmt: skip

#: Stages of an epilogue (:mod:`cnnlstm_fast.ops.epilogue`), as the op takes them: an activation is its number
#: in ``ACTIVATIONS`` more than ``FIRST_ACTIVATION``. Each has two numbers.
NORM_STAGE, ADD_STAGE, FIRST_ACTIVATION = 0, 1, 2
#: Activations of two slopes: behind an added tensor a backward reads a bit for each element.
TWO_SLOPES = frozenset(ACTIVATIONS[name] for name in ("relu", "hardtanh", "leaky_relu"))
#: The most loops over elements that an epilogue's program may take.
EPILOGUE_STEPS = 4

#: Argmax codes: windows of up to this many elements take half a byte, larger ones one byte.
NIBBLE_WINDOW = 14
BYTE_WINDOW = 254
#: Channels per code group: a group of 16 channels is 8 bytes (nibbles) or 16 bytes.
CODE_GROUP = 16

#: The largest parameter of a convolution or a pool, and the most elements of a tensor.
MOST_SIZE = 2**31 - 1
MOST_ELEMENTS = 2**40


@dataclass(frozen=True)
class Pool:
    """A max pool, in the terms of ``torch.nn.MaxPool2d``."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def window(self) -> int:
        return self.kernel[0] * self.kernel[1]


@dataclass(frozen=True, eq=False)  # by identity, because a spec is a part of cache keys
class BlockSpec:
    """One block with 2-d parameters (a 1-d block is a 2-d block of height 1).

    ``order`` is the permutation of (N, C, H, W) in which the result lies in memory.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str | None = "relu"
    pool: Pool | None = None
    layout: str = "channels_first"
    #: Hardtanh: least and most; LeakyReLU: slope; ELU: alpha; Softplus: beta and threshold
    activation_args: tuple[float, ...] = ()
    #: zeros after the last row and column beside ``padding``: ``padding="same"`` with an even kernel
    padding_after: tuple[int, int] = (0, 0)
    # The op's arguments. Each list is made once, which saves a microsecond per call.
    order: list[int] = field(init=False, repr=False)
    conv_args: list[int] = field(init=False, repr=False)
    act_args: list[float] = field(init=False, repr=False)
    pool_args: list[int] = field(init=False, repr=False)

    def __post_init__(self):
        p = self.pool
        after = self.padding_after if any(self.padding_after) else ()
        pool = [*p.kernel, *p.stride, *p.padding, *p.dilation, int(p.ceil_mode)] if p else []
        for name, value in (
            ("order", ["NCHW".index(axis) for axis in LAYOUTS[self.layout][0]]),
            ("conv_args", [*self.stride, *self.padding, *self.dilation, self.groups, *after]),
            ("act_args", list(self.activation_args)),
            ("pool_args", pool),
        ):
            object.__setattr__(self, name, value)

    @property
    def window(self) -> int:
        return self.pool.window if self.pool else 1

    def conv_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """(H, W) of the convolution's map for an input of ``size``; below 1 where nothing fits."""
        return map_size(size, kernel, self.conv_args)

    def out_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """(H, W) after the pool for an input of ``size``."""
        conv = self.conv_size(size, kernel)
        return pool_size(conv, self.pool_args)

    def windows_meet(self, size: Sequence[int], kernel: Sequence[int]) -> bool:
        """Whether every pool window holds an element of the map; a dilated window may hold padding only."""
        conv, out = self.conv_size(size, kernel), self.out_size(size, kernel)
        return windows_meet(conv, out, self.pool_args)


def conv_size(size, kernel, stride, padding, dilation) -> tuple[int, int]:
    h, w = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return h, w


def map_size(size, kernel, conv_args) -> tuple[int, int]:
    """Size of the convolution's map, its parameters given as ``BlockSpec.conv_args``."""
    if len(conv_args) > 7:
        size = [s + after for s, after in zip(size, conv_args[7:], strict=True)]
    return conv_size(size, kernel, conv_args[0:2], conv_args[2:4], conv_args[4:6])


def padded_size(size, conv_args) -> tuple[int, int]:
    """Size of an input with the padding of a convolution given as ``BlockSpec.conv_args``."""
    h, w = (s + 2 * p + a for s, p, a in zip(size, conv_args[2:4], conv_args[7:] or (0, 0), strict=True))
    return h, w


def pool_size(size, pool_args) -> tuple[int, int]:
    """Size after a max pool given as ``BlockSpec.pool_args``; the last window must start inside."""
    if not pool_args:
        return tuple(size)
    kernel, stride, padding, dilation = (pool_args[i : i + 2] for i in (0, 2, 4, 6))
    out = []
    for i in (0, 1):
        span = size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        n = (span + (stride[i] - 1 if pool_args[8] else 0)) // stride[i] + 1
        if pool_args[8] and (n - 1) * stride[i] >= size[i] + padding[i]:
            n -= 1
        out.append(n)
    return tuple(out)


def windows_meet(size, out_size, pool_args) -> bool:
    """Whether every window of a max pool given as ``BlockSpec.pool_args`` holds an element of the map."""
    if not pool_args or max(pool_args[6:8]) == 1 or max(pool_args[4:6]) == 0:
        return True
    kernel, stride, padding, dilation = (pool_args[i : i + 2] for i in (0, 2, 4, 6))
    return all(
        _windows_meet(size[i], out_size[i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)
    )


def _windows_meet(size, windows, kernel, stride, padding, dilation) -> bool:
    """The same along one axis. A window that begins inside holds its first element."""
    for start in range(-padding, min(0, windows * stride - padding), stride):
        skipped = -(start // dilation)
        if skipped >= kernel or start + skipped * dilation >= size:
            return False
    return (windows - 1) * stride - padding < size


def is_fixed(*sizes) -> bool:
    """Whether all sizes are numbers, none of them left open by a trace."""
    return all(type(size) is int for size in sizes)


def block_sizes(x_shape, weight_shape, conv, pool, activation, act, order):
    """Check the arguments of the block's ops; (H, W) of the convolution's map and of the result.

    Sizes that a trace leaves open are not compared.

    Raises:
        RuntimeError: they are not those of a block.
    """
    if len(x_shape) != 4 or len(weight_shape) != 4:
        raise RuntimeError(
            f"conv_block: expected a 4-d input and weight, got {len(x_shape)}-d and {len(weight_shape)}-d"
        )
    _check_parameters(conv, pool, activation, act, order)
    n, c, h, w = x_shape
    co, c_group, kh, kw = weight_shape
    groups = conv[6]
    if is_fixed(c, co, c_group, kh, kw, groups) and (
        min(c, co, kh, kw) < 1 or co % groups or c != c_group * groups
    ):
        raise RuntimeError(
            f"conv_block: an input of {c} channels does not fit a weight {tuple(weight_shape)} with "
            f"groups={groups}"
        )
    conv_hw = map_size((h, w), (kh, kw), conv)
    if is_fixed(h, w, *conv_hw) and min(h, w, *conv_hw) < 1:
        raise RuntimeError(f"conv_block: an input of {h}x{w} is too small for the kernel")
    _check_elements("an input", x_shape)
    _check_elements("a weight", weight_shape)
    _check_elements("an input with its padding", (c, *padded_size((h, w), conv)))
    _check_elements("a map", (n, co, *conv_hw))
    if not pool:
        return conv_hw, conv_hw
    if pool[0] * pool[1] > BYTE_WINDOW:
        raise RuntimeError(
            f"conv_block: a pool window of {pool[0]}x{pool[1]} has more than {BYTE_WINDOW} elements"
        )
    if pool[4] > pool[0] // 2 or pool[5] > pool[1] // 2:
        raise RuntimeError("conv_block: pool padding is more than half the kernel")
    size = pool_size(conv_hw, pool)
    if is_fixed(*size):
        if min(size) < 1:
            raise RuntimeError(f"conv_block: a map of {conv_hw[0]}x{conv_hw[1]} is too small for the pool")
        if not windows_meet(conv_hw, size, pool):
            raise RuntimeError("conv_block: a pool window meets no element of the map")
    return conv_hw, size


def _check_parameters(conv, pool, activation, act, order) -> None:
    if len(conv) not in (7, 9):
        raise RuntimeError(
            "conv_block: conv must be [stride, padding, dilation (h, w each), groups, more padding after "
            f"(h, w)], got {len(conv)} values"
        )
    if len(pool) not in (0, 9):
        raise RuntimeError(f"conv_block: pool must be empty or have 9 values, got {len(pool)}")
    if not 0 <= activation < len(ACTIVATIONS):
        raise RuntimeError(f"conv_block: unknown activation {activation}")
    numbers = ACTIVATION_NUMBERS.get(activation, 0)
    if len(act) != numbers:
        raise RuntimeError(f"conv_block: activation {activation} has {numbers} numbers, got {len(act)}")
    if sorted(order) != [0, 1, 2, 3]:
        raise RuntimeError(f"conv_block: order must be a permutation of 0, 1, 2, 3, got {list(order)}")
    for name, values, from_zero in (("conv", conv, (2, 3, 7, 8)), ("pool", pool, (4, 5, 8))):
        for i, value in enumerate(values):
            if is_fixed(value) and not (i not in from_zero) <= value <= MOST_SIZE:
                raise RuntimeError(f"conv_block: {name}[{i}] = {value} is out of range")


def _check_elements(what: str, sizes) -> None:
    """Sizes of 0 count as 1, so that no product of some of them is larger."""
    if is_fixed(*sizes) and math.prod(max(size, 1) for size in sizes) > MOST_ELEMENTS:
        raise RuntimeError(f"conv_block: {what} of size {tuple(sizes)} is too large")


def raw_shape(order, n: int, c: int, size) -> list[int]:
    """Shape of the op's contiguous result: (N, C, H, W) permuted into memory order."""
    nchw = (n, c, *size)
    return [nchw[axis] for axis in order]


def codes_shape(window: int, n: int, c: int, size) -> list[int]:
    """Shape of the uint8 argmax codes: (N, H, W, groups of 16 channels, 8 or 16 bytes).

    With nibbles, byte b of a group holds channel b in its low half and channel b + 8 in its high
    half. A code is the maximum's position in its window, row by row; all ones means that the
    activation passed nothing.
    """
    bytes_per_group = CODE_GROUP // 2 if window <= NIBBLE_WINDOW else CODE_GROUP
    return [n, *size, -(-c // CODE_GROUP), bytes_per_group]


def epilogue_steps(stages: Sequence[int]) -> int:
    """How many loops over elements the stages of an epilogue take: in one, a norm, a sum, an activation."""
    steps, last = 0, 2
    for stage in stages:
        kind = min(stage, FIRST_ACTIVATION)
        steps += kind <= last
        last = kind
    return steps


def canonical_stages(stages: Sequence[int]) -> list[int | None] | None:
    """Where the activations of an epilogue stand: before the norm, behind it, and behind the sum.

    None where the stages don't fit: an activation, a norm, an activation, a sum, an activation.
    """
    found: list[int | None] = [None, None, None]
    normed, summed = NORM_STAGE in stages, False
    for at, stage in enumerate(stages):
        if stage == NORM_STAGE:
            normed = False
        elif stage == ADD_STAGE:
            summed = True
        else:
            slot = 2 if summed else 0 if normed else 1
            if found[slot] is not None:
                return None
            found[slot] = at
    return found


def keeps_bits(stages: Sequence[int]) -> bool:
    """Whether a backward of an epilogue reads a bit per element: where an activation ends a sum."""
    return len(stages) > 1 and stages[-2] == ADD_STAGE and stages[-1] >= FIRST_ACTIVATION


def bits_shape(n: int, c: int, positions: int, inside: bool) -> list[int]:
    """Shape of an epilogue's bits: rows of the map in memory, and bytes of each, a whole number of 16 bits.

    A row is a plane, or all channels of a position where channels lie innermost (``inside``).
    """
    rows, width = (n * positions, c) if inside or positions == 1 else (n * c, positions)
    return [rows, -(-width // 16) * 2]


def view_as_layout(raw, layout: str, rank: int):
    """View the op's raw result, which is in memory order, in the shape of a layout; never a copy.

    ``rank`` is that of the block's input: 4 for (N, C, H, W), 3 for (N, C, L).
    """
    order, merge = LAYOUTS[layout]
    if layout in ("channels_first", "channels_last"):
        if rank == 3:
            raw = raw.squeeze(order.index("H"))
            return raw if layout == "channels_first" else raw.transpose(1, 2)
        return raw if layout == "channels_first" else raw.permute(0, 3, 1, 2)
    shape, at = [], 0
    for count in merge:
        size = 1
        for axis in range(at, at + count):
            size *= raw.shape[axis]
        shape.append(size)
        at += count
    return raw.view(shape)
