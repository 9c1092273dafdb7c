"""Maps that lie channels-last from convolution to convolution, where PyTorch's are contiguous."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerated import Kinks, ReluInside, assert_alike, assert_same_gradients, close, module_with, pair
from forked import run_forked
from helpers import assert_close_as_torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from twins import grid, real_strides

import cnnlstm_fast as cf
from cnnlstm_fast.functional.conv_block import plan_call
from cnnlstm_fast.fusion import carry, run
from cnnlstm_fast.fusion.carry import CarriedMap
from cnnlstm_fast.planning import costs
from cnnlstm_fast.planning.problem import lies_channels_last

pytestmark = pytest.mark.usefixtures("always_worth_it")


#: What a forward does with a block's result that used to go to the next convolution alone.
LOOKS = {
    "strides": lambda self, y: y * float(y.stride(1) == y.shape[2] * y.shape[3]),
    "contiguous": lambda self, y: y * float(y.is_contiguous()),
    "view": lambda self, y: y.view(-1).view(y.shape),
    "storage": lambda self, y: y + y.detach().as_strided((1,), (1,), 5),
    "data": lambda self, y: (y.data.mul_(2), y)[1],
    "data_ptr": lambda self, y: y * float(y.data_ptr() != 0),
    "in place": lambda self, y: (y.mul_(2), y)[1],
    "in place activation": lambda self, y: F.leaky_relu(y.sub_(1), inplace=True),
    "into a slice": lambda self, y: (y[:, 1].fill_(0.5), y)[1],
    "residual": lambda self, y: self.other(y) + y,
    "another use before": lambda self, y: y + 0 * y.view(-1).sum(),
    "pickle": lambda self, y: y + pickle.loads(pickle.dumps(y.detach())),
    "deepcopy": lambda self, y: y + copy.deepcopy(y.detach()),
    "numpy": lambda self, y: y + float(y.detach().numpy().reshape(-1)[7]),
    "iteration": lambda self, y: torch.stack(list(y)),
    "raw op": lambda self, y: torch.ops.aten.relu.default(y),
    "custom function": lambda self, y: ReluInside.apply(y),
    "hook": lambda self, y: (y.register_hook(lambda g: g * 3) if y.requires_grad else 0, y)[1],
    "plain convolution": lambda self, y: F.conv2d(y, self.other.weight, None, padding=1),
    "tangents": lambda self, y: torch.func.jvp(torch.tanh, (y,), (y,))[0],
    "another mode": lambda self, y: torch.no_grad()(torch.relu)(y) + y,
    "checkpoint": lambda self, y: checkpoint(torch.tanh, y, use_reentrant=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pooled", [False, True], ids=["activation", "pool"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("look", LOOKS)
def test_what_looks_at_a_carried_map(look, mode, pooled, monkeypatch):
    """A map is PyTorch's as soon as anything else looks at it than what carries it on."""
    layouts = []
    run_block = run.run_block

    def noted(*args, **kwargs):
        layouts.append(kwargs.get("layout"))
        return run_block(*args, **kwargs)

    def forward(self, x):
        y = F.hardtanh(self.bn(self.conv(x)), 0.0, 6.0)  # whose result may change in place
        y = F.max_pool2d(y, 2) if pooled else y
        if self.flag:
            y = LOOKS[look](self, y)
        return F.relu(self.other(y)) + 0

    monkeypatch.setattr(run, "run_block", noted)
    model = module_with(forward).train(mode == "train")
    nn.init.constant_(model.bn.bias, 0.377)  # of whole numbers many are their mean, where the slope is a tie
    nn.init.constant_(model.other.bias, 0.291)  # and what the first activation stops is zero
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for call, flag in enumerate((False, False, False, False, False, True, False, True)):
        fast.flag = twin.flag = flag
        x = grid(2, 3, 8, 6).requires_grad_()
        layouts.clear()
        got, expected = fast(x), twin(x)
        assert call != 4 or "channels_last" in layouts
        assert type(got) is Tensor and got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(got, expected, x, fast, twin)
        del got
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)


class Carried(nn.Module):
    """Two convolutions, and a call between them that carries the map on."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.conv, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.norm = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(6)
        self.given: list = []

    def forward(self, x):
        y, z = self.conv(x), self.other(self.conv(x))
        y, first = self.call(self, y, z), y
        first.sum()  # a map that nobody reads may have been read past PyTorch's functions
        self.given.append(type(y))
        return self.last(y[:, :6] if y.shape[1] > 6 else y)


#: Calls that carry a map on; the second one is another such map.
CARRY = {
    "in place": lambda self, y, z: F.relu(z + 0.25, inplace=True),
    "in place method": lambda self, y, z: (z * 1.0).relu_(),
    "in place, twice": lambda self, y, z: F.leaky_relu(F.hardtanh_(z * 2.0, -3, 3), 0.5, True),
    "in place, whose first value is held": lambda self, y, z: F.relu_(z * 1.0) + z,
    "activation": lambda self, y, z: torch.tanh(F.silu(z * 0.5)),
    "max pool": lambda self, y, z: F.max_pool2d(z * 1.0, 2),
    "average pool": lambda self, y, z: F.avg_pool2d(z * 1.0, 2, 1),
    "adaptive pool": lambda self, y, z: F.adaptive_avg_pool2d(z * 1.0, (3, 4)),
    "norm": lambda self, y, z: self.norm(z * 1.0),
    "norm of a sum": lambda self, y, z: F.relu(self.norm(y + z), inplace=True),
    "sum": lambda self, y, z: torch.add(y * 1.0, z, alpha=0.5),
    "sum in place": lambda self, y, z: (y * 1.0).add_(z),
    "sum and a plain tensor": lambda self, y, z: z * 1.0 + torch.ones(z.shape),
    "plain tensor and a sum": lambda self, y, z: torch.ones(z.shape) + z * 1.0,
    "product": lambda self, y, z: (y * 1.0) * z,
    "scale by channel": lambda self, y, z: (z * 1.0) * torch.arange(1.0, 7).view(1, 6, 1, 1),
    "gate": lambda self, y, z: z * torch.sigmoid(F.adaptive_avg_pool2d(z * 1.0, 1)),
    "channels side by side": lambda self, y, z: F.relu(torch.cat([y, z], 1)),
    "as a keyword": lambda self, y, z: torch.concat(tensors=(y, z), dim=-3),
    "beside a plain tensor": lambda self, y, z: torch.cat([y + z, torch.ones(z.shape)], 1),
    "nothing": lambda self, y, z: F.dropout(z * 1.0, 0.5, False),
    "in place without gradients": lambda self, y, z: (torch.no_grad()(F.relu_)(v := z * 1.0), v + y)[1],
}


class Count(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def under(mode, call):
    def run(self, y, z):
        with mode(self):
            return call(self, y, z)

    return run


#: Programs that would see that other operators run.
WATCHED = {
    "checkpoint": lambda self, y, z: checkpoint(lambda t: F.relu(self.norm(t)), z * 1.0, use_reentrant=False),
    "saved tensors": under(lambda self: torch.autograd.graph.save_on_cpu(), CARRY["norm of a sum"]),
    "dispatch mode": under(lambda self: Count(self.given), CARRY["norm of a sum"]),
    "function mode": under(lambda self: Kinks(), CARRY["norm of a sum"]),
    "tangents": lambda self, y, z: torch.func.jvp(torch.tanh, (z * 1.0,), (z * 1.0,))[1],
}


def assert_calls_alike(call, mode: str, kind: type) -> tuple[nn.Module, nn.Module]:
    """Five calls as PyTorch's: results, strides, gradients and buffers.

    The last one gives a ``kind``.
    """
    model = Carried(call).train(mode == "train")
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for _ in range(5):
        x = torch.randn(2, 3, 9, 8).requires_grad_()
        fast.given, twin.given = [], []
        got, expected = fast(x), twin(x)
        assert type(got) is Tensor and got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(got, expected, x, fast, twin)
        torch.testing.assert_close(dict(fast.named_buffers()), dict(twin.named_buffers()))
    assert fast.given[-1] is kind and twin.given[-1] is Tensor
    return fast, twin


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("call", WATCHED)
def test_nothing_is_carried_where_somebody_watches(call, mode):
    assert_calls_alike(WATCHED[call], mode, Tensor)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("call", CARRY)
def test_what_carries_a_map_on(call, mode):
    fast, twin = assert_calls_alike(CARRY[call], mode, CarriedMap)
    with torch.inference_mode():
        for _ in range(5):
            x = torch.randn(2, 3, 9, 8)
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)
    assert fast.given[-1] is CarriedMap


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("call", CARRY)
def test_what_carries_a_map_on_under_autocast(call, mode):
    """In bfloat16: dtypes and strides as PyTorch's, and errors by the numbers rule."""
    model = Carried(CARRY[call]).train(mode == "train")
    fast, twin, exact = (
        cf.accelerate(copy.deepcopy(model)),
        copy.deepcopy(model),
        copy.deepcopy(model).double(),
    )
    found = {}
    for _ in range(5):
        x = torch.randn(4, 3, 19, 18)
        for way, net, given in (("fast", fast, x), ("twin", twin, x), ("exact", exact, x.double())):
            net.given = []
            given = given.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
                out = net(given)
            leaves = [given, *net.parameters()]
            grads = torch.autograd.grad(out.double().square().sum(), leaves, allow_unused=True)
            found[way] = out, torch.cat([grad.flatten() for grad in grads if grad is not None])
        (got, _), (expected, _) = found["fast"], found["twin"]
        assert got.dtype == expected.dtype == torch.bfloat16 and got.stride() == expected.stride()
        for name, *values in zip(("result", "gradients"), *found.values(), strict=True):
            assert_close_as_torch(*values, name)
    assert fast.given[-1] is CarriedMap and twin.given[-1] is Tensor


def test_one_channel_that_is_computed_again():
    """Its image is contiguous and channels-last; its strides say which one the convolution writes."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).train()
    fast, x = cf.accelerate(model), torch.randn(1, 1, 9, 11).requires_grad_()
    for _ in range(4):
        fast(x)
    changed = {name: -p.detach() for name, p in model.named_parameters()}
    got, expected = (torch.func.functional_call(m, changed, x) for m in (fast, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.stride() == expected.stride()


def test_a_map_that_is_read_past_pytorchs_functions_is_not_carried():
    """As an extension does, or here ``vmap``: its reader may take its memory for PyTorch's."""
    model = Carried(lambda self, y, z: torch.func.vmap(torch.tanh)(z * 1.0)).eval()
    fast, layouts = cf.accelerate(model), []
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(2, 3, 9, 8)
            torch.testing.assert_close(fast(x), model(x))
            layouts.append(fast.given[-1])
    assert layouts == [Tensor] * 5
    assert [*fast.conv._conv_forward.decisions.by_kind.values()] == [False]


def test_random_numbers_are_those_of_pytorch():
    """Dropout draws in the order of memory, so its map is PyTorch's."""
    model = Carried(lambda self, y, z: F.dropout2d(F.dropout(z * 1.0, 0.5), 0.5)).train()
    fast, x = cf.accelerate(model), torch.randn(2, 3, 9, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        got = fast(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


def test_statistics_of_carried_batches_are_as_exact_as_pytorchs():
    """PyTorch's own of channels-last batches are not: it sums them in float32."""
    model = Carried(lambda self, y, z: self.norm(z * 1.0 + 50.0)).train()
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    fast, error = cf.accelerate(copy.deepcopy(model)), {}
    for _ in range(5):
        x = torch.randn(16, 3, 60, 40)
        exact(x.double())
        for way, found in (("fast", fast), ("plain", plain)):
            found(x)
            error[way] = []
            for name in ("running_mean", "running_var"):
                ours, theirs = (dict(m.named_buffers())[f"norm.{name}"] for m in (found, exact))
                error[way].append((ours - theirs).abs().max())
    assert fast.given[-1] is CarriedMap
    assert all(a <= 2 * b + 4e-6 for a, b in zip(error["fast"], error["plain"], strict=True))


def ruled(monkeypatch, us, conversion_us=0.0):
    """Sites take ``us(channels, last)`` by PyTorch and as blocks, conversions and calls what is given."""

    def plan_block(x, conv, norm, activation, pool, layout):
        call = plan_call(x, conv.weight, conv.bias, *conv[2:], norm, activation, pool, layout)
        took = float(us(conv.weight.shape[1], lies_channels_last(x)))
        return call._replace(choice=call.choice._replace(us=took, saves_us=0.0, reason="ruled"))

    monkeypatch.undo()
    monkeypatch.setattr(run, "plan_block", plan_block)
    monkeypatch.setattr(costs, "conversion_us", lambda *args: conversion_us)
    monkeypatch.setattr(carry, "_CALL_US", 0.0)


@pytest.mark.parametrize(
    ("us", "conversion_us", "carries"),
    [
        (lambda c, last: 100 - 10 * last, 0, True),
        (lambda c, last: 100 - 1 * last, 0, False),  # less than predictions may err by
        (lambda c, last: 100 - 10 * last, 16, False),  # one conversion as the map leaves, one as it enters
        (lambda c, last: 100 - 10 * last, 10, True),
        (lambda c, last: 100 + 10 * last, 0, False),
        (lambda c, last: 100 - 20 * last * (c < 8) + 90 * last * (c == 8), 3, True),  # the last one leaves
    ],
)
def test_the_whole_model_decides(us, conversion_us, carries, monkeypatch):
    ruled(monkeypatch, us, conversion_us)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 8, 3),
    ).eval()  # fmt: skip
    fast, x = cf.accelerate(model), torch.randn(2, 3, 12, 13)
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(fast(x), model(x))
    (decision,) = fast[0]._conv_forward.decisions.by_kind.values()
    assert decision == carries


def test_images_of_a_new_size_are_taken_for_like_the_last_ones(monkeypatch):
    """As text of any width is; what is added up then decides for that size."""
    ruled(monkeypatch, lambda c, last: 100 - 40 * last)
    model = Carried(lambda self, y, z: F.relu(y + z)).eval()
    fast = cf.accelerate(model)
    decisions = fast.conv._conv_forward.decisions.by_kind
    with torch.no_grad():
        for width in (8, 8, 8, 8, 9, 10):
            x = torch.randn(2, 3, 9, width)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert [*decisions.values()] == [True] * 3 and fast.given[-1] is CarriedMap


def test_a_model_whose_maps_are_looked_at_no_longer_carries(monkeypatch):
    ruled(monkeypatch, lambda c, last: 100 - 40 * last, 30)

    class Seen(nn.Module):
        flag = False

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(c, 6, 3) for c in (1, 6, 6, 6))

        def forward(self, x):
            for conv in self.convs:
                x = conv(x)
                x = x.flatten(2).view(x.shape) if self.flag else x
            return x

    fast = cf.accelerate(Seen().eval())
    decisions = fast.convs[0]._conv_forward.decisions.by_kind
    for flag, carries in ((False, True), (True, False)):
        fast.flag = flag
        with torch.no_grad():
            for _ in range(5):
                x = torch.randn(2, 1, 20, 21)
                torch.testing.assert_close(fast(x), Seen.forward(fast, x), rtol=1e-4, atol=1e-4)
        assert [*decisions.values()] == [carries]


def test_weights_that_lie_channels_last():
    """Whose result is channels-last in PyTorch, whatever the input."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3).to(memory_format=torch.channels_last), nn.ReLU(),
        nn.Identity(),
    ).eval()  # fmt: skip
    fast, x = cf.accelerate(model), torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        for _ in range(3):
            got, expected = fast(x), model(x)
            torch.testing.assert_close(got, expected)
            assert real_strides(got) == real_strides(expected)


def test_a_map_of_one_place_lies_as_pytorchs():
    """It is contiguous in any layout; its strides say which one the next convolution writes."""
    plain, fast = pair(nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 3, padding=2), nn.ReLU(),
    ))  # fmt: skip
    for grad in (True, False):
        for _ in range(5):
            x = grid(2, 3, 8, 6)
            with torch.set_grad_enabled(grad):
                ours, theirs = fast(x), plain(x)
            assert ours.stride() == theirs.stride()
            close(ours, theirs)


def test_gradients_at_a_carried_map():
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


def test_without_compiled_kernels():
    """A model whose maps would be carried runs as PyTorch's."""
    ran = run_forked(
        """
import torch, warnings
import cnnlstm_fast as cf
from torch import nn
warnings.simplefilter("ignore")
model = nn.Sequential(nn.Conv2d(3, 32, 3, 2))
for _ in range(3):
    model.extend((nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2)))
model.eval()
x = torch.randn(2, 3, 130, 170)
with torch.no_grad():
    fast = cf.accelerate(model)
    for _ in range(4):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
print(cf._ext.loaded)
""",
        CNNLSTM_FAST_NO_EXTENSION="1", CNNLSTM_FAST_CARRY_GAIN="-1000000",
    )  # fmt: skip
    assert ran.stdout.strip() == "False", ran.stdout + ran.stderr[-2000:]
