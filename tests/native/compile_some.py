"""Compile some of the Triton kernels' variants: ``python tests/native/compile_some.py``.

A twentieth of the cases and dtypes, each for one architecture: which ones, CNNLSTM_FAST_SEED decides; each
architecture gets as many. ``python -m cnnlstm_fast doctor --compile-kernels`` compiles all for all of them,
which takes minutes.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace

from cnnlstm_fast.kernels import aot


def main() -> int:
    seed = os.environ.get("CNNLSTM_FAST_SEED") or str(random.SystemRandom().randrange(10**9))
    cases = [replace(case, dtypes=(dtype,)) for case in aot.CASES for dtype in case.dtypes]
    random.Random(f"{seed} compile").shuffle(cases)
    cases = cases[::20]
    archs = aot.ARCHITECTURES
    print(f"CNNLSTM_FAST_SEED={seed}: {len(cases)} cases and dtypes for one architecture each")
    records = [r for i, a in enumerate(archs) for r in aot.compile_all(cases[i :: len(archs)], [a])]
    spilled = [record for record in records if record.spills]
    print(f"{len(records)} kernels compiled", *spilled, sep="\n")
    return bool(spilled)


if __name__ == "__main__":
    sys.exit(main())
