"""Every Python block of README and docs runs as it stands; every command and file in them exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.__main__ import app as benchmarks_app
from cnnlstm_fast.cli import app

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
