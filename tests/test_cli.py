"""The command line: what it prints, what it exits with, and that bad calls say what to do."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import run_forked
from helpers import needs_extension
from typer.testing import CliRunner

import cnnlstm_fast.demo
from cnnlstm_fast import cli, doctor
from cnnlstm_fast.cli import app

SIMPLE = "cnnlstm_fast:CNN_LSTM_Simple(3, 8, lstm_num_layers=1, num_classes=2)"


def call(*args):
    return CliRunner().invoke(app, args)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module with a factory, a model, and something that is none."""
    (tmp_path / "mine.py").write_text(
        "import cnnlstm_fast as cf\n"
        "def make():\n    return cf.CNN_LSTM_Simple(3, 8, 1, 2)\n"
        "class models:\n    ready = make()\n"
        "def shape():\n    return (1, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def test_doctor():
    text, found = call("doctor"), json.loads(call("doctor", "--json").output)
    assert [f["name"] for f in found] == [f.name for f in doctor.report().findings]
    for finding in found:
        assert finding["name"] in text.output
    assert text.exit_code == any(f["status"] == "missing" and f["mend"] != "" for f in found)


@pytest.mark.parametrize(
    "status, mend, code", [("missing", "build it", 1), ("missing", "", 0), ("warning", "set it", 0)]
)
def test_doctor_fails_on_what_can_be_mended(status, mend, code, monkeypatch):
    report = doctor.Report((doctor.Finding("a", "ok", "b"), doctor.Finding("part", status, "gone", mend)))
    monkeypatch.setattr(doctor, "report", lambda: report)
    for form in ((), ("--json",)):
        done = call("doctor", *form)
        assert done.exit_code == code and mend in done.output


@pytest.mark.parametrize("spills, code", [(0, 0), (8, 1)])
def test_doctor_compiles_kernels(spills, code, monkeypatch):
    aot = pytest.importorskip("cnnlstm_fast.kernels.aot", reason="needs Triton")
    record = aot.Record("forward", "tutorial", "float32", "sm_90", 77, 4096, spills, 0.5)
    monkeypatch.setattr(doctor, "compile_kernels", lambda: [record])
    text, found = (call("doctor", "--compile-kernels", *form) for form in ((), ("--json",)))
    assert text.exit_code == found.exit_code == code
    assert "sm_90" in text.output and "4096" in text.output
    assert json.loads(found.stdout)[0]["registers"] == 77


def test_doctor_without_triton(monkeypatch):
    monkeypatch.setattr("cnnlstm_fast.planning.support.triton_available", lambda: False)
    done = call("doctor", "--compile-kernels")
    assert done.exit_code == 1 and "pip install triton" in done.output


@pytest.fixture
def plain_file(tmp_path):
    """A model file as people write it: plain PyTorch, a neighbour, a command line of its own."""
    (tmp_path / "sizes.py").write_text("HIDDEN = 6\n")
    path = tmp_path / "my-net.py"
    path.write_text(
        "import argparse\n"
        "from torch import nn\n"
        "from sizes import HIDDEN\n"
        "options = argparse.ArgumentParser()\n"
        "options.add_argument('--classes', type=int, default=3)\n"
        "options = options.parse_args()\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, layers=1):\n"
        "        super().__init__()\n"
        "        self.cnn = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))\n"
        "        self.rnn = nn.GRU(128, HIDDEN, layers)\n"
        "        self.fc = nn.Linear(HIDDEN, options.classes)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.rnn(self.cnn(x).permute(3, 0, 1, 2).flatten(2))[0])\n"
    )
    before = path.read_text(), list(sys.argv), list(sys.path)
    yield path
    assert path.read_text() == before[0] and sys.argv == before[1]
    sys.path[:] = before[2]
    sys.modules.pop("sizes")


def test_a_file_of_the_users_own_is_explained(plain_file):
    found = call("explain", f"{plain_file}:Net(layers=2)", "--input", "4x1x8x60", "--json")
    assert found.exit_code == 0
    stages = {stage["name"]: stage for stage in json.loads(found.stdout)["stages"]}
    assert stages["cnn.0"]["shape"] == [4, 32, 8, 60] and stages["fc"]["shape"] == [30, 4, 3]


def test_explain_shows_the_accelerated_model(plain_file):
    args = ("explain", f"{plain_file}:Net", "--input", "4x1x8x60", "--json")
    plain, fast = (json.loads(call(*args, *more).stdout)["stages"] for more in ((), ("--fast",)))
    assert [s["op"] for s in plain if s["name"].startswith("cnn")] == ["Conv2d", "ReLU", "MaxPool2d"]
    assert "Conv2d+ReLU+MaxPool2d" in [s["op"] for s in fast]
    assert plain[-1]["shape"] == fast[-1]["shape"]


def test_a_file_in_a_package_may_import_relatively(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "users_package" / "models").mkdir(parents=True)
    for folder in ("users_package", "users_package/models"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "users_package" / "sizes.py").write_text("UNITS = 5\n")
    path = tmp_path / "users_package" / "models" / "net.py"
    path.write_text(
        "from torch import nn\nfrom ..sizes import UNITS\ndef make():\n    return nn.Linear(4, UNITS)\n"
    )
    found = call("explain", f"{path}:make", "--input", "3x4", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["stages"][-1]["shape"] == [3, 5]


@needs_extension
def test_freeze(plain_file, tmp_path):
    path = tmp_path / "new folder" / "net.cf"
    args = ("freeze", f"{plain_file}:Net", "--input", "1x1x8x60", "-o", str(path), "--rounds", "2")
    for dtype, most in (("int8", 0.05), ("bfloat16", 0.05), ("float32", 1e-5)):
        found = call(*args, "--json", "--dtype", dtype)
        assert found.exit_code == 0, found.output
        report = json.loads(found.stdout)
        assert (report["differs"] > 1e-4) == (dtype != "float32") and report["differs"] < most
    assert call(*args, "--dtype", "float16").exit_code == 2
    assert report["bytes"] == path.stat().st_size and set(report["ms"]) == {"accelerated", "frozen"}
    assert cnnlstm_fast.load_frozen(path)(torch.randn(3, 1, 8, 40)).isfinite().all()
    text = call(*args)
    assert "times as fast" in text.output and "written: " in text.output
    noise = tmp_path / "noise.py"
    noise.write_text(
        "import torch\nclass Noise(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x + torch.rand_like(x)\n"
    )
    failed = call("freeze", f"{noise}:Noise", "--input", "2x3", "-o", str(tmp_path / "noise.cf"))
    assert failed.exit_code == 1 and "is not written" in failed.output and "random" in failed.output


@pytest.mark.parametrize("training", [False, True])
def test_profile(training, plain_file, tmp_path):
    trace = tmp_path / "new folder" / "trace.json"
    args = ("profile", f"{plain_file}:Net", "--input", "256x1x8x60", "--rounds", "2", "--trace", str(trace))
    args += ("--training",) if training else ()
    found = call(*args, "--json")
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout)
    assert report["mode"] == ("training" if training else "inference") and report["ms"]["reference"] > 0
    assert [s["name"] for s in report["before"]["stages"] if s["plan"] != "view"][:3] == [
        "cnn.0",
        "cnn.1",
        "cnn.2",
    ]
    (block,) = (s for s in report["after"]["stages"] if s["name"] == "cnn.0")
    assert block["op"] == "Conv2d+ReLU+MaxPool2d"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"before", "after", "cnn.0: Conv2d", "rnn: GRU"} <= names
    assert f"cnn.0: Conv2d+ReLU+MaxPool2d [{block['plan']}]" in names
    text = call(*args)
    assert text.exit_code == 0 and "aten::" in text.output and str(trace) in text.output.replace("\n", "")
    assert f"Conv2d+ReLU+MaxPool2d [{block['plan']}]" in text.output


def test_profile_fails_in_words(plain_file, tmp_path):
    done = call("profile", f"{plain_file}:Net", "--input", "2x3x8x10", "--trace", str(tmp_path / "t.json"))
    assert done.exit_code == 1 and "RuntimeError" in done.output and "'explain' shows" in done.output


@pytest.mark.parametrize("model", ["mine:make", "mine:models.ready", SIMPLE])
def test_explain(model, mine):
    text = call("explain", model, "--input", "2x3x12x10")
    assert text.exit_code == 0 and "locations" in text.output
    report = json.loads(call("explain", model, "--input", "2x3x12x10", "--json").output)
    assert [2, 30, 64] in [stage["shape"] for stage in report["stages"]] and report["error"] is None


def test_explain_fails_with_the_mend():
    model = "cnnlstm_fast.reference:CNN_LSTM_TimeDistributed(3, 8, 1, 2)"
    text, found = (
        call("explain", model, "--input", "2x4x3x12x10", *form, "--device", "cpu")
        for form in ((), ("--json",))
    )
    assert text.exit_code == found.exit_code == 1
    assert "image_size=(12, 10)" in text.output
    assert "image_size=(12, 10)" in json.loads(found.output)["error"]


@pytest.mark.parametrize(
    "args, words",
    [
        (("mine", "--input", "1"), "MODULE:FACTORY"),
        (("mine:make()()", "--input", "1"), "MODULE:FACTORY"),
        (("mine:make(open)", "--input", "1"), "literals"),
        (("mine:make(3)", "--input", "1"), "positional argument"),
        (("mine:shape", "--input", "1"), "gives a tuple"),
        (("no/such/file.py:make", "--input", "1"), "no/such/file.py"),
        (("no_such_module_here:make", "--input", "1"), "no_such_module_here"),
        (("mine:no_such_factory", "--input", "1"), "no_such_factory"),
        (("mine:make", "--input", "2xx3"), "8x3x28x28"),
        (("mine:make", "--input", "2x3", "--device", "no_such_device"), "no_such_device"),
        (("mine:make", "--input", "2x3", "--device", "mps"), "--device: mps: Could not run"),
        (("mine:make", "--input", "99999999999999999999x3"), "64 bits"),
        (("mine:make", "--input", "1" + 5000 * "0"), "64 bits"),
        (("mine:make", "--input", "4294967296x4294967296x4294967296"), "64 bits"),
        (("mine:make", "--input", "1000000x1000000x1000"), "GiB that are free"),
        (("mine:make", "--input", "1", "--input", "1000000x1000000"), "GiB that are free"),
        (("mine:make.__name__", "--input", "1"), "not callable"),
        (("mine:make" + 300 * "(" + 300 * ")", "--input", "1"), "literals"),
        (("mine:make",), "--input"),
    ],
)
def test_bad_calls_say_what_to_do(args, words, mine):
    result = call("explain", *args)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("command", ["explain", "profile"])
def test_a_device_that_is_not_there(command, mine):
    done = call(command, "mine:make", "--input", "1x3x8x8", "--device", "cuda")
    assert done.exit_code == 2 and "--device: cuda" in " ".join(done.output.split())


_BAD_FILE = """\
import sys
from torch import nn
class Raises(nn.Module):
    def forward(self, x):
        return inner(x)
class Leaves(nn.Module):
    def forward(self, x):
        sys.exit(7)
class Stuck(nn.Module):
    def train(self, mode=True):
        raise NotImplementedError("[bold]no modes")
def inner(x=None):
    raise KeyError("of inner")
def leave():
    sys.exit(7)
def deep():
    return deep()
def typed():
    return nn.Linear(3, "four")
def nothing():
    pass
def interrupted():
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize(
    "text, factory, words",
    [
        (_BAD_FILE, "inner", ["line 13 of", "in inner", "KeyError: 'of inner'"]),
        (_BAD_FILE, "leave", ["line 15 of", "sys.exit(7)"]),
        (_BAD_FILE, "deep", ["line 17 of", "RecursionError"]),
        (_BAD_FILE, "typed", ["line 19 of", "TypeError"]),
        (_BAD_FILE, "nothing", ["gives a NoneType"]),
        (_BAD_FILE, "Raises", ["KeyError: 'of inner'"]),
        (_BAD_FILE, "Leaves", ["line 8 of", "sys.exit(7)"]),
        (_BAD_FILE, "Stuck", ["line 11 of", "NotImplementedError: [bold]no modes"]),
        ("x = 1\nraise ValueError('while importing')\n", "x", ["line 2 of", "ValueError: while importing"]),
        ("import sys\nsys.exit(7)\n", "x", ["line 2 of", "sys.exit(7)"]),
        ("raise SystemExit\n", "x", ["line 1 of", "sys.exit()"]),
        ("import no_such_module_here\n", "x", ["line 1 of", "no_such_module_here"]),
        ("x = 1\ndef f(:\n", "x", ["line 2", "SyntaxError"]),
        ("x = '\0'\n", "x", ["SyntaxError"]),
        ("assert False\n", "x", ["line 1 of", "AssertionError"]),
    ],
)
@pytest.mark.parametrize("command", ["explain", "profile"])
def test_a_model_that_fails_is_told_in_words(command, text, factory, words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "their_net.py"
    path.write_text(text)
    more = ("--trace", str(tmp_path / "trace.json")) if command == "profile" else ()
    done = call(command, f"{path}:{factory}", "--input", "2x3", *more)
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    assert all(word in said for word in words) and "Traceback" not in said
    if done.exit_code == 1 and factory != "Raises":
        assert "their_net.py" in said


def test_an_interrupt_stays_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "their_net.py"
    path.write_text(_BAD_FILE)
    with pytest.raises(KeyboardInterrupt):
        cli._make_model(f"{path}:interrupted")
    done = call("explain", f"{path}:interrupted", "--input", "2x3")
    assert done.exit_code not in (0, 2) and "their_net" not in done.output


def test_a_trace_that_cannot_be_written(mine, tmp_path):
    (tmp_path / "file").touch()
    trace = tmp_path / "file" / "trace.json"
    done = call("profile", "mine:make", "--input", "1x3x8x8", "--trace", str(trace))
    assert done.exit_code == 2 and "--trace" in done.output


def test_a_kernel_that_does_not_compile_is_told_in_words(monkeypatch):
    def fail():
        raise RuntimeError("ptxas exited with 255")

    monkeypatch.setattr(doctor, "compile_kernels", fail)
    done = call("doctor", "--compile-kernels")
    assert done.exit_code == 1 and "does not compile: RuntimeError: ptxas exited with 255" in done.output


@pytest.mark.parametrize("flags, settings", [((), "FULL"), (("--quick",), "QUICK")])
def test_demo_hands_over(flags, settings, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cnnlstm_fast.demo, "run", lambda *args: seen.append(args))
    assert call("demo", "--output", str(tmp_path / "here"), *flags).exit_code == 0
    assert seen[0][:2] == (tmp_path / "here", getattr(cnnlstm_fast.demo, settings))


def test_demo_prints_json_alone(tmp_path, monkeypatch):
    def run(output, settings, console):
        console.print("a table")
        (output / "demo.json").write_text('{"systems": []}')

    monkeypatch.setattr(cnnlstm_fast.demo, "run", run)
    assert json.loads(call("demo", "--output", str(tmp_path), "--json").stdout) == {"systems": []}


def test_demo_refuses_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert call("demo", "--output", str(tmp_path / "file")).exit_code == 2


@pytest.mark.parametrize(
    "args, handed_over",
    [
        ((), ["run", "--quick"]),
        (("run", "--case", "Simple", "--rounds", "3"), ["run", "--case", "Simple", "--rounds", "3"]),
        (("--help",), ["--help"]),
    ],
)
def test_bench_hands_over(args, handed_over, monkeypatch):
    seen = []

    def run(command, env):
        seen.append((command, env["PYTHONPATH"]))
        return SimpleNamespace(returncode=5)

    monkeypatch.setattr(subprocess, "run", run)
    assert call("bench", *args).exit_code == 5
    command, path = seen[0]
    assert command == [sys.executable, "-m", "benchmarks", *handed_over]
    assert (Path(path.split(":")[0]) / "benchmarks" / "__main__.py").is_file()


def test_bench_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cnnlstm_fast" / "cli.py"))
    done = call("bench")
    assert done.exit_code == 1 and "clone" in done.output


@pytest.mark.parametrize(
    "missing, args, install",
    [
        ("rich", [], "pip install typer rich"),
        ("typer", ["doctor"], "pip install typer rich"),
        ("matplotlib", ["demo"], "pip install matplotlib scikit-learn"),
        ("sklearn", ["demo"], "pip install matplotlib scikit-learn"),
    ],
)
def test_missing_packages_name_the_command(missing, args, install):
    code = (
        f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {args}; "
        "runpy.run_module('cnnlstm_fast', run_name='__main__')"
    )
    done = run_forked(code)
    assert done.returncode == 1 and install in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_command():
    listed = call("--help").output
    for command in ("demo", "bench", "explain", "profile", "doctor"):
        assert command in listed
        assert call(command, "--help").exit_code == 0 or command == "bench"
