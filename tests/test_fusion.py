"""Programs in which something happens between a convolution and the end of its block, or a value escapes."""

import contextlib
import copy
import ctypes
import functools
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from twins import grid, on_grid

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import plan as fusion


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch):
    """Small blocks too are speculated, and those for which no fused plan is the fastest."""
    why_plain = fusion.FusionPlan._why_unfused
    monkeypatch.setattr(fusion.FusionPlan, "_why_unfused", lambda *args: why_plain(*args[:-1], handed=True))
    monkeypatch.setattr(fusion, "OVERHEAD_US", 0)


class Block(nn.Module):
    """A block whose forward calls ``between(self, name, value)`` after every step, on some calls only."""

    def __init__(self, between=lambda self, name, value: None, when=lambda call: call == 4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.between, self.when, self.calls, self.log = between, when, 0, []

    def forward(self, x):
        self.calls += 1
        self.x = x = x * 1
        now = self.when(self.calls)
        y = self.conv(x)
        if now:
            self.between(self, "conv", y)
        z = self.bn(y)
        if now:
            self.between(self, "norm", z)
        a = F.relu(z)
        if now:
            self.between(self, "activation", a)
        out = F.max_pool2d(a, 2)
        if now:
            self.between(self, "late", (y, z, a))
        self.x = None
        return out


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    on_grid(model)
    return copy.deepcopy(model), cf.accelerate(copy.deepcopy(model))


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def assert_alike(plain: nn.Module, fast: nn.Module, calls: int = 6, grad: bool = True) -> None:
    """Results, gradients of input and parameters, buffers and logs, call by call."""
    for _ in range(calls):
        x = grid(2, 3, 8, 6)
        seen = []
        for model in (plain, fast):
            model.zero_grad()
            given = x.clone().requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                out = model(given)
            values = [out]
            if grad:
                (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
                values += [given.grad, *(p.grad for p in model.parameters())]
            values += [*model.buffers(), *model.parameters(), *model.log]
            seen.append([v.detach().clone() if isinstance(v, Tensor) else v for v in values])
            model.log.clear()
        assert len(seen[0]) == len(seen[1])
        for ours, theirs in zip(seen[1], seen[0], strict=True):
            if isinstance(theirs, Tensor):
                close(ours, theirs)
            else:
                assert ours == theirs


@contextlib.contextmanager
def restored(t: Tensor):
    before = t.detach().clone()
    yield
    t.data.copy_(before)


#: What changes an operand or a statistic after the convolution, each by another way in.
CHANGES = {
    "input in place": lambda m: m.x.detach().mul_(0),
    "input data": lambda m: m.x.data.mul_(0),
    "input numpy": lambda m: m.x.detach().numpy().fill(0),
    "weight in place": lambda m: torch.no_grad()(m.conv.weight.mul_)(1.5),
    "weight data": lambda m: m.conv.weight.data.mul_(1.5),
    "weight numpy": lambda m: np.multiply(
        m.conv.weight.detach().numpy(), 1.5, out=m.conv.weight.detach().numpy()
    ),
    "bias inference": lambda m: torch.inference_mode()(m.conv.bias.data.add_)(0.5),
    "norm weight": lambda m: torch.no_grad()(m.bn.weight.mul_)(1.25),
    "norm bias data": lambda m: m.bn.bias.data.sub_(0.5),
    "running mean": lambda m: m.bn.running_mean.add_(0.5),
    "running var numpy": lambda m: m.bn.running_var.numpy().__imul__(2),
    "reads statistics": lambda m: m.log.append(m.bn.running_mean.clone()),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("when", ["always", "fourth call"])
@pytest.mark.parametrize("at", ["conv", "norm", "activation"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_between(change, at, when, mode):
    """A block has read its operands where eager reads them."""

    def between(self, name, value):
        if name == at:
            CHANGES[change](self)

    plain, fast = pair(Block(between, (lambda call: True) if when == "always" else lambda call: call == 4))
    # Where eager's own backward refuses what has changed, or would compute with it.
    refused = ("input", "weight") if at == "conv" else ("input", "weight", "norm", "running")
    grad = not change.startswith(refused)
    assert_alike(plain.train(mode == "train"), fast.train(mode == "train"), grad=grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("look", ["conv", "norm", "late"])
@pytest.mark.parametrize("change", [name for name in CHANGES if "numpy" not in name])
def test_what_changes_before_an_unexpected_look(change, look, mode):
    """What a block does not hand out is computed, if anybody holds it, before an operand changes."""

    def between(self, name, value):
        if name == look:
            CHANGES[change](self)
            self.log += [v.detach().clone() for v in (value if look == "late" else (value,))]

    plain, fast = pair(Block(between))
    grad = not change.startswith(
        ("input", "weight", "norm", "running")
    )  # eager's own backward refuses others
    assert_alike(plain.train(mode == "train"), fast.train(mode == "train"), grad=grad)


def test_values_that_linger_are_watched_once():
    """Watching for writes ends where a program keeps values in variables that it does not read."""

    class Lingering(Block):
        def forward(self, x):
            y = self.conv(x)
            z = F.relu(self.bn(y))
            for _ in range(12):
                z = z + 1
            self.log.append(torch._C._len_torch_dispatch_stack())
            return z

    fast = pair(Lingering().eval())[1]
    with torch.no_grad():
        for _ in range(4):
            fast(grid(2, 3, 8, 6))
    assert fast.log == [0, 1, 0, 0]
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_mode_entered_in_between():
    """Modes of the program's that are entered behind a convolution leave the stack as they came."""
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Entered(Block):
        def forward(self, x):
            y = self.conv(x)
            with Seeing():
                z = F.relu(self.bn(y))
                del y
                z = z.neg()
            return z.neg()

    plain, fast = pair(Entered().eval())
    assert_alike(plain, fast, grad=False)
    assert seen.count(torch.ops.aten.neg.default) == 12 and torch._C._len_torch_dispatch_stack() == 0


def test_a_weight_put_back():
    class Scaled(Block):
        def forward(self, x):
            before = self.conv.weight.detach().clone()
            with torch.no_grad():
                self.conv.weight.mul_(3.0)
            y = self.conv(x)
            with torch.no_grad():
                self.conv.weight.copy_(before)
            return F.max_pool2d(F.relu(y), 2)

    plain, fast = pair(Scaled().eval())
    assert_alike(plain, fast, grad=False)


def test_norms_in_another_order_than_their_activations():
    class Crossed(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x):
            y, z = self.conv(x), self.other(x)
            z = self.bn(z)
            self.log.append(self.bn.running_mean.clone())
            y = self.bn(y)
            return F.max_pool2d(F.relu(y), 2) + F.max_pool2d(F.relu(z), 2)

    assert_alike(*pair(Crossed()))


def keep(self, name, value):
    if name == "late":
        self.log += value


def look_late(self, name, value):
    if name == "late":
        self.log += [value[0].mean(), value[1].detach().numpy().sum(), value[2].sum()]


def retained(self, name, value):
    if name == "late":
        value[1].retain_grad()
        self.kept = value[1]


def hooked(which):
    def between(self, name, value):
        if name == which:
            value = value[1] if name == "late" else value
            if value.requires_grad:
                value.register_hook(lambda grad: self.log.append(grad.clone()))

    return between


def doubled(self, name, value):
    if name == "late" and value[0].requires_grad:
        value[0].register_hook(lambda grad: grad * 2)


ESCAPES = {
    "kept": keep,
    "looked at late": look_late,
    "retained": retained,
    "doubled late": doubled,
    **{f"hooked at {name}": hooked(name) for name in ("conv", "norm", "activation", "late")},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_values_that_escape(escape, mode, grad):
    """On the fourth call only, when the block is speculated."""
    if escape == "retained" and not grad:
        return
    plain, fast = pair(Block(ESCAPES[escape]))
    assert_alike(plain.train(mode == "train"), fast.train(mode == "train"), grad=grad)
    if escape == "retained":
        close(fast.kept.grad, plain.kept.grad)


def test_a_kept_value_is_that_of_its_call():
    """Read after the optimizer's step, with the weights of before."""

    class Keeps(Block):
        def forward(self, x):
            self.feature = self.conv(x)
            return F.max_pool2d(F.relu(self.feature), 2).mean((1, 2, 3))

    plain, fast = pair(Keeps())
    for _ in range(5):
        x = grid(2, 3, 8, 6)
        plain(x), fast(x)
        expected = plain.feature.detach().clone()
        with torch.no_grad():
            for p in (*plain.parameters(), *fast.parameters()):
                p.mul_(1.01)
        x.zero_()
        close(fast.feature.detach(), expected)


@pytest.mark.parametrize("what", ["returned", "logged", "yielded"])
def test_values_returned_on_some_calls(what):
    class Sometimes(Block):
        def forward(self, x):
            self.calls += 1
            y = self.conv(x)
            z = F.relu(y)
            out = F.max_pool2d(z, 2).mean((1, 2, 3))
            if self.calls % 3:
                return out
            if what == "logged":
                self.log.append(y)
            return (out, y, z) if what == "returned" else out

    plain, fast = pair(Sometimes())
    for call in range(1, 9):
        x = grid(2, 3, 8, 6)
        ours, theirs = fast(x), plain(x)
        if call % 3 or what == "yielded":
            close(ours, theirs)
        elif what == "logged":
            close(fast.log[-1], plain.log[-1])
        else:
            for mine, true in zip(ours, theirs, strict=True):
                close(mine, true)
            for at in (1, 2):
                (mine,) = torch.autograd.grad(ours[0].pow(2).sum(), ours[at], retain_graph=True)
                (true,) = torch.autograd.grad(theirs[0].pow(2).sum(), theirs[at], retain_graph=True)
                close(mine, true)
            close(
                torch.autograd.grad(ours[1].sum() + ours[0].sum(), fast.conv.weight)[0],
                torch.autograd.grad(theirs[1].sum() + theirs[0].sum(), plain.conv.weight)[0],
            )


def through_dlpack(y):
    return float(torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)).sum())


def through_its_address(y):
    buffer = (ctypes.c_float * y.numel()).from_address(y.data_ptr())
    return float(torch.frombuffer(buffer, dtype=torch.float32).sum())


#: Ways to a value's memory, of which some do not pass ``__torch_function__``.
ROUTES = {
    "dlpack capsule": through_dlpack,
    "from_dlpack": lambda y: float(torch.from_dlpack(y.detach()).sum()),
    "address": through_its_address,
    "numpy": lambda y: float(np.asarray(y.detach()).sum()),
    "storage": lambda y: float(torch.tensor(y.untyped_storage().tolist()[:8]).sum()),
    "pickle": lambda y: float(pickle.loads(pickle.dumps(y.detach())).sum()),
    "raw operator": lambda y: float(torch.ops.aten.sum.default(y)),
    "format": lambda y: f"{y.sum():.3f}",
    "tolist": lambda y: y.detach().flatten()[:3].tolist(),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("when", ["always", "fourth call"])
@pytest.mark.parametrize("at", ["conv", "norm", "activation"])
@pytest.mark.parametrize("route", ROUTES)
def test_ways_to_the_memory(route, at, when, grad):
    def between(self, name, value):
        if name == at:
            found = ROUTES[route](value)
            self.log.append(torch.tensor(found) if isinstance(found, float) else found)

    plain, fast = pair(Block(between, (lambda call: True) if when == "always" else lambda call: call == 4))
    for model in (plain, fast):
        model.eval()
    for _ in range(6):
        x = grid(2, 3, 8, 6)
        with torch.set_grad_enabled(grad):
            close(fast(x), plain(x))
    for ours, theirs in zip(fast.log, plain.log, strict=True):
        if isinstance(theirs, Tensor):
            close(ours, theirs)
        elif isinstance(theirs, str):
            assert float(ours) == pytest.approx(float(theirs), abs=2e-3)
        else:
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_identity_and_attributes(last, grad):
    class Marked(Block):
        def forward(self, x):
            y = self.conv(x)
            y.mark = 5
            z = F.relu_(y)
            self.log += [z is y, z.mark]
            return z if last else F.max_pool2d(z, 2)

    plain, fast = pair(Marked())
    assert_alike(plain, fast, grad=grad)


# ---------------------------------------------------------------- PyTorch's own machinery


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, Tensor):
                assert value.shape is not None
                value.detach().sum()
        return function(*args, **(kwargs or {}))


def test_a_mode_that_looks_at_arguments():
    plain, fast = pair(Block())
    for _ in range(3):
        x = grid(2, 3, 8, 6)
        with Watching():
            close(fast(x), plain(x))
        close(fast(x), plain(x))


@pytest.mark.parametrize("where", ["functional", "method"])
def test_a_patched_convolution(where, monkeypatch):
    calls = []
    if where == "functional":
        own = F.conv2d
        monkeypatch.setattr(
            F, "conv2d", lambda x, *args, **kw: (calls.append(x.shape), own(x, *args, **kw))[1]
        )
    else:
        method = nn.Conv2d._conv_forward

        def patched(self, x, weight, bias):
            calls.append(x.shape)
            return method(self, x, weight, bias)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", patched)
    plain, fast = pair(Block())
    for _ in range(4):
        x = grid(2, 3, 8, 6)
        calls.clear()
        expected = plain(x)
        before = len(calls)
        close(fast(x), expected)
        assert len(calls) == 2 * before == 2


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.pool, self.lstm, self.gru = nn.MaxPool2d(2), nn.LSTM(6 * 4, 5, batch_first=True), nn.GRU(5, 4)

    def forward(self, x):
        y = self.pool(self.relu(self.bn(self.conv(x))))
        return self.gru(self.lstm(y.permute(0, 3, 1, 2).flatten(2))[0])[0]


@pytest.mark.filterwarnings("ignore")
def test_eager_quantization():
    quantization = torch.ao.quantization
    plain, fast = pair(Modules().eval())
    x = grid(2, 3, 8, 6)
    for _ in range(3):
        fast(x)
    found = []
    for model in (plain, fast):
        model = quantization.fuse_modules(model, [["conv", "bn", "relu"]])
        values = [model(x) for _ in range(3)]
        model.conv.qconfig = quantization.default_qconfig
        quantization.prepare(model, inplace=True)
        values += [model(x) for _ in range(3)]
        found.append((values, type(quantization.convert(model).conv)))
    assert found[0][1] is found[1][1]
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("used", [False, True])
def test_torchscript(used):
    plain, fast = pair(Modules().eval())
    x = grid(2, 3, 8, 6)
    if used:
        for _ in range(3):
            fast(x)
    close(torch.jit.script(fast)(x), plain(x))
    close(torch.jit.script(fast.conv)(x), plain.conv(x))
    assert isinstance(fast.lstm, cf.LSTM)
    for _ in range(3):
        close(fast(x), plain(x))


# ---------------------------------------------------------------- lifetimes


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_and_models_die_at_once(grad, uncollected):
    """Without the garbage collector: after an observed call, after an exception, with the model."""

    def between(self, name, value):
        if name == self.fails_at:
            raise ValueError

    fast = cf.accelerate(Block(between, lambda call: call > 2))
    with torch.set_grad_enabled(grad):
        for fails_at in ("nowhere", "nowhere", "nowhere", "conv", "norm", "activation", "late"):
            fast.fails_at = fails_at
            x = grid(2, 3, 8, 6)
            alive = weakref.ref(x)
            with contextlib.suppress(ValueError):
                fast(x)
            fast.x = None
            del x
            assert alive() is None, fails_at
    conv = weakref.ref(fast.conv)
    del fast
    assert conv() is None


def test_an_interrupt_ends_the_session():
    """PyTorch calls no hook after a KeyboardInterrupt; what was held becomes plain in the next call."""

    def between(self, name, value):
        if name == "conv":
            self.held = value
            raise KeyboardInterrupt

    plain, fast = pair(Block(between))
    x = grid(2, 3, 8, 6)
    for call in range(1, 7):
        if call == 4:
            for model in (plain, fast):
                with pytest.raises(KeyboardInterrupt):
                    model(x)
        else:
            close(fast(x), plain(x))
    assert type(fast.held) is Tensor
    close(fast.held, plain.held)


def test_threads_have_sessions_of_their_own():
    plain, fast = pair(Block(when=lambda call: False).eval())
    inputs = [grid(2, 3, 8, 6) for _ in range(4)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    wrong = []

    def run(i):
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(fast(inputs[i]), expected[i], rtol=1e-4, atol=1e-4):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_convolution_called_outside_of_any_forward_runs_as_it_is():
    plain, fast = pair(Block())
    x = grid(2, 3, 8, 6)
    for _ in range(4):
        y, expected = fast.conv(x), plain.conv(x)
        assert type(y) is Tensor
        close(y, expected)
    assert "outside" in fast.report().sites[0].reason


@pytest.mark.parametrize("change", ["weights channels-last", "frozen convolution"])
def test_what_a_shape_does_not_tell(change):
    plain, fast = pair(Block(when=lambda call: False))
    for call in range(6):
        if call == 3:
            for model in (plain, fast):
                if change == "frozen convolution":
                    model.conv.requires_grad_(False)
                else:
                    model.to(memory_format=torch.channels_last)
        x = grid(2, 3, 8, 6)
        ours, theirs = fast(x), plain(x)
        assert ours.stride() == theirs.stride() and ours.requires_grad == theirs.requires_grad
        close(ours, theirs)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("steps", ["norm", "norm and pool", "gelu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_biases_may_change_before_the_backward(steps, mode, again):
    """PyTorch's operators do not save them; second derivatives read what they were."""
    chain = {
        "norm": [nn.BatchNorm2d(6)],
        "norm and pool": [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)],
        "gelu": [nn.GELU()],
    }[steps]
    plain, fast = pair(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *chain).train(mode == "train"))
    for _ in range(3):
        x, found = grid(2, 3, 8, 6), []
        for model in (plain, fast):
            given = x.clone().requires_grad_()
            out = model(given)
            with torch.no_grad():
                model[0].bias.add_(0.125)
            loss = (out * torch.arange(out.numel()).view(out.shape).cos()).sum()
            grads = torch.autograd.grad(loss, [given, model[0].weight], create_graph=again)
            if again:
                total = sum(g.square().sum() for g in grads)
                grads += torch.autograd.grad(total, [model[0].weight])
            found.append(grads)
        for ours, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_map_of_one_place_lies_as_pytorchs():
    """It is contiguous in any layout; its strides say which one the next convolution writes."""
    plain, fast = pair(nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 3, padding=2), nn.ReLU(),
    ))  # fmt: skip
    for grad in (True, False):
        for _ in range(4):
            x = grid(2, 3, 8, 6)
            with torch.set_grad_enabled(grad):
                ours, theirs = fast(x), plain(x)
            assert ours.stride() == theirs.stride()
            close(ours, theirs)


def test_gradients_at_a_map_that_is_handed_on():
    """Asked for within the forward, and by a hook."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
            self.log, self.calls = [], 0

        def forward(self, x):
            self.calls += 1
            y = F.relu(self.conv(x))
            z = self.other(y)
            if self.calls > 3 and z.requires_grad:
                y.register_hook(lambda grad: self.log.append(grad.clone()))
                self.log += torch.autograd.grad(z.sum(), y, retain_graph=True)
            return F.relu(z)

    assert_alike(*pair(Inside()))


@pytest.mark.parametrize("grad", [False, True])
def test_a_value_within_a_transform(grad):
    def between(self, name, value):
        if name == "conv":
            self.log.append(torch.func.vmap(torch.tanh)(value))

    assert_alike(*pair(Block(between).eval()), grad=grad)


def test_a_step_within_a_checkpoint():
    """Behind a convolution that stands before it; which counts what its steps save."""

    class Half(Block):
        def forward(self, x):
            self.calls += 1
            y = self.conv(x)
            if self.calls % 3 == 2:
                return checkpoint(F.relu, y, use_reentrant=False)
            return F.relu(y)

    assert_alike(*pair(Half()))


def test_a_convolution_that_is_used_in_two_ways():
    """Its weight changes before the second use is looked at."""

    class Twice(Block):
        def forward(self, x):
            z = F.relu(self.conv(x))
            y = self.conv(x)
            self.conv.weight.data.neg_()
            return z + y

    plain, fast = pair(Twice())
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(4):
            x = grid(2, 3, 8, 6)
            with mode():
                close(fast(x), plain(x))


def test_partial_hooks_see_values():
    class Saves(Block):
        def __init__(self):
            super().__init__()
            self.found = {}
            self.bn.register_forward_hook(functools.partial(self.save, "bn"))

        def save(self, name, module, args, output):
            self.found[name] = output

    plain, fast = pair(Saves())
    for _ in range(5):
        x = grid(2, 3, 8, 6)
        close(fast(x), plain(x))
        close(fast.found["bn"], plain.found["bn"])
