"""The command line: what it prints, what it exits with, and that bad calls say what to do."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cnnlstm_fast.cli import app


def call(*args):
    return CliRunner().invoke(app, args)


def test_doctor():
    text, found = call("doctor"), json.loads(call("doctor", "--json").output)
    assert text.exit_code == 0
    for finding in found:
        assert finding["name"] in text.output


def test_explain(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import cnnlstm_fast as cf\ndef make():\n    return cf.CNN_LSTM_Simple(3, 8, 1, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    text = call("explain", "mine:make", "--input", "2x3x12x10")
    assert text.exit_code == 0 and "locations" in text.output
    stages = json.loads(call("explain", "mine:make", "--input", "2x3x12x10", "--json").output)
    assert [2, 30, 64] in [list(stage["shape"]) for stage in stages]


@pytest.mark.parametrize(
    "args, words",
    [
        (("explain", "mine", "--input", "1"), "MODULE:FACTORY"),
        (("explain", "no_such_module_here:make", "--input", "1"), "no_such_module_here"),
        (("explain", "json:no_such_factory", "--input", "1"), "no_such_factory"),
        (("explain", "collections:OrderedDict", "--input", "2xx3"), "8x3x28x28"),
    ],
)
def test_bad_calls_say_what_to_do(args, words):
    result = call(*args)
    assert result.exit_code == 2
    assert words in result.output


def test_missing_rich_names_the_command():
    run = "import runpy; runpy.run_module('cnnlstm_fast', run_name='__main__')"
    code = f"import sys; sys.modules['rich'] = None; {run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install typer rich" in done.stderr
