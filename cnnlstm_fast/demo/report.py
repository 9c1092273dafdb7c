"""What the demo found: a table for people, JSON for machines."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path

import numpy
import sklearn
import torch
from rich.table import Table

from cnnlstm_fast import doctor
from cnnlstm_fast.measure import Comparison


@dataclass
class SystemReport:
    """One system.

    Attributes:
        name: the model's class.
        curves: loss per training step of ``reference``, ``fast`` and ``nudged`` (the reference from
            weights that differ in their last bit).
        accuracy: on the test scans, of ``reference`` and ``fast``.
        score_difference: largest difference of the test scores once both have the reference's trained
            weights.
        step_ms, features_ms, inference_ms: a training step, and inference of features stage and whole
            model.
        kept_features, kept_model: bytes kept for backward.
        epoch_s: seconds of training on all scans once, by the median step, of ``reference`` and ``fast``; and
            of the reference ``as it comes``, from a few steps in which denormals were not flushed.
    """

    name: str
    curves: dict[str, list[float]]
    accuracy: dict[str, float]
    score_difference: float
    step_ms: Comparison
    features_ms: Comparison
    inference_ms: Comparison
    kept_features: Comparison
    kept_model: Comparison
    epoch_s: dict[str, float] = field(default_factory=dict)

    @property
    def compared_steps(self) -> int:
        """How many steps all sides have trained."""
        return min(map(len, self.curves.values()))

    def loss_difference(self, side: str) -> float:
        """The largest difference of a side's loss curve from the reference's over those steps."""
        pairs = zip(self.curves["reference"], self.curves[side], strict=False)
        return max(abs(a - b) for a, b in islice(pairs, self.compared_steps))

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
    """A run of the demo: where, when, with what, and one :class:`SystemReport` per system.

    Attributes:
        denormals_flushed: on both sides, in everything but ``as it comes``.
    """

    date: str
    device: str
    threads: int
    kernels: str
    versions: dict[str, str]
    settings: dict[str, int]
    seconds: float = 0.0
    denormals_flushed: bool = False
    systems: list[SystemReport] = field(default_factory=list)

    @classmethod
    def begin(cls, settings, device: torch.device, seed: int, denormals_flushed: bool) -> Report:
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
            denormals_flushed=denormals_flushed,
        )

    def write(self, path: Path) -> None:
        """Write everything as JSON, the loss of every step included; bytes and milliseconds."""
        values = asdict(self)
        for system, record in zip(self.systems, values["systems"], strict=True):
            record["loss_difference"] = {side: system.loss_difference(side) for side in ("fast", "nudged")}
        path.write_text(json.dumps(values, indent=1) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(report: Report) -> Table:
    """All systems under each other; ratios say how many times less the fast side needs."""
    compared = min(s.compared_steps for s in report.systems)
    flushed = f"With denormal numbers {'' if report.denormals_flushed else 'not '}flushed, by the median step"
    out = Table(
        title=f"Handwritten digits, reference (PyTorch) and fast, on {report.device}",
        caption="* Per batch, from the reference's. Left: PyTorch against itself, started from weights that "
        f"differ in their last bit: so far does rounding alone drive {compared} steps of training.\n"
        f"** {flushed}; as they come, by {report.settings['unflushed_steps']} steps.\n"
        f"{report.settings['steps']} steps on the same batches of {report.settings['train_batch']}; the rest "
        f"measured in turn at batch {report.settings['batch']}, {report.threads} threads, medians; "
        f"{report.seconds:.0f} s in all.",
    )
    out.add_column("")
    for name in ("reference", "fast", "ratio"):
        out.add_column(name, justify="right")
    for s in report.systems:
        out.add_row(f"[bold]{s.name}[/]")
        out.add_row("test accuracy", *(f"{100 * s.accuracy[side]:.1f} %" for side in ("reference", "fast")))
        out.add_row("scores of the same trained weights differ by", "", f"{s.score_difference:.0e}")
        out.add_row(
            "loss curves differ by at most*",
            *(f"{s.loss_difference(side):.2g}" for side in ("nudged", "fast")),
        )
        plain, fast, unflushed = (s.epoch_s[side] for side in ("reference", "fast", "as it comes"))
        ratio = f"[bold]{plain / fast:.1f}x[/]"
        out.add_row("training on all scans once, s**", _short(plain), _short(fast), ratio)
        out.add_row("the same, denormal numbers as they come, s**", _short(unflushed))
        for name, c in s.measures:
            out.add_row(name, _short(c.reference), _short(c.fast), f"[bold]{c.ratio:.1f}x[/]")
        out.add_section()
    return out


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
