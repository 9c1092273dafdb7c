"""Load the compiled CPU kernels, or remember why they could not be loaded."""

from __future__ import annotations

import glob
import os
import warnings

import torch

#: How the kernels are built in a checkout, by a Python that has torch, setuptools and a C++ compiler.
BUILD = "python setup.py build_ext --inplace"

#: Why the compiled kernels are missing; None when they are loaded.
error: str | None = None

_found = sorted(glob.glob(os.path.join(os.path.dirname(__file__), "_C*.so")))
if os.environ.get("CNNLSTM_FAST_NO_EXTENSION") == "1":
    error = "CNNLSTM_FAST_NO_EXTENSION=1 is set"
elif not _found:
    error = "cnnlstm_fast/_C.abi3.so has not been built"
else:
    try:
        torch.ops.load_library(_found[0])
    except OSError as e:
        error = f"{os.path.basename(_found[0])} does not load: {e}"

loaded = error is None

_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.environ.get("CNNLSTM_FAST_NO_EXTENSION") == "1":
    mend = "unset CNNLSTM_FAST_NO_EXTENSION"
elif os.path.isfile(os.path.join(_root, "setup.py")):
    mend = f"in {_root} run: {BUILD}"
else:
    mend = (
        "with torch, setuptools and a C++ compiler installed, run in a checkout: "
        "pip install --no-build-isolation --no-deps --force-reinstall ."
    )

_warned = os.environ.get("CNNLSTM_FAST_NO_EXTENSION") == "1"


def warn_if_missing() -> None:
    """Say once in a process that there are no kernels and how to get them, unless they were forbidden."""
    global _warned
    if loaded or _warned or torch.compiler.is_compiling():
        return
    _warned = True
    warnings.warn(
        f"cnnlstm_fast has no compiled CPU kernels ({error}), so CPU tensors run PyTorch's own operators, no "
        f"faster than without it. To get them: {mend}",
        stacklevel=2,
    )
