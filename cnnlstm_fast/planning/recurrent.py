"""Which plan runs an LSTM or GRU, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlstm_fast import _ext
from cnnlstm_fast.planning import capturing
from cnnlstm_fast.planning.support import library_differentiates, why_not_fused_recurrent

#: ``fused`` is our kernels, ``library`` PyTorch's own LSTM and GRU, ``reference`` the loop over steps.
RECURRENT_PLANS = ("auto", "fused", "library", "reference")

_LIBRARY_HAS_BFLOAT16 = _ext.loaded and torch.ops.cnnlstm_fast.library_has_bfloat16()
_LIBRARY_HAS_AMX = _ext.loaded and torch.ops.cnnlstm_fast.library_has_amx()
_WE_HAVE_BFLOAT16 = _ext.loaded and bool(torch.ops.cnnlstm_fast.bfloat16_unit())


def multiplies_bfloat16(projected: bool) -> bool:
    """Whether our CPU kernels multiply bfloat16 by a unit of the processor, with sums in float32.

    Elsewhere, and for projected layers, they widen bfloat16 and compute in float32.
    """
    return _WE_HAVE_BFLOAT16 and not projected


def choose_recurrent(
    plan: str,
    x: Tensor,
    params: Sequence[Tensor],
    *,
    plain: bool,
    gru_step: bool = False,
    onednn_dtype: torch.dtype | None = None,
) -> tuple[str, str]:
    """The plan for an LSTM or GRU: (its name, the reason in words).

    Args:
        plain: neither resets nor lengths are given; PyTorch's own layers take neither.
        gru_step: this is a GRU and a sequence of one step.
        onednn_dtype: the dtype in which PyTorch has oneDNN compute this layer; None if it does not, as where
            the input is packed, for projections, and for a GRU.

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
    if capturing.active():
        return "fused", "a frozen model packs its weights once"
    if x.device.type == "cuda" and plain:
        return "library", "cuDNN's kernels serve the plain case"
    if plain and gru_step and x.device.type == "cpu":
        return "library", "one step of a GRU: PyTorch's own operators are as fast"
    if plain and onednn_dtype == torch.bfloat16 and x.device.type == "cpu":
        if _LIBRARY_HAS_AMX:
            return "library", "oneDNN multiplies bfloat16 by AMX, which our kernels do not"
        if _LIBRARY_HAS_BFLOAT16 and not _WE_HAVE_BFLOAT16:
            return "library", "oneDNN multiplies bfloat16 by units of the processor, which our kernels do not"
    if plain:
        return "fused", "all steps in one call, gates kept in registers"
    return "fused", "resets and lengths are handled inside the kernels"
