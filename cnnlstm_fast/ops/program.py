"""The ops of frozen programs: what a model computes, node by node over slots, run by one call. CPU only.

- ``program_new`` makes a program and returns its number; ``program_free`` ends it, after the calls that run.
- ``program_run`` runs it on as many tensors as it has inputs, and returns its results.

The code of a program is a list of whole numbers; floats and names are given by their place in two lists
beside it. It reads ``version, tensor slots, int slots, inputs, nodes, node..., outputs, slot...``. The first
slots of tensors hold the constants, the next ones the inputs. A node is its kind (its place in :data:`KINDS`)
and:

- ``call``: name, overload, arguments, results. An argument is its kind (:data:`ARGUMENTS`), whether the
  schema calls it optional, and its value. A result is whether it is a list, how many tensors a list has, and
  their slots.
- ``arithmetic``: an operation (:data:`ARITHMETIC`), two numbers (``size``: a tensor and a dimension), the int
  slot.
- ``view``: a kind (:data:`VIEWS`), the tensor, its numbers, the slot.
- ``block``: input, weight, bias, what is added to the convolution's map (by packed plans only), whether it is
  of signals (N, C, L), ``conv``, ``activation``, ``act``, ``pool`` and ``order`` as in
  :mod:`cnnlstm_fast.ops.conv_block`, pairs of (positions of a map, plan), the slot. The plan is that of the
  nearest number of positions.
- ``recurrent``: ``x``, ``keep``, ``reset``, ``lengths``, mode, ``batch_first``; layers one behind the other,
  of each ``h0``, ``c0``, a number that nodes of the same weights share, directions, the weights of each,
  whether these are packed in int8; the slot of ``out`` of the last layer, and of every layer those of ``h_n``
  and ``c_n``. Terms are those of
  :mod:`cnnlstm_fast.ops.recurrent`; states are multiplied by ``keep`` (T, B) before each step.
- ``sum``: a, b and t of ``a + t * b``, the slot.
- ``linear``: input, weight, bias, ``activation`` and ``act`` as in :mod:`cnnlstm_fast.ops.conv_block`, the
  slot. ``int8 linear``: the same, its weight packed in int8.

A number is ``0, value`` or ``1, int slot``. Lists begin with their length. -1 is no tensor.
"""

from __future__ import annotations

import torch

from cnnlstm_fast.ops import conv_block

VERSION = 3
KINDS = ("call", "arithmetic", "view", "block", "recurrent", "sum", "linear", "int8 linear")
ARGUMENTS = (
    "null", "tensor", "int", "float", "bool", "ints", "tensors", "string", "floats", "bools", "dtype",
    "layout", "device", "memory_format", "maybe_tensors",
)  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "max", "min", "size")
#: Those of :mod:`cnnlstm_fast.ops.conv_block`, and those on weights that a program packs.
BLOCK_PLANS = {**conv_block.PLANS, "packed": -1, "packed winograd": -2, "packed library": -3}
VIEWS = ("reshape", "permute", "select", "slice", "squeeze", "unsqueeze", "expand", "contiguous")

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define("program_new(int[] code, float[] floats, str[] names, Tensor[] constants) -> int")
_lib.define("program_free(int program) -> ()")
_lib.define("program_run(int program, Tensor[] inputs) -> Tensor[]")

new_op = torch.ops.cnnlstm_fast.program_new.default
free_op = torch.ops.cnnlstm_fast.program_free.default
run_op = torch.ops.cnnlstm_fast.program_run.default
