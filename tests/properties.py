"""The long mode of test_properties.py: ``python tests/properties.py --cases 20000 --output FILE``.

Runs the properties in a process of its own for every instruction set of this machine, with as many cases
each that all together are at least ``--cases``, and writes what ran, how long, with which seed and with what
outcome. Repeat with CNNLSTM_FAST_SEED.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import cnnlstm_fast  # noqa: F401  (the ops)

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("baseline", "avx2", "avx512")
PROPERTIES = 6


def run(isa: str, cases: int, seed: int) -> dict:
    """All properties under one instruction set, ``cases`` of each."""
    with tempfile.TemporaryDirectory() as folder:
        counted = Path(folder) / "counts.json"
        env = os.environ | {
            "CNNLSTM_FAST_ISA": isa, "CNNLSTM_FAST_CASES": str(cases), "CNNLSTM_FAST_SEED": str(seed),
            "CNNLSTM_FAST_CASES_FILE": str(counted), "MALLOC_PERTURB_": "128",
        }  # fmt: skip
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
                   "tests/test_properties.py"]  # fmt: skip
        ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if ran.returncode:
            print(ran.stdout[-8000:], ran.stderr[-2000:], file=sys.stderr)
        counts = json.loads(counted.read_text()) if counted.exists() else {}
    return {
        "instruction set": isa, "passed": ran.returncode == 0, "seconds": round(time.monotonic() - start),
        "cases": sum(counts.values()), "of": dict(sorted(counts.items())),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "properties.json")
    asked = parser.parse_args()
    best = ISAS.index(torch.ops.cnnlstm_fast.isa())
    each = -(-asked.cases // (PROPERTIES * (best + 1)))
    runs: list[dict] = []
    # Rounds, since some drawn cases are discarded and count for nothing.
    rounds = 0
    while sum(r["cases"] for r in runs) < asked.cases and all(r["passed"] for r in runs) and rounds < 5:
        for isa in ISAS[: best + 1]:
            runs.append(run(isa, each, asked.seed + rounds))
            print(json.dumps(runs[-1]), flush=True)
        rounds += 1
        missing = asked.cases - sum(r["cases"] for r in runs)
        each = max(10, -(-missing // (PROPERTIES * (best + 1))))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "cases": sum(r["cases"] for r in runs), "passed": all(r["passed"] for r in runs), "seed": asked.seed,
        "limits at their least": os.environ.get("CNNLSTM_FAST_LEAST") == "1",
        "torch": torch.__version__, "python": platform.python_version(), "runs": runs,
    }  # fmt: skip
    asked.output.write_text(json.dumps(found, indent=1) + "\n")
    return not found["passed"]


if __name__ == "__main__":
    sys.exit(main())
