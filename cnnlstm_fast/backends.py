"""What the package may do on this machine, in the manner of ``torch.backends``.

:data:`allow_transforms` is read at every call, so it may be set at any time::

    cnnlstm_fast.backends.allow_transforms = False
"""

from __future__ import annotations

import os

__all__ = ["allow_transforms"]

#: Whether convolutions may be computed by transforms: the plans ``winograd`` and ``fft``. Over a whole result
#: they are as near to float64 as PyTorch, but they round a quiet position as the loudest one in its tile or
#: window; docs/guarantees.md has the bounds. Where this is False, an element's error is that of its own sum.
#: CNNLSTM_FAST_ALLOW_TRANSFORMS=0 makes False the default.
allow_transforms: bool = os.environ.get("CNNLSTM_FAST_ALLOW_TRANSFORMS", "1") != "0"
