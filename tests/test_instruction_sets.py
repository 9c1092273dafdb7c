"""The tests marked ``instruction_sets``, of all files, once more for each other set that this machine has."""

from pathlib import Path

import pytest
import torch
from helpers import needs_extension, repeat_with_instruction_set

from cnnlstm_fast import _ext

#: The set with which all tests run.
OWN = torch.ops.cnnlstm_fast.isa() if _ext.loaded else "baseline"


@pytest.mark.first
@needs_extension
@pytest.mark.parametrize("isa", sorted({"baseline", "avx2", "avx512"} - {OWN}))
def test_every_instruction_set(isa):
    """With the kernels of each instruction set, chosen as the library loads; in one process for all files."""
    here = Path(__file__)
    files = [
        str(p) for p in sorted(here.parent.glob("test_*.py")) if "mark.instruction_sets" in p.read_text()
    ]
    repeat_with_instruction_set(isa, "-k", "not reference", *(f for f in files if f != str(here)))
