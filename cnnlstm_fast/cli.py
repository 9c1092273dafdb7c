"""``python -m cnnlstm_fast demo | bench | explain | doctor``.

Exit codes: 0 done; 1 it failed, or something is missing, and the text says how to mend it; 2 the
command line itself is wrong.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
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


@app.command()
def demo(
    output: Annotated[Path, typer.Option(file_okay=False, help="Folder for demo.png and demo.json.")] = Path(
        "demo_output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows that it runs; nothing is learned.")
    ] = False,
) -> None:
    """Train the three systems on real handwritten digits, reference and fast, and compare them.

    Ends in under 5 minutes on 2 cores and uses the GPU where there is one. Prints a table and writes a
    picture of the loss curves and ratios.
    """
    try:
        from cnnlstm_fast.demo import FULL, QUICK, run
    except ModuleNotFoundError as error:
        _needs(error, {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}, "the demo")
    run(output, QUICK if quick else FULL, _console())


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
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A model, or what makes one: a name in a module, with literal arguments where it needs any, "
            "as in 'cnnlstm_fast:CNN_LSTM_Simple(3, 128, 2, 10)'.",
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Option("--input", help="Size of a random float input, as in 8x3x28x28; once per argument."),
    ],
    device: Annotated[str, typer.Option(help="Where to run it.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Run a model once and show shape, layout, plan, reason, time and memory of every stage.

    The model runs in inference. Exits with 1 if it raises; the table then ends where it did, and says
    what to change.
    """
    import torch

    from cnnlstm_fast import explain as explain_model

    made = _make_model(model)
    try:
        made, xs = made.to(device), [torch.randn(_size(text), device=device) for text in inputs]
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None
    with torch.no_grad():
        report = explain_model(made.eval(), *xs)
    typer.echo(json.dumps(asdict(report), indent=1) if as_json else str(report))
    if report.error is not None:
        raise typer.Exit(1)


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
            with _console().status("compiling the GPU kernels"):
                kernels = doctor.compile_kernels()
        except ImportError as error:
            _fail(str(error))
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


def _kernel_table(kernels: list) -> Table:
    table = Table("kernel", "case", "dtype", "arch", title="GPU kernels, compiled ahead of time")
    for name in ("registers", "shared, bytes", "spills, bytes"):
        table.add_column(name, justify="right")
    for k in kernels:
        table.add_row(k.kernel, k.case, k.dtype, k.arch, str(k.registers), str(k.shared), str(k.spills))
    return table


def _make_model(text: str) -> Any:
    """The ``nn.Module`` that ``MODULE:FACTORY`` or ``MODULE:FACTORY(literals)`` names."""
    from torch import nn

    module_name, _, expression = text.partition(":")
    try:
        tree = ast.parse(expression, mode="eval").body
        call = tree if isinstance(tree, ast.Call) else None
        path = ast.unparse(call.func if call else tree).split(".")
        if not (module_name and all(part.isidentifier() for part in path)):
            raise ValueError("expected a name")
        args = [ast.literal_eval(a) for a in call.args] if call else []
        kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (SyntaxError, ValueError):
        raise _bad_model(
            f"got {text!r}, expected MODULE:FACTORY or MODULE:FACTORY(literals), as in "
            "'cnnlstm_fast:CNN_LSTM_Simple(3, 128, 2, 10)'"
        ) from None
    try:
        found = reduce(getattr, path, importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        raise _bad_model(str(error)) from None
    if call is None and isinstance(found, nn.Module):
        return found
    try:
        made = found(*args, **kwargs)
    except TypeError as error:
        raise _bad_model(f"{text}: {error}") from None
    if not isinstance(made, nn.Module):
        raise _bad_model(f"{text} gives a {type(made).__name__}, expected an nn.Module")
    return made


def _bad_model(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="MODULE:FACTORY")


def _size(text: str) -> tuple[int, ...]:
    """``8x3x28x28`` as a tuple."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"got {text!r}, expected sizes as in 8x3x28x28", param_hint="--input")
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
