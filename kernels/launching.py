"""How the host functions of the kernels start them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.library import wrap_triton

from cnnlstm_fast.kernels import tuning
from cnnlstm_fast.kernels.tuning import Choice


def launch(kernel, programs: int, args: dict, options: dict, others: Sequence[Choice] = ()) -> None:
    """Start ``programs`` of a kernel on the current stream of the current device.

    ``others`` give the same bits with other tiles or options; on a CUDA device the fastest runs.
    """
    start = wrap_triton(kernel)
    if start is not kernel:  # traced: torch.compile knows no limit on registers
        options = {name: value for name, value in options.items() if name != "maxnreg"}
        start[(programs,)](**args, **options)
        return

    def run(choice: Choice) -> None:
        kernel[(choice.programs,)](**args | choice.tiles, **choice.options)

    chosen = Choice(programs, {}, options)
    if others and next(t for t in args.values() if isinstance(t, Tensor)).is_cuda:
        chosen = tuning.choose(kernel, args, [chosen, *others], run)
    run(chosen)
