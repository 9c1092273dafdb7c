"""``python -m cnnlstm_fast demo | bench | explain | profile | freeze | doctor``.

Exit codes: 0 done; 1 it failed, or something is missing, and the text says how to mend it; 2 the
command line itself is wrong.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from functools import reduce
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fast CNN-to-RNN models in PyTorch.",
    epilog="Exits with 0 when done, 1 when something failed or is missing, 2 for a wrong command line.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A model, or what makes one: a name in a module or in a Python file, with literal arguments "
        "where it needs any, as in 'cnnlstm_fast:CNN_LSTM_Simple(3, 128, 2, 10)' or 'my/models.py:make'.",
    ),
]
Inputs = Annotated[
    list[str],
    typer.Option("--input", help="Size of a random float input, as in 8x3x28x28; once per argument."),
]
Device = Annotated[str, typer.Option(help="Where to run it.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for demo.png and demo.json.")] = Path(
        "demo_output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that it runs; nothing is learned.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the three systems on real handwritten digits, reference and fast, and compare them.

    Ends in under 5 minutes on 2 cores and uses the GPU where there is one. Prints a table and writes a
    picture of the loss curves and ratios.
    """
    try:
        from cnnlstm_fast.demo import FULL, QUICK, run
    except ModuleNotFoundError as error:
        _needs(error, {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}, "the demo")
    run(output, QUICK if quick else FULL, Console(stderr=True) if as_json else _console())
    if as_json:
        typer.echo((output / "demo.json").read_text())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(context: typer.Context) -> None:
    """Measure this machine against the peers: `python -m benchmarks` of a checkout, and its arguments."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        _fail(
            "the benchmarks are part of the repository, not of the installed package: clone it, and run "
            "this from the clone"
        )
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *(context.args or ["run", "--quick"])]
    raise typer.Exit(subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode)


@app.command()
def explain(
    model: Model,
    inputs: Inputs,
    device: Device = "cpu",
    fast: Annotated[
        bool, typer.Option("--fast", help="Explain cf.accelerate(model) instead of the model as it is.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a model and show shape, layout, plan, reason, time and memory of every stage.

    The model runs in inference. Exits with 1 if it raises; the table then ends where it did, and says
    what to change.
    """
    import torch

    import cnnlstm_fast as cf

    with _waiting("running the model"), torch.no_grad():
        made, xs = _model_and_inputs(model, inputs, device)
        with _in_words(model):
            report = cf.explain(cf.accelerate(made.eval()) if fast else made.eval(), *xs)
    typer.echo(json.dumps(asdict(report), indent=1) if as_json else str(report))
    if report.error is not None:
        raise typer.Exit(1)


@app.command()
def profile(
    model: Model,
    inputs: Inputs,
    device: Device = "cpu",
    training: Annotated[
        bool, typer.Option("--training", help="Forward and backward instead of inference.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 10,
    trace: Annotated[Path, typer.Option(dir_okay=False, help="Where to write the Chrome trace.")] = Path(
        "trace.json"
    ),
    as_json: Json = False,
) -> None:
    """Profile a model as it is and accelerated: a table of stages and operators, and a Chrome trace.

    The model's own code stays as it is. In the trace (open it in chrome://tracing or Perfetto), the
    ranges are called after the model's parts, and this package's operators begin with cnnlstm_fast::.
    Exits with 1 if the model raises.
    """
    from cnnlstm_fast import accelerate
    from cnnlstm_fast.profiling import profile_models

    with _waiting("loading the model"):
        made, xs = _model_and_inputs(model, inputs, device)
        with _in_words(model):
            made.train(training)
            fast = accelerate(made)
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.touch()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {trace}: {error.strerror}", param_hint="--trace") from None
    with _progress() as progress, _in_words(model, "'explain' shows at which stage"):
        task = progress.add_task("", total=3 * rounds + 6)
        found = profile_models(
            made, fast, xs, training=training, rounds=rounds, trace=trace,
            tell=lambda what: progress.update(task, description=what, advance=1),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        _console().print(_stage_table(found), _operator_table(found))
        typer.echo(f"written: {trace}")


class Precision(str, Enum):
    """What a frozen model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


def _difference(expected: Any, found: Any) -> float:
    """The norm of the difference of two results' floating tensors, over that of the first."""
    import torch
    from torch.utils import _pytree as pytree

    pairs = [
        (a.double(), b.double())
        for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    norm = sum(a.square().sum().item() for a, _ in pairs) ** 0.5
    return sum((a - b).square().sum().item() for a, b in pairs) ** 0.5 / (norm or 1.0)


@app.command()
def freeze(
    model: Model,
    inputs: Inputs,
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help="Where to write the frozen model.")
    ] = Path("model.cf"),
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each side.")] = 50,
    dtype: Annotated[
        Precision, typer.Option(help="What the frozen model computes in; int8: linear and recurrent layers.")
    ] = Precision.float32,
    as_json: Json = False,
) -> None:
    """Freeze a model for inference, write it to a file, and show the time of a call before and after.

    The file is loaded by cf.load_frozen(path), which needs none of the model's own code. Exits with 1 if the
    model raises, or has no program that a file can hold.
    """
    import torch

    import cnnlstm_fast as cf
    from cnnlstm_fast.measure import compare_ms

    with _waiting("freezing the model"), torch.no_grad():
        made, xs = _model_and_inputs(model, inputs, "cpu")
        with _in_words(model):
            lower = None if dtype is Precision.float32 else getattr(torch, dtype.value)
            frozen = cf.freeze(made.eval(), *xs, dtype=lower)
            differs = _difference(made(*xs), frozen(*xs))
            fast = cf.accelerate(made)
            sides = {
                name: compare_ms(made, side, [xs] * (rounds + 1))
                for name, side in (("accelerated", fast), ("frozen", frozen))
            }
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            frozen.save(output)
        except (OSError, ValueError) as error:
            _fail(f"{output} is not written: {error}")
    found = {name: asdict(side) for name, side in sides.items()}
    if as_json:
        typer.echo(
            json.dumps(
                {"file": str(output), "bytes": output.stat().st_size, "differs": differs, "ms": found},
                indent=1,
            )
        )
        return
    table = Table("", "before, ms", "after, ms", "times as fast", title="A call, median of calls in turn")
    for name, side in sides.items():
        table.add_row(name, f"{side.reference:.3f}", f"{side.fast:.3f}", f"{side.ratio:.2f}")
    _console().print(table)
    typer.echo(f"{dtype.value}: results differ by {differs:.1e} of their norm")
    typer.echo(f"written: {output} ({output.stat().st_size / 2**20:.1f} MiB)")


@app.command()
def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option(
            "--compile-kernels",
            help="Compile the GPU kernels for sm_80, sm_90 and sm_100 instead; needs no GPU.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is built and available on this machine, and how to mend what is not.

    Exits with 1 if something is missing that can be mended, or a GPU kernel spills registers.
    """
    from cnnlstm_fast import doctor

    if compile_kernels:
        try:
            with _waiting("compiling the GPU kernels"):
                kernels = doctor.compile_kernels()
        except ImportError as error:
            _fail(str(error))
        except Exception as error:  # of Triton, or of the assembler that it starts
            _fail(f"a GPU kernel does not compile: {_describe(error)}")
        if as_json:
            typer.echo(json.dumps([asdict(k) for k in kernels], indent=1))
        else:
            _console().print(_kernel_table(kernels))
        if any(k.spills for k in kernels):
            _fail("a kernel spills registers")
        return
    report = doctor.report()
    typer.echo(json.dumps([asdict(f) for f in report.findings], indent=1) if as_json else str(report))
    if any(f.status == "missing" and f.mend for f in report.findings):
        raise typer.Exit(1)


def _console() -> Console:
    """On the terminal, or as wide as a table needs."""
    return Console(width=None if sys.stdout.isatty() else 110)


def _progress() -> Progress:
    """Bars on stderr, so that what is printed stays clean; gone when done."""
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A moving bar for work of unknown length."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _kernel_table(kernels: list) -> Table:
    table = Table("kernel", "case", "dtype", "arch", title="GPU kernels, compiled ahead of time")
    for name in ("registers", "shared, bytes", "spills, bytes"):
        table.add_column(name, justify="right")
    for k in kernels:
        table.add_row(k.kernel, k.case, k.dtype, k.arch, str(k.registers), str(k.shared), str(k.spills))
    return table


#: How many operators of each side the table shows.
_MOST_OPERATORS = 12


def _stage_table(found) -> Table:
    """The stages of a :class:`cnnlstm_fast.profiling.Profile`, before against after."""
    ms = found.ms
    table = Table(
        *("stage", "before", "ms", "after", "ms"),
        title=f"Stages of the forward, ms per run in {found.mode}",
        caption=f"whole, not profiled: {ms.reference:.2f} ms before, {ms.fast:.2f} after, {ms.ratio:.2f}x",
    )
    for at in (2, 4):
        table.columns[at].justify = "right"
    before, after = (
        {s.name: s for s in side.stages if s.plan != "view"} for side in (found.before, found.after)
    )
    for name in dict.fromkeys((*before, *after)):
        cells = []
        for stage in (before.get(name), after.get(name)):
            cells += [escape(f"{stage.op} [{stage.plan}]"), f"{stage.ms:.2f}"] if stage else ["", ""]
        table.add_row(name, *cells)
    return table


def _operator_table(found) -> Table:
    """The operators that take longest on either side; the package's own in bold."""
    table = Table(
        *("operator", "calls before", "ms", "calls after", "ms"), title="Operators, own time per run"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    sides = [{o.name: o for o in side.operators} for side in (found.before, found.after)]
    shown = {name for side in sides for name in list(side)[:_MOST_OPERATORS]}
    for name in sorted(shown, key=lambda name: -max(side[name].ms for side in sides if name in side)):
        cells, own = [], False
        for operator in (side.get(name) for side in sides):
            cells += [f"{operator.calls:g}", f"{operator.ms:.2f}"] if operator else ["", ""]
            own |= operator is not None and operator.own
        table.add_row(name, *cells, style="bold" if own else None)
    return table


def _model_and_inputs(model: str, inputs: list[str], device: str) -> tuple[Any, tuple]:
    """The model that the command line names and its random inputs, on ``device``."""
    import torch

    sizes = [_size(text) for text in inputs]
    try:
        torch.empty(1, device=device)
    except Exception as error:  # PyTorch has one type for an unknown name, another for what is not built
        raise typer.BadParameter(f"{device}: {str(error).splitlines()[0]}", param_hint="--device") from None
    bytes_needed, free = 4 * sum(map(prod, sizes)), _free_memory()
    if free is not None and bytes_needed > free:
        raise typer.BadParameter(
            f"{', '.join(inputs)} takes {bytes_needed / 2**30:,.1f} GiB, more than the "
            f"{free / 2**30:,.1f} GiB that are free",
            param_hint="--input",
        )
    made = _make_model(model)
    with _in_words(model):
        made = made.to(device)
    try:
        return made, tuple(torch.randn(size, device=device) for size in sizes)
    except RuntimeError as error:  # a GPU's memory
        raise typer.BadParameter(str(error), param_hint="--input") from None


def _free_memory() -> int | None:
    """Bytes that a process can still take, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _make_model(text: str) -> Any:
    """The ``nn.Module`` that ``MODULE:FACTORY`` or ``MODULE:FACTORY(literals)`` names."""
    from torch import nn

    where, separator, expression = text.partition(".py:")
    module_name = f"{where}.py" if separator else text.partition(":")[0]
    expression = expression if separator else text.partition(":")[2]
    try:
        tree = ast.parse(expression, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else None
        path = ast.unparse(call.func if call else tree).split(".")
        if not (module_name and all(part.isidentifier() for part in path)):
            raise ValueError("expected a name")
        args = [ast.literal_eval(a) for a in call.args] if call else []
        kwargs: dict[Any, Any] = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # what Python's parser raises
        raise _bad_model(
            f"got {text!r}, expected MODULE:FACTORY or MODULE:FACTORY(literals), as in "
            "'cnnlstm_fast:CNN_LSTM_Simple(3, 128, 2, 10)' or 'my/models.py:make'"
        ) from None
    with _in_words(module_name):
        module = _load_file(Path(module_name)) if separator else importlib.import_module(module_name)
    with _in_words(text):
        found: Any = reduce(getattr, path, module)
    if call is None and isinstance(found, nn.Module):
        return found
    with _in_words(text):
        made = found(*args, **kwargs)
    if not isinstance(made, nn.Module):
        raise _bad_model(f"{text} gives a {type(made).__name__}, expected an nn.Module")
    return made


@contextmanager
def _in_words(what: str, hint: str = "") -> Iterator[None]:
    """Say in words what somebody's code raises, and at which line of it; Ctrl-C stays what it is.

    Where none of that code was reached, the command line asked for something that is not there.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        said, where = _describe(error), _line_of(error)
        if isinstance(error, SystemExit):
            said = f"it ended itself by sys.exit({'' if error.code is None else repr(error.code)})"
        if not (where or hint or isinstance(error, (SystemExit, SyntaxError))):
            raise _bad_model(f"{what}: {said}") from None
        _fail("\n".join(filter(None, [f"{what} failed", where, said, hint])))


def _describe(error: BaseException) -> str:
    """The last lines of a traceback: an exception's type and text, and where a file cannot be parsed."""
    return "".join(traceback.format_exception_only(error)).strip()


def _line_of(error: BaseException) -> str | None:
    """The last line that ran outside of Python, of this package and of what is installed, in words."""
    left_out = tuple(
        str(Path(folder).resolve()) + os.sep
        for folder in (Path(__file__).parent, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    )
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        if path.is_file() and not installed and not str(path.resolve()).startswith(left_out):
            return f"in line {frame.lineno} of {frame.filename}, in {frame.name}: {frame.line}"
    return None


def _load_file(path: Path) -> ModuleType:
    """Import a Python file as its own folder would: neighbours, and its package where it is in one.

    A file that reads the command line while it is imported sees an empty one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    path = path.resolve()
    root, parts = path.parent, [path.stem]
    while (root / "__init__.py").exists():
        parts.insert(0, root.name)
        root = root.parent
    sys.path.insert(0, str(root))
    arguments, sys.argv = sys.argv, [str(path)]
    try:
        if len(parts) > 1:
            return importlib.import_module(".".join(parts))
        name = f"_{path.stem}" if path.stem in sys.modules else path.stem
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # which holds for every .py
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.argv = arguments


def _bad_model(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="MODULE:FACTORY")


def _size(text: str) -> tuple[int, ...]:
    """``8x3x28x28`` as a tuple."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"got {text!r}, expected sizes as in 8x3x28x28", param_hint="--input")
    if max(map(len, parts)) > 18 or prod(map(int, parts)) >= 2**61:
        raise typer.BadParameter(
            f"{text[:60]} has more elements than 64 bits can address", param_hint="--input"
        )
    return tuple(map(int, parts))


def _needs(error: ModuleNotFoundError, packages: dict[str, str], who: str) -> NoReturn:
    """Say which package to install, if ``error`` is about one of ``packages`` (by module name)."""
    package = packages.get((error.name or "").partition(".")[0])
    if package is None:
        raise error
    _fail(f"{who} needs {package}, which is not installed: pip install {' '.join(packages.values())}")


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
