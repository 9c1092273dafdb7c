"""What a plan costs on CUDA, in bytes moved or the arithmetic of as many."""

from __future__ import annotations

import torch

from cnnlstm_fast.planning.costs import MOST_TAPS_COMPUTED_AGAIN
from cnnlstm_fast.planning.problem import ConvProblem

#: Multiply-adds, times two, that a data-centre GPU of today does while it moves one byte.
_BALANCE = {"float32": 14.0, "tf32": 90.0, "half": 180.0}
#: Shares of that rate which the library's convolution and our own, which gathers its patches, are taken
#: to reach until devices have filled in their own.
_LIBRARY_SHARE, _OWN_SHARE = 0.6, 0.2


def costs(problem: ConvProblem, tf32: bool) -> dict[str, tuple[float, float]]:
    """What each plan costs on CUDA: {plan: (forward, backward)}, in bytes moved or the arithmetic of as many.

    A kernel takes the longer of its two. ``chunked`` runs the convolution's kernels and then the epilogue;
    backward it unpools the gradient and then runs the convolution's kernels.

    Under a norm by the batch's statistics ``direct`` convolves once for the sums, once for the result and
    once for the gradient, whose convolution is the library's. ``chunked`` reads the convolution's output
    once more for the sums. A norm by given statistics that trains adds a pass over the gradient; one that
    is folded adds nothing.
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
    read = x_bytes * ways  # by the weight's gradient, written by the input's
    direct = (
        kernel(x_bytes + out_bytes + code_bytes, out_size * spec.window, _OWN_SHARE),
        kernel(read + (out_bytes + code_bytes) * ways, map_size * ways, _OWN_SHARE),
    )
    chunked = (
        kernel(x_bytes + map_bytes, map_size, _LIBRARY_SHARE) + map_bytes + out_bytes + code_bytes,
        kernel(read + map_bytes * ways, map_size * ways, _LIBRARY_SHARE) + map_bytes + out_bytes + code_bytes,
    )
    kept = out_bytes if training and spec.pool else 0  # z at the argmax
    passed = 2 * out_bytes  # the gradient and z at the argmax, for the norm's own gradients
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
            unpool_again = kernel(x_bytes + out_bytes + code_bytes + map_bytes, map_size, _OWN_SHARE)
            direct = sums + pooled_again, unpool_again + gradients
        convolved_again = 0 if stored else library
        chunked = library + (1 + stored) * map_bytes + epilogue, convolved_again + unpool + gradients
    return {"direct": direct, "chunked": chunked}
