"""The tests marked ``instruction_sets``, of all files, once more for each set that this machine has."""

from pathlib import Path

import pytest
from helpers import needs_extension, repeat_with_instruction_set


@pytest.mark.first
@needs_extension
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """With the kernels of each instruction set, chosen as the library loads; in one process for all files."""
    here = Path(__file__)
    files = [
        str(p) for p in sorted(here.parent.glob("test_*.py")) if "mark.instruction_sets" in p.read_text()
    ]
    repeat_with_instruction_set(isa, "-k", "not reference", *(f for f in files if f != str(here)))
