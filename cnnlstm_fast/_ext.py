"""Load the compiled CPU kernels, or remember why they could not be loaded."""

from __future__ import annotations

import glob
import os

import torch

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
