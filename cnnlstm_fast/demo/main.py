"""Train and measure the three systems, reference and fast from the same weights on the same batches."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from cnnlstm_fast import measure, models, reference
from cnnlstm_fast.demo import data
from cnnlstm_fast.demo.denormals import are_flushed, aside
from cnnlstm_fast.demo.plot import draw
from cnnlstm_fast.demo.report import Report, SystemReport, table
from cnnlstm_fast.demo.training import Learner, Model, accuracy, initialise, nudge, scores

HIDDEN, LAYERS = 128, 2


@dataclass(frozen=True)
class System:
    """One of the tutorial's models, what it is shown, and how many steps its LSTM makes."""

    name: str
    inputs: Callable[[Tensor, torch.Generator], Tensor]
    lstm_steps: int

    def build(self, family) -> Model:
        return getattr(family, self.name)(data.CHANNELS, HIDDEN, LAYERS, data.CLASSES)


LOCATIONS = (data.CANVAS // 2) ** 2
SYSTEMS = (
    System("CNN_LSTM_Simple", lambda scans, _: data.images(scans), LOCATIONS),
    System("CNN_LSTM_1DConv", lambda scans, _: data.images(scans), LOCATIONS),
    System("CNN_LSTM_TimeDistributed", data.clips, data.FRAMES),
)


@dataclass(frozen=True)
class Settings:
    """How much to do: training steps at ``train_batch``, and rounds of each measurement at ``batch``.

    Attributes:
        nudged_steps: of the training that shows what rounding alone does.
        unflushed_steps: of the reference's training with denormals as they come.
    """

    steps: int
    rounds: int
    batch: int
    train_batch: int = 32
    nudged_steps: int = 30
    unflushed_steps: int = 3


FULL = Settings(steps=120, rounds=5, batch=128)
QUICK = Settings(steps=10, rounds=2, batch=32)


def run(output: Path, settings: Settings = FULL, console: Console | None = None, seed: int = 0) -> Report:
    """Run the demo: progress and a table on ``console``, ``demo.json`` and ``demo.png`` in ``output``.

    On the GPU where there is one. Both sides train and are measured with denormal numbers flushed; a few
    steps of the reference's training are timed without that too.
    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stopped = threading.Event()
    report = Report.begin(settings, device, seed, aside(are_flushed, stopped, flush=True))
    begin = time.perf_counter()
    # All work is done aside, for a second crew of threads would be in the way of what is measured.
    train, test = aside(lambda: data.load(seed), stopped, flush=True)
    progress = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
        console=console,
    )
    with progress:
        tasks = [
            progress.add_task(s.name, start=False, doing="", total=settings.steps + 3 * settings.rounds)
            for s in SYSTEMS
        ]
        for system, task in zip(SYSTEMS, tasks, strict=True):
            progress.start_task(task)

            def tell(doing: str, task=task) -> None:
                if stopped.is_set():
                    raise RuntimeError("the demo was stopped")
                progress.update(task, advance=1, doing=doing)

            def work(system=system, tell=tell) -> SystemReport:
                return compare(system, train, test, settings, device, seed, tell)

            def unflushed(system=system) -> float:
                return unflushed_epoch_s(system, train, settings, device, seed)

            found = aside(work, stopped, flush=True)
            found.epoch_s["as it comes"] = aside(unflushed, stopped, flush=False)
            report.systems.append(found)
            if not console.is_terminal:  # there, bars show only at the end
                console.print(f"{system.name}: done after {time.perf_counter() - begin:.0f} s")
    report.seconds = time.perf_counter() - begin
    report.write(output / "demo.json")
    draw(report, output / "demo.png")
    console.print(table(report))
    console.print(f"written: {output / 'demo.png'}, {output / 'demo.json'}")
    return report


def compare(
    system: System,
    train: data.Digits,
    test: data.Digits,
    settings: Settings,
    device: torch.device,
    seed: int,
    tell: Callable[[str], None],
) -> SystemReport:
    """Train and measure one system; ``tell`` hears of every training step and measured round.

    Beside the two sides trains the reference once more for a while, from weights that differ in their last
    bit: it shows how far apart rounding alone drives two trainings.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = _untrained(system, device, seed)
    fast = copy_to(system.build(models), plain)
    nudged = copy_to(system.build(reference), plain)
    nudge(nudged)

    sides = {"reference": plain, "fast": fast, "nudged": nudged}
    learners = {name: Learner(model, settings.steps) for name, model in sides.items()}
    curves: dict[str, list[float]] = {name: [] for name in learners}
    batches = _batches(system, train, settings.train_batch, generator, device)
    times: dict[str, list[float]] = {name: [] for name in learners}
    for step in range(settings.steps):
        if step == settings.nudged_steps:
            del learners["nudged"]
        x, y = next(batches)
        for name, learner in learners.items():
            begin = time.perf_counter()
            curves[name].append(learner.step(x, y))
            times[name].append(time.perf_counter() - begin)
        tell(f"training, loss {curves['reference'][-1]:.3f} and {curves['fast'][-1]:.3f}")

    x, y = system.inputs(test.scans, generator).to(device), test.labels.to(device)
    plain_scores, fast_scores = scores(plain, x), scores(fast, x)
    same_weights_scores = scores(copy_to(system.build(models), plain), x)

    batches = _batches(system, train, settings.batch, generator, device)

    def rounds(doing: str) -> Iterator[tuple[Tensor, Tensor]]:
        yield next(batches)
        for _ in range(settings.rounds):
            yield next(batches)
            tell(f"measuring {doing}")

    def inference(before: Callable[..., Tensor], after: Callable[..., Tensor]) -> measure.Comparison:
        plain_run, fast_run = map(torch.inference_mode(), (before, after))
        return measure.compare_ms(plain_run, fast_run, ((x,) for x, _ in rounds("inference")))

    x, _ = next(batches)
    parameters = [*plain.parameters(), *fast.parameters()]
    return SystemReport(
        name=system.name,
        curves=curves,
        accuracy={"reference": accuracy(plain_scores, y), "fast": accuracy(fast_scores, y)},
        score_difference=(same_weights_scores - plain_scores).abs().max().item(),
        step_ms=measure.compare_ms(learners["reference"].step, learners["fast"].step, rounds("training")),
        features_ms=inference(plain.features, fast.features),
        inference_ms=inference(plain.forward, fast.forward),
        kept_features=measure.compare_kept(plain.features, fast.features, x, parameters),
        kept_model=measure.compare_kept(plain, fast, x, parameters),
        epoch_s={name: _epoch_s(times[name], train, settings) for name in ("reference", "fast")},
    )


def unflushed_epoch_s(
    system: System, train: data.Digits, settings: Settings, device: torch.device, seed: int
) -> float:
    """Seconds that the reference takes for all training scans with denormals as they come.

    Extrapolated from its first steps, the very first of which only warms up.
    """
    generator = torch.Generator().manual_seed(seed)
    learner = Learner(_untrained(system, device, seed), settings.steps)
    batches, times = _batches(system, train, settings.train_batch, generator, device), []
    for _ in range(1 + settings.unflushed_steps):
        x, y = next(batches)
        begin = time.perf_counter()
        learner.step(x, y)
        times.append(time.perf_counter() - begin)
    return _epoch_s(times[1:], train, settings)


def _epoch_s(times: list[float], train: data.Digits, settings: Settings) -> float:
    """Seconds for all training scans, by the median step."""
    return statistics.median(times) * len(train) / settings.train_batch


def _untrained(system: System, device: torch.device, seed: int) -> Model:
    """The reference with the weights that training begins with."""
    torch.manual_seed(seed)
    model = system.build(reference).to(device)
    initialise(model, system.lstm_steps)
    return model


def copy_to(model: Model, source: nn.Module) -> Model:
    """``model`` with the weights of ``source``, on its device."""
    model.load_state_dict(source.state_dict())
    return model.to(next(source.parameters()).device)


def _batches(
    system: System, digits: data.Digits, size: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches on ``device``, every scan once per pass."""
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < size:
            order = torch.randperm(len(digits), generator=generator)
        chosen, order = order[:size], order[size:]
        yield system.inputs(digits.scans[chosen], generator).to(device), digits.labels[chosen].to(device)
