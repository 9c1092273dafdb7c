"""What the package may do on this machine, in the manner of ``torch.backends``.

:data:`allow_transforms` is read at every call, so it may be set at any time::

    cf.backends.allow_transforms = False

Example:
    >>> before, cf.backends.allow_transforms = cf.backends.allow_transforms, False
    >>> cf.functional.conv_block(torch.randn(1, 2, 9, 9), torch.randn(4, 2, 3, 3), plan="winograd")
    Traceback (most recent call last):
    ...
    ValueError: plan="winograd" cannot run here: cnnlstm_fast.backends.allow_transforms is False. ...
    >>> cf.backends.allow_transforms = before
"""

from __future__ import annotations

import os

__all__ = ["allow_transforms"]

#: Whether convolutions may be computed by transforms, which are the plans ``winograd`` and ``fft``. Over a
#: whole result their error against float64 is as small as PyTorch's. One element's error is that of the
#: largest values in its tile or window; docs/guarantees.md has the bounds. Where this is False, an element's
#: error is that of its own sum. CNNLSTM_FAST_ALLOW_TRANSFORMS=0 makes False the default.
allow_transforms: bool = os.environ.get("CNNLSTM_FAST_ALLOW_TRANSFORMS", "1") != "0"
