"""The ops of convolutions whose weights are packed once, for inference. CPU and float32 only.

``layout(max_pool(activation(conv(x) + bias + added)))`` on weights that stand still. Schema terms are those
of :mod:`cnnlstm_fast.ops.conv_block`, with these of its own:

- ``frozen_conv_pack`` lays out weight and bias for the instruction set in use. ``conv``, ``pool`` and the
  orders are those of every later ``frozen_conv``. Only the kernels read ``packed``.
- ``size``: the weight's, (C_out, C / groups, kh, kw).
- ``added``: of the size of the convolution's map, or None.
- ``in_order``, ``out_order``: the axes of (N, C, H, W) from the outermost in memory to the innermost. ``x``
  may have any strides; it is fastest where it lies as ``in_order`` says. The result's dimensions are in
  ``out_order``.
- ``method``: 0 what promises to be fastest, 1 direct, 2 Winograd's, where it serves.

In C++ the class ``FrozenConv`` (``csrc/frozen_conv.h``) is what a program calls.
"""

from __future__ import annotations

import torch

from cnnlstm_fast.spec import map_size, pool_size, raw_shape

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    "frozen_conv_pack(Tensor weight, Tensor? bias, int[] conv, int[] pool, int[] in_order, int[] out_order) "
    "-> Tensor"
)
_lib.define(
    "frozen_conv(Tensor x, Tensor packed, Tensor? added, int[] size, int[] conv, int activation, "
    "float[] act, int[] pool, int[] in_order, int[] out_order, int method=0) -> Tensor"
)

pack_op = torch.ops.cnnlstm_fast.frozen_conv_pack.default
op = torch.ops.cnnlstm_fast.frozen_conv.default


@torch.library.register_fake("cnnlstm_fast::frozen_conv", lib=_lib)
def _(x, packed, added, size, conv, activation, act, pool, in_order, out_order, method=0):
    out_size = pool_size(map_size(x.shape[2:], size[2:], conv), pool)
    return x.new_empty(raw_shape(out_order, x.shape[0], size[0], out_size))
