"""What each plan costs on CUDA, in bytes: those that it moves, or those of equal time for its arithmetic."""

from __future__ import annotations

import torch

from cnnlstm_fast.planning.costs import MOST_TAPS_COMPUTED_AGAIN
from cnnlstm_fast.planning.problem import ConvProblem

#: Floating-point operations (two per multiply-add) of a data-centre GPU in the time of moving one byte.
_BALANCE = {"float32": 14.0, "tf32": 90.0, "half": 180.0}
#: Shares of that rate that the library's convolution and our own are assumed to reach. Ours gathers patches.
_LIBRARY_SHARE, _OWN_SHARE = 0.6, 0.2


def costs(problem: ConvProblem, tf32: bool) -> dict[str, tuple[float, float]]:
    """What each plan costs: ``{plan: (forward, backward)}``, in bytes.

    A kernel costs the larger of its bytes and its arithmetic.

    - ``chunked`` runs the library's convolution, and then one pass for the epilogue. Its backward runs one
      pass that unpools the gradient, and then the library's gradients.
    - With batch statistics, ``direct`` convolves once for the sums, once for the result and once in the
      backward, which ends with the library's gradients. ``chunked`` reads its map once more for the sums.
    - A norm with given statistics and a weight that needs a gradient adds a pass over the gradient. A folded
      norm adds nothing.
    """
    spec, dtype, norm, training = problem.spec, problem.dtype, problem.norm, problem.training
    size = dtype.itemsize
    taps, channels = problem.taps, problem.out_channels
    x_bytes = problem.batch * problem.channels * problem.height * problem.width * size
    map_size = problem.batch * channels * problem.conv[0] * problem.conv[1]
    out_size = problem.batch * channels * problem.pooled[0] * problem.pooled[1]
    map_bytes, out_bytes = map_size * size, out_size * size
    code_bytes = out_size if training else 0  # one byte at most
    balance = _BALANCE["tf32" if tf32 else "float32" if dtype == torch.float32 else "half"]

    def kernel(moved: float, multiplied: float, share: float) -> float:
        return max(moved, 2 * multiplied * taps / (balance * share))

    ways = 1 + problem.needs_x
    read = x_bytes * ways  # read for the weight's gradient, written for the input's
    direct = (
        kernel(x_bytes + out_bytes + code_bytes, out_size * spec.window, _OWN_SHARE),
        kernel(read + (out_bytes + code_bytes) * ways, map_size * ways, _OWN_SHARE),
    )
    chunked = (
        kernel(x_bytes + map_bytes, map_size, _LIBRARY_SHARE) + map_bytes + out_bytes + code_bytes,
        kernel(read + map_bytes * ways, map_size * ways, _LIBRARY_SHARE) + map_bytes + out_bytes + code_bytes,
    )
    kept = out_bytes if training and spec.pool else 0  # z at the argmax positions
    passed = 2 * out_bytes  # the gradient and z at the argmax positions, for the norm's own gradients
    if norm == "given":
        direct = direct[0] + kept, direct[1] + passed + out_bytes
        chunked = chunked[0] + kept, chunked[1] + passed + out_bytes
    if norm == "batch":
        stored = training and (not spec.pool or taps > MOST_TAPS_COMPUTED_AGAIN)
        epilogue = map_bytes + out_bytes + code_bytes + kept
        unpool = 2 * map_bytes + out_bytes + code_bytes
        gradients = passed + kernel(read + map_bytes * ways, map_size * ways, _LIBRARY_SHARE)
        library = kernel(x_bytes + map_bytes, map_size, _LIBRARY_SHARE)
        if stored:
            sums = kernel(x_bytes + map_bytes, map_size, _OWN_SHARE)
            direct = sums + epilogue, unpool + gradients
        else:
            sums = kernel(x_bytes, map_size, _OWN_SHARE)
            pooled_again = kernel(x_bytes + out_bytes + code_bytes + kept, out_size * spec.window, _OWN_SHARE)
            unpooled_again = kernel(x_bytes + out_bytes + code_bytes + map_bytes, map_size, _OWN_SHARE)
            direct = sums + pooled_again, unpooled_again + gradients
        chunked = (
            library + (1 + stored) * map_bytes + epilogue,
            (0 if stored else library) + unpool + gradients,
        )
    return {"direct": direct, "chunked": chunked}
