"""What the demo found: a table for people, JSON for machines."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy
import sklearn
import torch
from rich.table import Table

from cnnlstm_fast import doctor
from cnnlstm_fast.demo.measure import Comparison


@dataclass
class SystemReport:
    """One system: loss per training step and test accuracy of both sides, and what was measured."""

    name: str
    curves: dict[str, list[float]]
    accuracy: dict[str, float]
    step_ms: Comparison
    kept_features: Comparison
    kept_model: Comparison
    features_ms: Comparison
    inference_ms: Comparison

    @property
    def loss_difference(self) -> float:
        """The largest difference of the two loss curves over the training."""
        return max(abs(r - f) for r, f in zip(self.curves["reference"], self.curves["fast"], strict=True))

    @property
    def measures(self) -> list[tuple[str, Comparison]]:
        """Everything of which less is better, in the words of table and plot."""
        return [
            ("training step, ms", self.step_ms),
            ("inference, features stage, ms", self.features_ms),
            ("inference, whole model, ms", self.inference_ms),
            ("kept for backward, features stage, MiB", _mebibytes(self.kept_features)),
            ("kept for backward, whole model, MiB", _mebibytes(self.kept_model)),
        ]


def _mebibytes(c: Comparison) -> Comparison:
    return Comparison(c.reference / 2**20, c.fast / 2**20, c.ratio)


@dataclass
class Report:
    """A run of the demo: where, when, with what, and one :class:`SystemReport` per system."""

    date: str
    device: str
    threads: int
    kernels: str
    versions: dict[str, str]
    settings: dict[str, int]
    seconds: float = 0.0
    systems: list[SystemReport] = field(default_factory=list)

    @classmethod
    def begin(cls, settings, device: torch.device, seed: int) -> Report:
        return cls(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
            threads=torch.get_num_threads(),
            kernels=doctor.report()["Triton" if device.type == "cuda" else "instruction set"].value,
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "scikit-learn": sklearn.__version__,
                "numpy": numpy.__version__,
            },
            settings={**asdict(settings), "seed": seed},
        )

    def write(self, path: Path) -> None:
        """Write everything as JSON, the loss of every step included; bytes and milliseconds."""
        values = asdict(self)
        for system, record in zip(self.systems, values["systems"], strict=True):
            record["loss_difference"] = system.loss_difference
        path.write_text(json.dumps(values, indent=1) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}"


def table(report: Report) -> Table:
    """All systems under each other; ratios say how many times less the fast side needs."""
    out = Table(
        title=f"Handwritten digits, reference (PyTorch) and fast, on {report.device}",
        caption=f"Trained in {report.settings['steps']} steps, the same batches in turn; measured at batch "
        f"{report.settings['batch']}, {report.threads} threads, medians; {report.seconds:.0f} s in all.",
    )
    out.add_column("")
    for name in ("reference", "fast", "ratio"):
        out.add_column(name, justify="right")
    for s in report.systems:
        out.add_row(f"[bold]{s.name}[/]")
        out.add_row("test accuracy", *(f"{100 * s.accuracy[side]:.1f} %" for side in ("reference", "fast")))
        out.add_row("largest difference of the loss curves", "", f"{s.loss_difference:.1g}")
        for name, c in s.measures:
            out.add_row(name, _short(c.reference), _short(c.fast), f"[bold]{c.ratio:.1f}x[/]")
        out.add_section()
    return out


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
