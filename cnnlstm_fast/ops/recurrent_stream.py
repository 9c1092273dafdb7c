"""The ops of a recurrent stream: weights packed once, then one step of all layers per call. CPU only.

Schema terms as in :mod:`cnnlstm_fast.ops.recurrent`; ``L`` layers, one direction, everything float32:

- ``recurrent_stream_pack`` packs one layer for the instruction set in use; the layers' packs in a row
  are ``packed``.
- ``h`` (L, 2, B, padded P) holds the states before and after a step: step 0 reads the first and writes the
  second, step 1 the other way round. ``c`` (L, B, padded H), empty for a GRU. Padding is to a multiple of
  :data:`cnnlstm_fast.ops.recurrent.UNIT_GROUP`, and zero at first.
- ``reset``: bool (B,), where the state is zero before this step.
- ``step``: how many steps were done before; only its last bit counts.
"""

from __future__ import annotations

import torch

_lib = torch.library.Library("cnnlstm_fast", "FRAGMENT")
_lib.define(
    "recurrent_stream_pack(Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, int mode) "
    "-> Tensor"
)
_lib.define(
    "recurrent_stream_step(Tensor x, Tensor(a!) h, Tensor(b!) c, Tensor packed, Tensor? reset, int mode, "
    "int hidden, int width, int step) -> Tensor"
)

pack_op = torch.ops.cnnlstm_fast.recurrent_stream_pack.default
step_op = torch.ops.cnnlstm_fast.recurrent_stream_step.default


@torch.library.register_fake("cnnlstm_fast::recurrent_stream_step", lib=_lib)
def _(x, h, c, packed, reset, mode, hidden, width, step):
    return x.new_empty(x.shape[0], width)
