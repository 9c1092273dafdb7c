"""Choices of tiles: timed once, kept as validated files, shared by processes; and none changes a sum."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreted import interpreter_and_cuda, kernels_of

from cnnlstm_fast.planning import tuner

triton = pytest.importorskip("triton", reason="needs Triton")

# These import Triton, without which the file is skipped above.
from cnnlstm_fast.kernels import launching, tuning  # noqa: E402
from cnnlstm_fast.kernels.tuning import Choice  # noqa: E402

CHOICES = [Choice(7 * m, {"BM": m}, {"num_warps": w}) for m, w in ((64, 8), (32, 4), (128, 8))]
KEY = {"device": "a device", "kernel": "a kernel", "arguments": {"M": 1024, "x_ptr": "torch.float32"}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNLSTM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_known", {})
    return tmp_path / "cache"


def timed(*seconds):
    """A clock that gives these times, once each."""
    left = dict(zip(map(repr, CHOICES), seconds, strict=True))
    return lambda choice: left.pop(repr(choice))


def never(choice):
    raise AssertionError("was timed")


def test_the_fastest_is_kept(folder):
    assert tuning.choice_for(KEY, CHOICES, timed(3.0, 1.0, 2.0)) == CHOICES[1]
    assert tuning.choice_for(KEY, CHOICES, never) == CHOICES[1]
    assert tuning.choice_for(KEY | {"device": "another"}, CHOICES, timed(2.0, 2.0, 1.0)) == CHOICES[2]
    assert len(list(folder.iterdir())) == 2


def test_what_does_not_fit_the_device_is_not_chosen():
    assert tuning.choice_for(KEY, CHOICES, timed(math.inf, math.inf, 5.0)) == CHOICES[2]


def entry(**changes):
    choices = [{"tiles": choice.tiles, "options": choice.options} for choice in CHOICES]
    whole = {"schema": tuner.SCHEMA, "call": KEY, "choices": choices, "seconds": [3.0, 2.0, 1.0]}
    return whole | changes


DAMAGED = {
    "empty": b"",
    "half": json.dumps(entry()).encode()[:40],
    "no JSON": b"\x00\xff" * 40,
    "a list": json.dumps([entry()]).encode(),
    "nested": b"[" * 100_000,
    "another schema": json.dumps(entry(schema=tuner.SCHEMA + 1)).encode(),
    "another call": json.dumps(entry(call=KEY | {"kernel": "b"})).encode(),
    "a choice that is none": json.dumps(
        entry(choices=[{"tiles": {"BM": 1 << 20}, "options": {}}] * 3)
    ).encode(),
    "a time too few": json.dumps(entry(seconds=[3.0, 2.0])).encode(),
    "a time that is none": json.dumps(entry(seconds=[3.0, 2.0, "1.0"])).encode(),
    "a time before it began": json.dumps(entry(seconds=[3.0, 2.0, -1.0])).encode(),
    "not a number": json.dumps(entry(seconds=[3.0, 2.0, math.nan])).encode(),
    "no times": json.dumps(entry(seconds=None)).encode(),
    "too much": json.dumps(entry(more=1)).encode(),
    "a pickle": pickle.dumps(entry()),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_replaced(folder, content):
    tuning.choice_for(KEY, CHOICES, timed(1.0, 2.0, 3.0))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(content)
    assert tuning.choice_for(KEY, CHOICES, timed(1.0, 2.0, 3.0)) == CHOICES[0]
    assert path.read_bytes() == whole
    assert tuning.choice_for(KEY, CHOICES, never) == CHOICES[0]


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    folder.write_text("a file")
    assert tuning.choice_for(KEY, CHOICES, timed(2.0, 1.0, 3.0)) == CHOICES[1]
    assert folder.read_text() == "a file"


def test_processes_share_a_folder(folder):
    """Both write and read the same files all the time; nobody ever sees half of one."""
    code = """
import random, sys
from cnnlstm_fast.kernels import tuning
from cnnlstm_fast.planning import tuner
choices = [tuning.Choice(1, {"BM": m}, {"num_warps": 4}) for m in (16, 32, 64)]
rng = random.Random(sys.argv[1])
for round in range(400):
    key = {"call": rng.randrange(20)}
    path = next(iter(tuner.folder().glob("*.json")), None)
    if path is not None and rng.random() < 0.3:
        path.unlink(missing_ok=True)
    found = tuning.choice_for(key, choices, lambda choice: float(choice.tiles["BM"]) ** (-1) ** key["call"])
    assert found == choices[0 if key["call"] % 2 == 0 else 2], found
"""
    running = [subprocess.Popen([sys.executable, "-c", code, seed]) for seed in "12"]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert not list(folder.glob("*.tmp"))
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["schema"] == tuner.SCHEMA


@pytest.fixture
def device(monkeypatch):
    """A device for :func:`tuning.choose`, of which a test says whether it captures a graph."""
    state = SimpleNamespace(capturing=False, timed=[])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "_machine", lambda device: {"device": "a device"})
    monkeypatch.setattr(
        tuning, "_seconds", lambda run, choice: state.timed.append(choice) or choice.tiles["BM"]
    )
    return state


BLOCKS = {
    "forward and backward": dict(pool=[2, 2, 2, 2, 0, 0, 1, 1, 0], plan=1),
    "epilogue and max unpooling": dict(pool=[3, 2, 2, 1, 1, 0, 1, 1, 0], plan=2),
}


@interpreter_and_cuda
def kernels(request):
    yield from kernels_of("conv_block", request.param, lambda module, device: (module, device))


@pytest.mark.some(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_no_choice_changes_a_bit(kernels, block, tf32, dtype, monkeypatch):
    """The interpreter multiplies by a library whose order depends on the size: there whole numbers."""
    module, device = kernels
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)

    def draw(*shape):
        t = torch.randn(shape, device=device)
        return (t if device == "cuda" else t.round()).to(dtype)

    x, weight, bias = draw(2, 3, 9, 13), draw(40, 3, 3, 3), draw(40)
    args = ([1, 1, 1, 1, 1, 1, 1], 1, [], block["pool"], [0, 2, 3, 1], block["plan"])
    given = None
    found, used = [], set()
    for at in range(3):

        def run(kernel, programs, args, options, others=(), at=at):
            choices = [Choice(programs, {}, options), *others]
            choice = choices[min(at, len(choices) - 1)]
            used.add((kernel.__name__, repr(choice)))
            launching.launch(kernel, choice.programs, args | choice.tiles, choice.options)

        out, codes, _ = module.forward(x, weight, bias, *args, True, run=run)
        given = draw(*out.shape) if given is None else given
        grads = module.backward(given, x, weight, codes, *args, True, True, True, run=run)
        found.append([out, codes, *grads])
    assert len(used) >= 5
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@triton.jit
def kernel(x_ptr, M, x_n, COUT: triton.language.constexpr, BM: triton.language.constexpr):
    pass


def call(device, **changes):
    args = {"x_ptr": torch.zeros(2), "M": 100, "x_n": 1, "COUT": 3} | changes
    device.timed.clear()
    return tuning.choose(kernel, args, CHOICES, never)


def test_a_call_is_timed_once_and_its_like_not_at_all(device):
    assert call(device) == CHOICES[1] and device.timed == CHOICES
    assert call(device) == CHOICES[1] and not device.timed
    assert call(device, M=128) == CHOICES[1] and not device.timed  # to a factor of two the same
    tuning._known.clear()
    assert call(device) == CHOICES[1] and not device.timed  # from the file
    for change in (dict(M=129), dict(COUT=4), dict(x_n=2), dict(x_ptr=torch.zeros(2).half())):
        assert call(device, **change) == CHOICES[1] and device.timed == CHOICES


def test_nothing_is_timed_while_a_graph_is_captured(device):
    device.capturing = True
    assert call(device) == CHOICES[0] and not device.timed
    device.capturing = False
    assert call(device) == CHOICES[1] and device.timed == CHOICES
    device.capturing = True
    assert call(device) == CHOICES[0] and not device.timed


def test_the_same_tiles_start_as_many_programs_as_this_call_has():
    assert tuning.choice_for(KEY, CHOICES, timed(1.0, 2.0, 3.0)).programs == 7 * 64
    larger = [choice._replace(programs=9 * choice.programs) for choice in CHOICES]
    assert tuning.choice_for(KEY, larger, never) == larger[0]


def test_memory_is_bounded(device, monkeypatch):
    monkeypatch.setattr(tuning, "_MOST_KNOWN", 5)
    for m in range(20):
        call(device, M=m)
    assert len(tuning._known) <= 5
