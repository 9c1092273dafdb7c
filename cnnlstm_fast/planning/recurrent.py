"""Which plan runs an LSTM or GRU, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cnnlstm_fast import _ext
from cnnlstm_fast.limits import limit
from cnnlstm_fast.planning import capturing, rates
from cnnlstm_fast.planning.support import library_differentiates, why_not_fused_recurrent

#: ``fused`` is our kernels, ``library`` PyTorch's own LSTM and GRU, ``reference`` the loop over steps.
RECURRENT_PLANS = ("auto", "fused", "library", "reference")

#: Constants, because a compiler cannot trace an op that answers with a bool.
_LIBRARY_HAS_AMX = rates.library_has_amx()
_LIBRARY_HAS_BFLOAT16 = _ext.loaded and torch.ops.cnnlstm_fast.library_has_bfloat16()
#: Our kernels' unit for products of bfloat16; empty if they have none.
_OUR_UNIT = torch.ops.cnnlstm_fast.bfloat16_unit() if _ext.loaded else ""

#: Steps of all sequences, and products of all layers, from which rounding float32 weights to bfloat16 costs
#: less than its products save.
_ROUNDING_ROWS, _ROUNDING_PRODUCTS = limit("ROUNDING_ROWS", 64, 0), limit("ROUNDING_PRODUCTS", 1 << 24, 0)
#: Elements of a GRU's weight that no cache holds, and the rows up to which packing it shows.
_LARGE_WEIGHT, _FEW_ROWS = 1 << 22, 128


def rounds_to_bfloat16(x: Tensor, params: Sequence[Tensor], projected: bool) -> bool:
    """Whether our CPU kernels are to compute a layer in bfloat16 under autocast.

    They multiply bfloat16 by a unit of the processor, with sums, state and gates in float32. Where there is
    none, and for projected layers, they would widen it again.
    """
    if not _OUR_UNIT or projected:
        return False
    if torch.compiler.is_compiling():  # sizes would become guards
        return True
    rows = x.numel() // x.shape[-1]
    return rows >= _ROUNDING_ROWS and rows * sum([p.numel() for p in params]) >= _ROUNDING_PRODUCTS


def why_library(
    x: Tensor, weight: Tensor, *, plain: bool, gru: bool, steps: int, onednn_dtype: torch.dtype | None
) -> str | None:
    """Why PyTorch's own layer is at least as fast on the CPU as ours, as a sentence; None if it is not.

    Args:
        weight: of the first layer's inputs.
        plain: neither resets nor lengths are given; PyTorch's own layers take neither.
        onednn_dtype: the dtype in which PyTorch has oneDNN compute this layer; None if it does not, as where
            the input is packed, for projections, and for a GRU.
    """
    if not plain or x.device.type != "cpu" or capturing.active():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    if gru and steps == 1:
        return "one step of a GRU: PyTorch's own operators are as fast"
    if gru and torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
        if weight.numel() > _LARGE_WEIGHT and x.numel() <= _FEW_ROWS * x.shape[-1]:
            return "few rows meet a weight that no cache holds, which PyTorch reads once less"
    if onednn_dtype == torch.bfloat16 and _LIBRARY_HAS_AMX and not _OUR_UNIT.endswith("amx"):
        return "oneDNN multiplies bfloat16 by AMX, which our kernels do not"
    if onednn_dtype == torch.bfloat16 and _LIBRARY_HAS_BFLOAT16 and not _OUR_UNIT:
        return "oneDNN multiplies bfloat16 by units of the processor, which our kernels do not"
    return None


def choose_recurrent(
    plan: str,
    x: Tensor,
    params: Sequence[Tensor],
    *,
    plain: bool,
) -> tuple[str, str]:
    """The plan for an LSTM or GRU: (its name, the reason in words).

    Args:
        plain: neither resets nor lengths are given; PyTorch's own layers take neither.

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
    if plain:
        return "fused", "all steps in one call, gates kept in registers"
    return "fused", "resets and lengths are handled inside the kernels"
