"""``frozen.save`` and ``cf.load_frozen``: the same results from a file, and files that are none."""

from __future__ import annotations

import copy
import json
import random
import time

import pytest
import torch
from forked import run_forked
from helpers import needs_extension
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.freeze.sizes import compiled

pytestmark = needs_extension


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.pad = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3, padding=1))
        self.rnn = nn.GRU(8, 6, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(12, 4)
        self.register_buffer("offset", torch.rand(4), persistent=False)

    def forward(self, x, scale=1.0):
        y = self.pad(self.cnn(x))
        return self.fc(self.rnn(y.transpose(1, 2))[0]) * scale + self.offset


@pytest.fixture(scope="module")
def frozen_once():
    """Capturing takes a second, and tests that read a file need no model of their own."""
    return cf.freeze(Net().eval(), torch.randn(1, 3, 20))


@pytest.fixture
def saved(tmp_path, frozen_once):
    frozen, path = copy.deepcopy(frozen_once), tmp_path / "net.cf"
    frozen.save(path)
    return frozen, path


@torch.no_grad()
def test_a_file_gives_the_same_results_at_any_size(saved):
    frozen, path = saved
    loaded = cf.load_frozen(path)
    for shape in ((1, 3, 20), (5, 3, 33), (2, 3, 9), (1, 3, 3)):
        x = torch.randn(shape)
        assert torch.equal(loaded(x), frozen(x)), shape
    assert loaded.state_dict().keys() == frozen.state_dict().keys()
    assert dict(loaded.named_parameters()).keys() == dict(frozen.named_parameters()).keys()
    with pytest.raises(RuntimeError, match="none of those that the saved model was frozen for"):
        loaded(torch.randn(1, 3, 20), 2.0)
    with pytest.raises(RuntimeError):
        loaded(torch.randn(1, 4, 20))


@torch.no_grad()
def test_new_weights_in_a_loaded_model(saved):
    frozen, path = saved
    loaded = cf.load_frozen(path)
    state = {key: value * 0.7 for key, value in frozen.state_dict().items()}
    x = torch.randn(2, 3, 20)
    before = loaded(x)
    loaded.load_state_dict(state)
    frozen.load_state_dict(state)
    assert torch.equal(loaded(x), frozen(x)) and not torch.equal(loaded(x), before)


@torch.no_grad()
def test_a_file_holds_no_pickle_and_is_safetensors(saved):
    _, path = saved
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert all(isinstance(value, str) for value in header.pop("__metadata__").values())
    end = max(entry["data_offsets"][1] for entry in header.values())
    assert 8 + length + end == len(data) and length % 8 == 0
    assert "state/fc.weight" in header


@torch.no_grad()
def test_a_loaded_model_needs_no_code_of_the_model_and_loads_at_once(saved):
    _, path = saved
    code = (
        f"import torch, cnnlstm_fast as cf; print(cf.load_frozen({str(path)!r})(torch.ones(2, 3, 9)).shape)"
    )
    done = run_forked(code)
    assert "torch.Size([2, 7, 4])" in done.stdout, done.stderr
    big = cf.freeze(nn.LSTM(512, 500).eval(), torch.randn(1, 1, 512))  # 8 MB
    big.save(path)
    start = time.perf_counter()
    cf.load_frozen(path)
    assert time.perf_counter() - start < 5  # under a second on a machine that does nothing else


def changed(path, change):
    """The file with its metadata changed by ``change``, its check sum right."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["cnnlstm_fast"])
    change(metadata)
    header["__metadata__"]["cnnlstm_fast"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_damaged_files_are_refused_in_words(saved, tmp_path):
    _, path = saved
    whole = path.read_bytes()
    rng = random.Random(torch.initial_seed())
    for damaged in (
        b"", b"\x00" * 7, b"\xff" * 64, whole[:-1], whole + b"\x00", whole[: len(whole) // 2], whole[8:],
        b"PK\x03\x04" + whole, whole[:8] + b"[" * 50_000,
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            cf.load_frozen(path)
    for _ in range(30):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        try:
            cf.load_frozen(path)
        except ValueError:
            pass  # one that is not noticed changed a text that nobody reads
    with pytest.raises(OSError):
        cf.load_frozen(tmp_path / "missing.cf")


@pytest.mark.some(4)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format=99), "is of format 99"),
        (lambda m: m.update(code=99), "freeze and save the model again"),
        (lambda m: m["versions"][0]["sizes"]["guards"].append("__import__('os')"), "an expression of sizes"),
        (lambda m: m["versions"][0]["program"]["nodes"].pop(0), "no frozen model that can run here"),
        (lambda m: m["versions"][0]["program"]["state"].clear(), "no frozen model that can run here"),
        (lambda m: m["versions"][0]["program"]["nodes"].append(
            {"op": "call", "name": "aten::zero_", "args": [{"ref": "x"}], "out": ["y"]}),
         "no operator 'aten::zero_'"),
        (lambda m: m["versions"][0]["program"]["nodes"].append(
            {"op": "call", "name": "aten::from_file", "args": ["/etc/passwd"] + [None] * 6, "out": ["y"]}),
         "no operator 'aten::from_file'"),
        (lambda m: m["versions"][0]["leaves"][0].update(dtype="save"), "no frozen model that can run here"),
    ],
)  # fmt: skip
def test_what_a_file_says_is_checked(saved, change, message):
    _, path = saved
    changed(path, change)
    with pytest.raises(ValueError, match=message):
        cf.load_frozen(path)


@torch.no_grad()
def test_a_file_of_another_processor_is_planned_anew(saved):
    frozen, path = saved
    changed(path, lambda m: m.update(processor="a machine that nobody has"))
    x = torch.randn(2, 3, 20)
    assert torch.allclose(cf.load_frozen(path)(x), frozen(x), atol=1e-6)


def test_what_has_no_program_is_not_saved(tmp_path):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match=r"no program to save: .*random"):
        cf.freeze(Noise(), torch.zeros(2)).save(tmp_path / "noise.cf")
    assert not list(tmp_path.iterdir())


def test_expressions_of_sizes():
    assert compiled("(a // 2) * max(b, 3) == 12", ["a", "b"])({"a": 9, "b": 1})
    assert not compiled("a % 2 == 0 and b > 1", ["a", "b"])({"a": 3, "b": 2})
    for wrong in ("a.b", "open('x')", "c + 1", "(lambda: 1)()", "[a]", "a ** b", "2 ** 99999",
                  "a if b else 1", "'x'", "max(a, key=b)", "x:=1", ""):  # fmt: skip
        with pytest.raises(ValueError, match="expression of sizes"):
            compiled(wrong, ["a", "b"])
