"""The library built here under other versions: ``python tests/native/versions.py PYTHON... [--output FILE]``.

Each PYTHON is an interpreter with some torch, numpy, pytest and hypothesis. The package's Python files and
its one compiled library, nothing rebuilt, go into a folder of their own, and tests run from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "layouts", "models", "fusion_match", "sequential", "time_distributed", "to_sequence", "compiled_modules",
    "properties", "memory", "ecosystem",
)  # fmt: skip
# What belongs to the compilers and exporters of one version of torch, not to the library.
LEFT_OUT = (
    "compile or reduce_overhead or inductor or onnx or export or script or opcheck or every_instruction_set "
    "or graph_break"
)
ASK = "import platform, torch; print(platform.python_version(), torch.__version__)"


def check(python: str, checkpoints: str) -> dict:
    """Load the library and run the tests under one interpreter.

    ``checkpoints`` is a folder for those that one version saves and the next one loads.
    """
    asked = subprocess.run([python, "-c", ASK], capture_output=True, text=True)
    if asked.returncode:
        return {"python": python, "passed": False, "said": asked.stderr[-500:]}
    version, torch = asked.stdout.split()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        for name in ("cnnlstm_fast", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, site / name, ignore=ignore)
        shutil.copytree(
            ROOT / "kernels", site / "cnnlstm_fast" / "kernels", ignore=ignore, dirs_exist_ok=True
        )
        shutil.copy(ROOT / "pyproject.toml", site)
        loads = "import torch, cnnlstm_fast._ext as e; print(e.error or torch.ops.cnnlstm_fast.isa())"
        env = os.environ | {"PYTHONPATH": folder, "CNNLSTM_FAST_CHECKPOINTS": checkpoints}
        loaded = subprocess.run([python, "-c", loads], cwd=site, env=env, capture_output=True, text=True)
        ran = subprocess.run(
            [python, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})",
             *(f"tests/test_{of}.py" for of in TESTS)],
            cwd=site, env=env, capture_output=True, text=True,
        )  # fmt: skip
    lines = ran.stdout.strip().splitlines() or [ran.stderr[-500:]]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    return {
        "python": version, "torch": torch, "library": loaded.stdout.strip() or loaded.stderr[-500:],
        "passed": ran.returncode == 0, "said": lines[-1], "failed": failed,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pythons", nargs="+")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as checkpoints:
        for python in asked.pythons:
            found.append(check(python, checkpoints))
            print(json.dumps(found[-1]), flush=True)
    if asked.output:
        asked.output.write_text(json.dumps(found, indent=1) + "\n")
    return not all(f["passed"] for f in found)


if __name__ == "__main__":
    sys.exit(main())
