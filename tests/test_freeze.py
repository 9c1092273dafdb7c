"""``cf.freeze``: what a frozen model is to its user; random models; what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading

import pytest
import torch
from helpers import SEED, UNIT, assert_close_as_torch, needs_extension
from torch import nn

import cnnlstm_fast as cf
from cnnlstm_fast.ops.program import BLOCK_PLANS

pytestmark = needs_extension


def small(seed_norm: bool = True) -> nn.Module:
    """A CNN in front of a recurrent layer: (B, 3, H, W) -> (B, 5)."""
    model = cf.reference.CNN_LSTM_Simple(3, 9, 1, 5)
    return model.eval()


class Tagger(nn.Module):
    """Signals (B, 4, T) -> (B, T', 3): norms, residual sums, activations of all kinds, several results."""

    def __init__(self, rng: random.Random):
        super().__init__()
        channels = rng.choice([3, 8, 17])
        self.first = nn.Conv1d(4, channels, rng.choice([1, 3, 5]), padding=rng.choice([0, 1, "same"]))
        self.norm = nn.BatchNorm1d(channels)
        self.act = rng.choice(
            [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(0.7), nn.SiLU(), nn.GELU(), nn.GELU("tanh"),
             nn.Tanh(), nn.Sigmoid(), nn.Softplus(2.0, 5.0), nn.Identity(),
             nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softsign()]
        )  # fmt: skip
        self.mix = nn.Conv1d(
            channels, channels, 3, padding=1, groups=1 if channels != 8 else rng.choice([1, 2, 8])
        )
        self.late = rng.choice([nn.ReLU(), nn.LeakyReLU(), nn.GELU()])
        self.pool = rng.choice([nn.MaxPool1d(2), nn.AvgPool1d(3, 1, 1), nn.Identity(), nn.MaxPool1d(3, 1, 1)])
        kind = rng.choice([nn.LSTM, nn.GRU])
        self.rnn = kind(
            channels, rng.choice([4, 11]), rng.choice([1, 2]), batch_first=rng.random() < 0.5,
            bidirectional=rng.random() < 0.5, bias=rng.random() < 0.8,
        )  # fmt: skip
        width = self.rnn.hidden_size * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 3, bias=rng.random() < 0.8)
        self.drop = nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.rand(channels, 1) + 0.5)

    def forward(self, x):
        y = self.act(self.norm(self.first(x)))
        y = self.drop(self.pool(self.late(y + self.mix(y) * self.scale - 0.25)))
        y = y.transpose(1, 2) if self.rnn.batch_first else y.permute(2, 0, 1)
        out, state = self.rnn(y)
        h = state[0] if isinstance(state, tuple) else state
        out = self.head(out if self.rnn.batch_first else out.transpose(0, 1))
        return {"tags": out, "softmax": out.softmax(-1), "states": (h, out.shape[1])}


def freshen(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.normal_(m.running_mean)
    return model.eval()


@pytest.mark.some(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(12))
@torch.no_grad()
def test_random_models_at_sizes_never_seen(dtype, number):
    rng = random.Random(torch.initial_seed() * 100 + number)
    model = freshen(Tagger(rng)).to(dtype)
    frozen = cf.freeze(model, torch.randn(rng.choice([1, 3]), 4, rng.choice([20, 33])).to(dtype))
    assert len(frozen._versions) == 1, frozen.why_not
    assert sum(node["op"] == "block" for node in frozen._versions[0].data["nodes"]) == 2
    rounding = torch.finfo(dtype).eps / 2
    for _ in range(4):
        x = torch.randn(rng.randint(1, 9), 4, rng.randint(10, 60)).to(dtype)
        got, expected = frozen(x), model(x)
        true = copy.deepcopy(model).double()(x.double())
        assert got.keys() == expected.keys() and got["states"][1] == expected["states"][1]
        nudged = [
            model((x.double() * (1 + rounding * torch.randn_like(x.double()))).to(dtype)) for _ in range(6)
        ]
        for name in ("tags", "softmax"):
            ways = [expected[name], *(n[name] for n in nudged)]
            assert_close_as_torch(got[name], ways, true[name], f"{name} of {model}")
            assert got[name].stride() == expected[name].stride()
        ways = [expected["states"][0], *(n["states"][0] for n in nudged)]
        assert_close_as_torch(got["states"][0], ways, true["states"][0], f"state of {model}")
    assert len(frozen._versions) == 1


@torch.no_grad()
def test_outputs_belong_to_the_caller_and_inputs_stay():
    model = small()
    frozen = cf.freeze(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    kept, first = x.clone(), frozen(x)
    value = first.clone()
    for _ in range(5):
        frozen(torch.randn(4, 3, 8, 8))
    assert torch.equal(first, value) and torch.equal(x, kept)
    first.zero_()
    assert torch.equal(frozen(x), value)


@torch.no_grad()
def test_a_result_that_is_the_input_and_one_that_is_its_copy():
    class Both(nn.Module):
        def forward(self, x):
            return x, x.clone(), x.relu(), x[:1]

    x = torch.randn(3, 4)
    same, own, _, part = cf.freeze(Both(), torch.randn(2, 4))(x)
    assert same.data_ptr() == x.data_ptr() == part.data_ptr() != own.data_ptr()
    assert torch.equal(own, x)


@torch.no_grad()
def test_weights_that_change_are_taken_by_refresh_and_by_load_state_dict():
    model, other = small(), small()
    frozen = cf.freeze(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    before = frozen(x)
    for p in model.parameters():
        p.mul_(0.5)
    assert torch.equal(frozen(x), before)
    frozen.refresh()
    assert torch.allclose(frozen(x), model(x), atol=1e-6) and not torch.allclose(frozen(x), before)
    frozen.load_state_dict(other.state_dict())
    assert torch.allclose(frozen(x), other(x), atol=1e-6)
    frozen.load_state_dict({k: v * 2 for k, v in other.state_dict().items()}, assign=True)
    other.load_state_dict({k: v * 2 for k, v in other.state_dict().items()})
    assert torch.allclose(frozen(x), other(x), atol=1e-6)
    with pytest.raises(RuntimeError, match="Missing key"):
        frozen.load_state_dict({})


@torch.no_grad()
def test_to_another_dtype_and_inputs_of_another():
    model = small()
    frozen = cf.freeze(copy.deepcopy(model), torch.randn(1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    for wrong in (x.double(), x.long(), x[0, 0], x[:, :2], torch.randn(2, 3, 1, 1), x.to("meta")):
        try:
            model(wrong)
        except Exception as error:  # the same class, from the same place
            with pytest.raises(type(error)):
                frozen(wrong)
    assert frozen.double() is frozen
    assert torch.allclose(frozen(x.double()), copy.deepcopy(model).double()(x.double()))
    assert torch.allclose(frozen.float()(x), model(x), atol=1e-6)


@torch.no_grad()
def test_strides_of_inputs_and_results():
    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x)).relu()
            return y, nn.functional.max_pool2d(y, 2), y + x.sum(1, keepdim=True), y.flatten(2)

    model = freshen(Map())
    frozen = cf.freeze(model, torch.randn(2, 3, 9, 8))
    x = torch.randn(4, 3, 12, 10)
    for given in (
        x, x.contiguous(memory_format=torch.channels_last), x[..., ::2], x.transpose(2, 3), x[:, :, 1:, 1:],
        x[:1].expand(4, -1, -1, -1), x.flip(0), x[:1],
    ):  # fmt: skip
        for got, expected in zip(frozen(given), model(given), strict=True):
            assert got.stride() == expected.stride()
            assert torch.allclose(got, expected, atol=1e-5)


def test_gradients_are_refused_in_words():
    frozen = cf.freeze(small(), torch.randn(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="gives no gradients"):
        frozen(x)
    with torch.no_grad():
        assert not frozen(x).requires_grad
    assert not frozen(x.detach()).requires_grad
    with torch.inference_mode():
        assert frozen(torch.randn(2, 3, 8, 8)).is_inference()
    with pytest.raises(RuntimeError, match="does not train"):
        frozen.train()
    assert frozen.eval() is frozen.train(False) is frozen and not frozen.training


@torch.no_grad()
def test_modes_run_as_the_model():
    model = small()
    frozen = cf.freeze(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == model(x).dtype
    linear = nn.Linear(8, 2)
    mapped = torch.func.vmap(cf.freeze(linear, x))(x)
    assert torch.allclose(mapped, linear(x), atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(frozen(x), model(x), atol=1e-6)


@torch.no_grad()
def test_nan_and_infinities_stand_where_pytorch_puts_them():
    model = freshen(nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)))
    frozen = cf.freeze(model, torch.randn(2, 2, 12, 12))
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 2, 17, 13)
        x[1, 0, 5, 6] = value
        got, true = frozen(x), copy.deepcopy(model).double()(x.double())
        assert_close_as_torch(got, model(x), true)


@torch.no_grad()
def test_the_same_bits_as_the_unfrozen_model_by_the_same_plan():
    layer = cf.LSTM(7, 20, 2, bidirectional=True)
    frozen = cf.freeze(layer, torch.randn(5, 2, 7))
    for steps, batch in ((1, 1), (9, 3), (4, 70)):
        x = torch.randn(steps, batch, 7)
        (a, (h, c)), (b, (hn, cn)) = frozen(x), layer(x)
        assert torch.equal(a, b) and torch.equal(h, hn) and torch.equal(c, cn)
    conv = cf.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    frozen = cf.freeze(conv, torch.randn(1, 3, 10, 10))
    x = torch.randn(2, 3, 14, 15)
    (block,) = (n for n in frozen._versions[0].data["nodes"] if n["op"] == "block")
    block["plans"] = [[1.0, "direct"]]
    frozen.refresh()
    same = cf.functional.conv_block(x, conv[0].weight, conv[0].bias, pool=conv[2], plan="direct")
    assert torch.equal(frozen(x), same)


@torch.no_grad()
@pytest.mark.some(12)
@pytest.mark.parametrize("plan", BLOCK_PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(12))
def test_blocks_by_every_plan(plan, dtype, number):
    """Those on weights that the program packs take every block, the others what they take unfrozen."""
    rng = random.Random(f"{SEED} {number}")
    rank = rng.choice([1, 2])
    conv, pool = (nn.Conv1d, nn.MaxPool1d) if rank == 1 else (nn.Conv2d, nn.MaxPool2d)
    width, groups = rng.choice([1, 3, 8, 40]), 1
    channels = rng.choice([5, 16, 33])
    if rng.random() < 0.25:
        width, groups = channels, rng.choice([n for n in (1, 3, 5, 11, 16, 33) if channels % n == 0])
    act = rng.choice([nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.Identity()])
    model = nn.Sequential(
        conv(width, channels, rng.choice([1, 3, 3, 5]), rng.choice([1, 1, 2]), rng.choice([0, 1, 2]),
             groups=groups, bias=rng.random() < 0.8),
        act, rng.choice([pool(2), pool(3, 2, 1), nn.Identity()]),
    ).to(dtype).eval()  # fmt: skip
    frozen = cf.freeze(model, torch.randn(2, width, *[17] * rank).to(dtype))
    (block,) = (n for n in frozen._versions[0].data["nodes"] if n["op"] == "block")
    block["plans"] = [[1.0, plan]]
    if dtype is torch.bfloat16 and plan in ("packed", "packed winograd"):
        if plan != "packed" or groups > 1 or not UNIT:
            with pytest.raises(RuntimeError, match=r"not transformed|one group|no unit"):
                frozen.refresh()
            return
    frozen.refresh()
    for size in ((2, 17, 17), (5, 13, 34), (1, 70, 9), (1, 13, 8)):
        x = torch.randn(size[0], width, *size[1 : 1 + rank]).to(dtype)
        assert_close_as_torch(frozen(x), model(x), copy.deepcopy(model).double()(x.double()))


@torch.no_grad()
def test_sixteen_threads_share_one():
    model = small()
    frozen = cf.freeze(model, torch.randn(1, 3, 8, 8))
    inputs = [torch.randn(1 + i % 5, 3, 6 + i % 4, 8) for i in range(16)]
    expected = [model(x) for x in inputs]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(frozen(inputs[i]), expected[i], atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@torch.no_grad()
def test_many_sizes_leave_memory_flat():
    model = nn.LSTM(3, 5).eval()
    frozen = cf.freeze(model, torch.randn(4, 1, 3))
    rng = random.Random(torch.initial_seed())

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def calls(count):
        for _ in range(count):
            frozen(torch.randn(rng.randint(1, 4000), 1, 3))

    calls(3000)
    before = resident()
    calls(7000)
    assert resident() - before < 8 * 2**20
    assert len(frozen._routes) <= 2048


@torch.no_grad()
def test_copies_and_pickles():
    model = small()
    frozen = cf.freeze(model, torch.randn(1, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    twin = copy.deepcopy(frozen)
    expected = frozen(x)
    assert torch.equal(twin(x), expected)
    for p in twin.parameters():
        p.zero_()
    twin.refresh()
    assert torch.equal(frozen.refresh()(x), expected) and not torch.equal(twin(x), expected)
    with pytest.raises(TypeError, match=r"save\(path\)"):
        pickle.dumps(frozen)


@torch.no_grad()
def test_programs_end_with_their_model():
    frozen = cf.freeze(small(), torch.randn(1, 3, 8, 8))
    number, x = frozen._versions[0].program.whole, torch.randn(1, 3, 8, 8)
    torch.ops.cnnlstm_fast.program_run(number, [x])
    del frozen
    gc.collect()
    with pytest.raises(RuntimeError, match="there is no program"):
        torch.ops.cnnlstm_fast.program_run(number, [x])


@torch.no_grad()
def test_what_has_no_program_runs_as_the_model():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU())
            self.rnn = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            y = self.cnn(x)
            if y.sum() > 0:
                y = -y
            return self.rnn(y.transpose(1, 2))[0]

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = Branch().eval()
    frozen = cf.freeze(model, torch.randn(2, 2, 9))
    assert frozen.why_not and not frozen._versions
    assert [name for name, m in frozen._pieces.named_modules() if isinstance(m, type(frozen))] == [
        "cnn",
        "rnn",
    ]
    for shape in ((2, 2, 9), (1, 2, 20)):
        x = torch.randn(shape)
        assert torch.allclose(frozen(x), model(x), atol=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.allclose(frozen.refresh()(x), model(x), atol=1e-6)
    noisy = cf.freeze(Noise(), torch.zeros(3))
    assert "random" in noisy.why_not[0] and not torch.equal(noisy(torch.zeros(3)), noisy(torch.zeros(3)))
    counts = Counts()
    frozen = cf.freeze(counts, torch.ones(2))
    calls = int(counts.calls)
    assert frozen(torch.ones(2)).tolist() == [calls + 1] * 2
    hooked = nn.Sequential(nn.Linear(2, 2))
    seen = []
    hooked[0].register_forward_hook(lambda *_: seen.append(1))
    frozen = cf.freeze(hooked, torch.ones(1, 2))
    seen.clear()
    frozen(torch.ones(1, 2))
    assert seen and "hook" in frozen.why_not[0]


@torch.no_grad()
def test_branches_on_sizes():
    class Branch(nn.Module):
        def forward(self, x):
            return x.cumsum(1) if x.shape[1] >= 8 else x.flip(1) if x.shape[1] != 5 else -x

    frozen = cf.freeze(Branch(), torch.randn(2, 6))
    for size in (1, 2, 5, 6, 7, 8, 30):
        x = torch.randn(3, size)
        assert torch.equal(frozen(x), Branch()(x)), size


@torch.no_grad()
def test_explain_says_what_runs():
    model = freshen(nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)))
    report = cf.explain(cf.freeze(model, torch.randn(1, 2, 20)), torch.randn(3, 2, 31))
    assert [s.op for s in report.stages] == ["", "Conv1d+relu+max pool"] and report.error is None
    assert report.stages[1].shape == (3, 8, 14) and report.stages[1].reason.startswith("timed")
    layer = cf.freeze(nn.LSTM(3, 4).eval(), torch.randn(2, 1, 3))
    assert cf.explain(layer, torch.randn(5, 2, 3)).stages[1].reason == "weights packed once"
    assert "WrongShape" in cf.explain(layer, torch.randn(5, 2, 4)).error
    elu = cf.freeze(nn.ELU(0.5), torch.randn(2, 3))
    x = torch.randn(4, 3)
    assert torch.equal(elu(x), nn.ELU(0.5)(x))
    assert "Python does" in cf.explain(elu, x).stages[1].reason


@torch.no_grad()
def test_in_another_dtype():
    model = small()
    frozen = cf.freeze(model, torch.randn(1, 3, 8, 8), dtype=torch.bfloat16)
    x = torch.randn(4, 3, 8, 8)
    got, expected = frozen(x), model(x)
    assert got.dtype == torch.float32 and next(frozen.parameters()).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    assert (got - expected).norm() < 3e-2 * expected.norm() and not torch.equal(got, expected)
    assert "one program" not in str(cf.explain(frozen, x)) and "Conv2d+relu" in str(cf.explain(frozen, x))


class Clip(nn.Module):
    """Frames (B, T, 3, H, W), one after the other, through layers of one weight each."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3))

    def forward(self, x):
        return torch.stack([self.cnn(x[:, t]) for t in range(x.shape[1])], 1)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_frames_in_bfloat16(threads):
    """Weights are folded once for all frames, and an input in float32 is rounded where it is read."""
    torch.set_num_threads(threads)
    model = freshen(Clip()).eval()
    frozen = cf.freeze(model, torch.randn(2, 4, 3, 20, 23), dtype=torch.bfloat16)
    (version,) = frozen._versions
    folded = [node for node in version.data["prelude"] if node["op"] == "folded"]
    assert len(folded) == 2
    blocks = [node for node in version.data["nodes"] if node["op"] == "block"]
    low, exact = copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()
    for plan in ("packed", "packed library") if UNIT else ("packed library",):
        for node in blocks:
            node["plans"] = [[1.0, plan]]
        version.rounds_its_input = plan == "packed"
        frozen.refresh()
        for batch, height in ((1, 20), (3, 31), (3, 31)):
            x = torch.randn(batch, 4, 3, height, 17)
            x.view(-1)[5] = float("nan")
            before = x.clone()
            for given in (x, x, x.transpose(3, 4).contiguous().transpose(3, 4)):
                found, plain = frozen(given), low(given.bfloat16()).float()
                assert found.dtype == torch.float32 and torch.equal(given.nan_to_num(), before.nan_to_num())
                true = exact(given.bfloat16().double())
                assert torch.equal(found.isnan(), true.isnan())
                assert_close_as_torch(
                    found.bfloat16().nan_to_num(), plain.bfloat16().nan_to_num(), true.nan_to_num(), plan
                )
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradients"):
        frozen(x.requires_grad_())


def test_wrong_calls():
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        cf.freeze(torch.relu, torch.randn(2))
    with pytest.raises(ValueError, match="example inputs"):
        cf.freeze(small())
    with pytest.raises(TypeError, match="floating dtype"):
        cf.freeze(small(), torch.randn(1, 3, 8, 8), dtype=torch.uint8)
