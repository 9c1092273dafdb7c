"""How the host functions of the kernels start them."""

from __future__ import annotations

from torch.library import wrap_triton


def launch(kernel, programs: int, args: dict, options: dict) -> None:
    """Start ``programs`` of a kernel on the current stream of the current device."""
    start = wrap_triton(kernel)
    if start is not kernel:  # traced: torch.compile knows no limit on registers
        options = {name: value for name, value in options.items() if name != "maxnreg"}
    start[(programs,)](**args, **options)
