"""Every Python block of README, docs and docstrings runs as it stands; its commands and files exist."""

import dataclasses
import doctest
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import typer
from helpers import needs_extension
from torch import nn
from typer.testing import CliRunner

import cnnlstm_fast as cf
from benchmarks.__main__ import app as benchmarks_app
from cnnlstm_fast import compile_backend, errors
from cnnlstm_fast.cli import app
from cnnlstm_fast.freeze.module import Frozen
from cnnlstm_fast.freeze.stream import FrozenStream
from cnnlstm_fast.nn.stream import Stream

# Public functions have these modules' names.
accelerate, explain = (importlib.import_module(f"cnnlstm_fast.{name}") for name in ("accelerate", "explain"))

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name
        for page in PAGES
        for text in blocks(page, "sh")
        for name in re.findall(r"^make ([\w-]+)", text, re.MULTILINE)
    }
    assert named and named <= targets


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_commands_exist_with_their_options(page):
    commands = {
        "cnnlstm_fast": typer.main.get_command(app),
        "benchmarks": typer.main.get_command(benchmarks_app),
    }
    named = re.findall(r"python -m (cnnlstm_fast|benchmarks) ([^`\n]*)", page.read_text())
    for program, rest in named:
        for alternative in rest.split("|") if "|" in rest else [rest]:
            name, *arguments = alternative.split()
            command = commands[program].commands[name]
            options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            if command.ignore_unknown_options:
                continue
            assert {a for a in arguments if a.startswith("-")} <= options, alternative


def test_commands_on_a_model_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/model.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))\n"
    )
    lines = [line for page in PAGES for text in blocks(page, "sh") for line in text.splitlines()]
    commands = [line for line in lines if "my/model.py" in line]
    assert len(commands) >= 2
    for line in commands:
        program, flag, module, *arguments = shlex.split(line, comments=True)
        assert (program, flag, module) == ("python", "-m", "cnnlstm_fast")
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_exist(page):
    """What stands in backticks and looks like a file of the repository, alone or in its usual folder."""
    folders = (ROOT, ROOT / "cnnlstm_fast", ROOT / "benchmarks", ROOT / "csrc" / "cpu")
    for name in re.findall(r"`([\w./*-]+\.(?:py|cpp|h|inc|md|txt|json))`", page.read_text()):
        assert any(list(folder.glob(name)) for folder in folders), name


def test_guarantees_name_tests_that_exist():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert named
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets


# ---------------------------------------------------------------- the reference


def public_objects() -> dict[str, object]:
    """Every public name behind ``cf.``: functions, classes, and modules that hold settings."""
    found: dict[str, object] = {}
    for name in cf.__all__:
        value = getattr(cf, name)
        if inspect.ismodule(value):
            found |= {f"{name}.{inner}": getattr(value, inner) for inner in value.__all__}
        else:
            found[name] = value
    del found["backends.allow_transforms"]  # a value: its module says what it is
    return found | {
        "backends": cf.backends,
        "compile_backend.cnnlstm_fast": compile_backend.cnnlstm_fast,
        "nn.stream.Stream": Stream,
        "freeze.module.Frozen": Frozen,
        "freeze.stream.FrozenStream": FrozenStream,
    }


#: What stands in the reference beside the public names: what they return and raise.
RECORDS = {
    "accelerate.Report": accelerate.Report, "accelerate.Site": accelerate.Site,
    "explain.Report": explain.Report, "explain.Stage": explain.Stage, "errors": errors,
}  # fmt: skip
PUBLIC = public_objects()
#: Those whose docstring has no section "Shapes" because no tensor goes in or out.
WITHOUT_TENSORS = {
    "backends", "doctor.Finding", "doctor.Report", "doctor.report", "doctor.compile_kernels", "tune",
    "load_frozen",
}  # fmt: skip


def sections(value: object) -> set[str]:
    return set(re.findall(r"^ *([A-Z]\w+):$", inspect.getdoc(value) or "", re.MULTILINE))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_docstring_has_its_parts(name):
    """Arguments, shapes, what is returned, errors and an example, where there are any."""
    value = PUBLIC[name]
    is_record = dataclasses.is_dataclass(value)
    wanted = set() if is_record else {"Example"}
    if is_record:
        wanted |= {"Attributes"}
    elif callable(value):
        parameters = [p for p in inspect.signature(value).parameters if p != "self"]
        wanted |= {"Args"} if parameters else set()
        if name != "tune" and parameters:
            wanted |= {"Raises"}
        if inspect.isfunction(value):
            wanted |= {"Returns"}
        if name not in WITHOUT_TENSORS and not {"Args", "Returns"} <= wanted:
            wanted |= {"Shapes"}
        if inspect.isfunction(value) and name not in WITHOUT_TENSORS:
            described = inspect.getdoc(value) or ""
            assert "Shapes:" in described or re.search(r"``\([A-Z]", described), "a shape of any tensor"
    assert wanted <= sections(value), f"{name}: {sorted(wanted - sections(value))} missing"


@needs_extension
@pytest.mark.parametrize("name", [*PUBLIC, *RECORDS])
def test_examples_of_docstrings_run(name):
    value = (PUBLIC | RECORDS)[name]
    finder = doctest.DocTestFinder(recurse=not inspect.ismodule(value))
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=options, verbose=False)
    said: list[str] = []
    for test in finder.find(value, name, globs={"torch": torch, "nn": nn, "cf": cf}):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.rst"))
    named = set(
        re.findall(r"^\.\. auto(?:class|function|module):: cnnlstm_fast\.([\w.]+)$", pages, re.MULTILINE)
    )
    whole = {m.removeprefix("cnnlstm_fast.") for m in re.findall(r"automodule:: (\S+)\n   :members:", pages)}
    missing = {name for name in (PUBLIC | RECORDS) if name not in named and name.split(".")[0] not in whole}
    assert not missing


# ---------------------------------------------------------------- architecture

#: Pages whose file names are those of the repository, in full.
EXACT = [ROOT / "docs" / f"{name}.md" for name in ("architecture", "contributing", "kernels")]
#: In backticks on these pages and no file: made by a build, or a user's.
NO_FILES = re.compile(r"\.venv/|build/|my/|a/bin/")
A_FILE = re.compile(r"[\w./*-]+(?:\.(?:py|cpp|h|inc|md|txt|json|toml|cff|yml)|/)")


@pytest.mark.parametrize("page", EXACT, ids=lambda p: p.name)
def test_files_have_their_full_names(page):
    """What stands in backticks and looks like a file, and every path below our folders, in commands too."""
    text = page.read_text()
    named = {n for n in re.findall(r"`([^`\s]+)`", text) if A_FILE.fullmatch(n) and not NO_FILES.match(n)}
    named |= set(
        re.findall(r"(?<![\w/.])(?:tests|benchmarks|cnnlstm_fast|csrc|kernels)/[\w./*-]+\.\w+", text)
    )
    assert named
    assert not sorted(name for name in named if not any(ROOT.glob(name)))


def test_symbols_of_the_architecture_exist():
    """A name in backticks is a word of the sources, so that a page does not outlive what it describes."""
    folders = [ROOT / f for f in ("cnnlstm_fast", "csrc", "kernels", "tests", "benchmarks")]
    files = [p for f in folders for end in ("py", "cpp", "h", "inc") for p in f.rglob(f"*.{end}")]
    words = set(
        re.findall(
            r"\w+", " ".join(p.read_text() for p in [*files, ROOT / "Makefile"] if p != Path(__file__))
        )
    )
    text = BLOCK.sub("", EXACT[0].read_text())
    named = [n for n in re.findall(r"`([^`\s]+)`", text) if re.fullmatch(r"[A-Za-z_][\w.:]*(\(\))?", n)]
    symbols = [re.split(r"\.|::", n.removesuffix("()"))[-1] for n in named if not A_FILE.fullmatch(n)]
    assert len(symbols) > 30
    assert not sorted({s for s in symbols if s not in words})


def test_the_picture_of_the_architecture():
    """Its files exist, and it was drawn from what docs/figures.py says now; running that draws it."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    boxes = [box for _, _, *ways in figures["FLOORS"] for way in ways for box in way if box]
    named = [file for file, _ in boxes] + [*figures["BELOW_ALL"]]
    assert not [name for name in named if not (ROOT / name).exists()]
    assert (
        f"Source\0{figures['architecture_source']()}".encode()
        in (ROOT / "docs" / "architecture.png").read_bytes()
    )
