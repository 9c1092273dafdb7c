"""``python -m cnnlstm_fast demo | bench | explain | doctor``."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="CNN-to-RNN models in PyTorch, fast.",
    rich_markup_mode=None,
)
console = Console(width=None if sys.stdout.isatty() else 110)


def _need(*packages: str) -> None:
    """Exit with the command to run if one of the packages (import names) is missing."""
    installable = {"sklearn": "scikit-learn"}
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        names = " ".join(installable.get(p, p) for p in missing)
        console.print(f"this command needs more packages: pip install {names}")
        raise typer.Exit(2)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where demo.png and demo.json go.")] = Path("demo_output"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: shows that it runs.")] = False,
) -> None:
    """Train the tutorial's three systems on handwritten digits, reference and fast, and compare them."""
    _need("sklearn", "matplotlib")
    from cnnlstm_fast.demo import FULL, QUICK, run

    run(output, QUICK if quick else FULL, console)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure against the peers; takes the arguments of `python -m benchmarks`. Needs a checkout."""
    if importlib.util.find_spec("benchmarks") is None:
        console.print(
            "the benchmarks are part of the repository, not of the installed package: run this there"
        )
        raise typer.Exit(2)
    from benchmarks.__main__ import app as benchmarks

    benchmarks(context.args or ["run", "--quick"], prog_name="python -m benchmarks")


@app.command()
def explain(
    factory: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="What makes the model, called bare.")
    ],
    input: Annotated[list[str], typer.Option(help="Shape of an input, as 8x3x28x28; repeatable.")],
    as_json: Annotated[bool, typer.Option("--json", help="Stages as JSON.")] = False,
) -> None:
    """Say what every stage of a model gets, how it runs, why, and what it costs."""
    import cnnlstm_fast

    model = _load(factory)
    report = cnnlstm_fast.explain(model, *(torch.randn(_shape(text)) for text in input))
    if as_json:
        print(json.dumps([asdict(stage) for stage in report.stages], indent=1))
    else:
        print(report)


def _load(factory: str):
    module, _, name = factory.partition(":")
    if not name:
        raise typer.BadParameter(f"got {factory!r}, expected MODULE:FACTORY, as my_package.models:make")
    if (where := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, where)
    try:
        return getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"no module {error.name!r} can be imported from here") from error
    except AttributeError as error:
        raise typer.BadParameter(str(error)) from error


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise typer.BadParameter(f"got the shape {text!r}, expected sizes with x between, as 8x3x28x28")
    return tuple(map(int, text.split("x")))


@app.command()
def doctor(
    compile_kernels: Annotated[
        bool,
        typer.Option(
            "--compile-kernels", help="Compile the GPU kernels for sm_80, sm_90 and sm_100; no GPU needed."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Say what is built and available, and how to mend what is not.

    Exits with 1 where a GPU kernel spills registers.
    """
    from cnnlstm_fast import doctor as examination

    if not compile_kernels:
        report = examination.report()
        print(json.dumps([asdict(f) for f in report.findings], indent=1) if as_json else report)
        return
    _need("triton")
    with console.status("compiling the GPU kernels"):
        records = examination.compile_kernels()
    if as_json:
        print(json.dumps([asdict(r) for r in records], indent=1))
    else:
        table = Table(title="GPU kernels, compiled ahead of time")
        for name in ("kernel", "case", "dtype", "arch"):
            table.add_column(name)
        for name in ("registers", "shared, bytes", "spills, bytes"):
            table.add_column(name, justify="right")
        for r in records:
            table.add_row(r.kernel, r.case, r.dtype, r.arch, str(r.registers), str(r.shared), str(r.spills))
        console.print(table)
    if any(r.spills for r in records):
        console.print("[red]a kernel spills registers")
        raise typer.Exit(1)
