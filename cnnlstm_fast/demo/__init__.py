"""The demo: the tutorial's three systems on real handwritten digits, reference and fast side by side."""

from cnnlstm_fast.demo.main import FULL, QUICK, Settings, run

__all__ = ["FULL", "QUICK", "Settings", "run"]
