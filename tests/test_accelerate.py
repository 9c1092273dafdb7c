"""Any model made fast by one line: the field's models, drop-in manners, and every known trap."""

import copy
import io
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from field_models import FIELD, freshen, more_inputs
from helpers import assert_close_as_torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from twins import grid, on_grid, real_strides

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.observe import ObservedTensor
from cnnlstm_fast.fusion.plan import FusionPlan
from cnnlstm_fast.fusion.site import ConvSite
from cnnlstm_fast.fusion.speculate import Placeholder
from cnnlstm_fast.planning.problem import lies_channels_last


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch):
    """Small blocks too are deferred, and those for which no fused plan is the fastest."""
    why_not = FusionPlan._why_unfused
    monkeypatch.setattr(FusionPlan, "_why_unfused", lambda *args: why_not(*args[:-1], handed=True))
    monkeypatch.setattr(sys.modules["cnnlstm_fast.fusion.plan"], "OVERHEAD_US", 0)


@pytest.fixture
def blocks(monkeypatch):
    """What ran as blocks: names of the norm, the activation and the pool of each."""
    seen = []
    run_block = run.run_block

    def noted(x, conv, *parts, **kwargs):
        seen.append(tuple(part and type(part).__name__ for part in parts))
        return run_block(x, conv, *parts, **kwargs)

    monkeypatch.setattr(run, "run_block", noted)
    return seen


def settle(module: nn.Module, *inputs) -> None:
    """Calls in which the module is observed."""
    for _ in range(2):
        module(*inputs)


def results(module: nn.Module, inputs, grad=None) -> dict[str, Tensor]:
    """The output, and with ``grad`` the gradients of the first input and of every parameter."""
    x = inputs[0].detach().requires_grad_(grad is not None)
    out = module(x, *inputs[1:])
    found = {"out": out.detach()}
    if grad is not None:
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out, [x, *named.values()], grad.to(out.dtype), allow_unused=True)
        found |= {name: g for name, g in zip(["x", *named], grads, strict=True) if g is not None}
    return found


def to_double(inputs):
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


def decided_inputs(model: nn.Module, make, draws: int = 20):
    """Inputs and a gradient for which rounding changes no activation's side and no pool's winner.

    Elsewhere PyTorch's own ways send gradients to different places. Judged in float64 by nudging
    the input by a few float32 roundings.
    """
    twin = copy.deepcopy(model).double()
    for _ in range(draws):
        inputs = make()
        with torch.no_grad():
            grad = torch.randn_like(copy.deepcopy(model)(*inputs))
        true = results(copy.deepcopy(twin), to_double(inputs), grad)
        for _ in range(3):
            nudged = to_double(inputs)
            nudged = (nudged[0] * (1 + 4e-7 * torch.randn_like(nudged[0])), *nudged[1:])
            other = results(copy.deepcopy(twin), nudged, grad)
            if any((other[n] - t).norm() > 2e-4 * t.norm() + 1e-12 for n, t in true.items()):
                break
        else:
            return inputs, grad
    raise AssertionError("no inputs found that rounding leaves alone")


def assert_like_eager(fast: nn.Module, model: nn.Module, inputs, grad) -> None:
    """Output, gradients and what is left in the buffers, by the numbers rule; ``model`` is the eager twin.

    Small models amplify a rounding error or two by luck, so PyTorch's ways include inputs one rounding off.
    """
    ways = []
    for _ in range(8):
        nudged = inputs[0] * (1 + 6e-8 * torch.randn_like(inputs[0], dtype=torch.float64))
        twin = copy.deepcopy(model)
        ways.append(
            results(twin, (nudged.to(inputs[0].dtype), *inputs[1:]), grad) | dict(twin.named_buffers())
        )
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for onednn in (True, False):
            twin = copy.deepcopy(model)
            for m in twin.modules():
                if isinstance(m, nn.Conv2d):
                    m.to(memory_format=memory_format)
            with torch.backends.mkldnn.flags(enabled=onednn):
                try:
                    ways.append(results(twin, inputs, grad) | dict(twin.named_buffers()))
                except RuntimeError:  # a view of its own that channels_last does not allow
                    assert memory_format is torch.channels_last
    twin = copy.deepcopy(model).double()
    true = results(twin, to_double(inputs), grad) | dict(twin.named_buffers())
    mine = results(fast, inputs, grad) | dict(fast.named_buffers())
    assert mine.keys() == true.keys()
    for name, got in mine.items():
        if not true[name].is_floating_point():
            assert torch.equal(got, true[name]), name
        elif name.endswith("bias") and grad is not None and true[name].norm() < 1e-12 < grad.norm():
            # The gradient of a bias before a norm: zero, and what is found is the rounding of sums.
            rounding = max(way[name].norm() for way in ways)
            assert got.norm() <= 1e-5 * grad.norm() + 2 * rounding, name
        else:
            assert_close_as_torch(got, [way[name] for way in ways], true[name], name)


# ---------------------------------------------------------------- models of the field


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FIELD)
def test_field_models(name, mode):
    kind, options = FIELD[name]
    model = freshen(kind(**kind.small, **options)).train(mode == "train")
    for m in model.modules():
        if isinstance(m, (nn.Dropout, nn.Dropout2d)):
            m.eval()
    fast = cf.accelerate(copy.deepcopy(model))
    state = copy.deepcopy(fast.state_dict())
    for shape in kind.inputs:

        def make(shape=shape):
            x = torch.randn(shape)
            return (x, *more_inputs(kind, x))

        inputs, grad = decided_inputs(model, make)
        for _ in range(2):
            results(fast, inputs, grad)
        fast.load_state_dict(state)
        assert_like_eager(fast, model, inputs, grad)
        fast.load_state_dict(state)
        with torch.no_grad():
            for _ in range(2):
                fast(*inputs)
            fast.load_state_dict(state)
            got = fast(*inputs)
            true = copy.deepcopy(model).double()(*to_double(inputs))
            assert_close_as_torch(got, [copy.deepcopy(model)(*inputs)], true, "without gradients")
        fast.load_state_dict(state)


#: Blocks that a call of each model runs, by (norm, activation, pool).
FOUND = {
    "crnn": [
        (None, "ReLU", "MaxPool2d"), (None, "ReLU", "MaxPool2d"), ("BatchNorm2d", "ReLU", None),
        (None, "ReLU", "MaxPool2d"), ("BatchNorm2d", "ReLU", None), (None, "ReLU", "MaxPool2d"),
        ("BatchNorm2d", "ReLU", None),
    ],
    "vgg_ocr": [("BatchNorm2d", "ReLU", "MaxPool2d")] * 4,
    "video": [("BatchNorm2d", "ReLU", None)] * 16,
    "speech": [("BatchNorm2d", "Hardtanh", None)] * 2,
    "masked_speech": [(None, None, None)] * 2,
    "atari": [(None, "ReLU", None)] * 3,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FIELD)
def test_what_is_found_in_field_models(name, mode, blocks):
    kind, options = FIELD[name]
    fast = cf.accelerate(kind(**kind.small, **options)).train(mode == "train")
    x = torch.randn(kind.inputs[0])
    inputs = (x, *more_inputs(kind, x))
    settle(fast, *inputs)
    blocks.clear()
    fast(*inputs)
    assert blocks == FOUND[name]


# ---------------------------------------------------------------- drop-in manners


class Net(nn.Module):
    """Two blocks, one by modules and one by functions, with a residual connection between."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 12, 5)
        self.note = {"any": ["thing"]}

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = F.leaky_relu(self.conv2(x), 0.2)
        y = self.bn3(self.conv3(y)) + x
        return self.fc(torch.tanh(y).flatten(1))

    def helper(self):
        return "helped"


NET_BLOCKS = [
    ("BatchNorm2d", "ReLU", "MaxPool2d"), (None, "LeakyReLU", None), ("BatchNorm2d", None, None),
]  # fmt: skip


def net() -> Net:
    return on_grid(Net())


def images(n: int = 2) -> Tensor:
    return grid(n, 3, 6, 8)


def assert_same(fast: nn.Module, model: nn.Module, x: Tensor, **tolerance) -> None:
    """Output, gradients and buffers against a copy of the eager ``model``, after being observed."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4, **tolerance}
    fast_state = copy.deepcopy(fast.state_dict())
    for _ in range(3):
        twin = copy.deepcopy(model)
        fast.load_state_dict(fast_state)
        twin.load_state_dict(fast_state, strict=False)
        grad = torch.randn_like(copy.deepcopy(twin)(x))
        expected, got = results(twin, (x,), grad), results(fast, (x,), grad)
        assert expected.keys() == got.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, **tolerance)
    fast.load_state_dict(fast_state)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_like_eager(mode, blocks):
    model = net().train(mode == "train")
    fast = cf.accelerate(model)
    assert_same(fast, copy.deepcopy(model), images())
    assert blocks[-3:] == NET_BLOCKS


def test_keeps_everything_and_leaves_the_model_alone():
    model = net()
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    keys, text, x = list(model.state_dict()), repr(model), images()
    expected = copy.deepcopy(model)(x)
    fast = cf.accelerate(model)
    assert type(fast) is Net and fast is not model and fast.helper() == "helped"
    assert fast.note == model.note and fast.note is not model.note
    assert list(fast.state_dict()) == keys and repr(fast) == text
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert p is q, name
    for (name, p), q in zip(model.named_buffers(), fast.buffers(), strict=True):
        assert p is q, name
    assert type(fast.conv1) is nn.Conv2d and fast.conv1 is not model.conv1
    for _ in range(3):
        fast.eval()(x)
    assert model.training and not fast.training
    for name, m in model.named_modules():
        assert set(m.__dict__) == before[name] and not m._forward_pre_hooks
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        cf.accelerate(torch.relu)


def test_types_of_recurrent_layers():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "gru": nn.GRU(3, 4), "rnn": nn.RNN(3, 4)})
    fast = cf.accelerate(model)
    # E721: that `==` between types holds, which other people's code asks, is what is tested here.
    assert type(fast["lstm"]) == nn.LSTM and isinstance(fast["lstm"], (nn.LSTM, cf.LSTM))  # noqa: E721
    assert type(fast["gru"]) == nn.GRU and isinstance(fast["gru"], nn.GRU)  # noqa: E721
    assert isinstance(fast["gru"], cf.GRU) and type(fast["lstm"]) != nn.GRU  # noqa: E721
    assert {type(fast["lstm"]): 1}[nn.LSTM] == 1 and type(fast["rnn"]) is nn.RNN
    assert repr(fast) == repr(model)
    x = torch.randn(5, 2, 3)
    for name in model:
        out, state = model[name](x)
        got, got_state = fast[name](x)
        torch.testing.assert_close(got, out)
        torch.testing.assert_close(got_state, state)
    reset = torch.zeros(5, 2, dtype=torch.bool)
    torch.testing.assert_close(fast["lstm"](x, reset=reset)[0], model["lstm"](x)[0])
    assert fast["lstm"].weight_ih_l0 is model["lstm"].weight_ih_l0


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization_still_finds_the_lstm():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4)})
    quantize = torch.ao.quantization.quantize_dynamic
    try:
        plain = quantize(copy.deepcopy(model), {nn.LSTM}, dtype=torch.qint8)
    except RuntimeError as error:  # a build without a quantized engine: there is nothing to compare with
        pytest.skip(f"PyTorch itself cannot: {error}")
    assert type(quantize(cf.accelerate(model), {nn.LSTM}, dtype=torch.qint8)["lstm"]) is type(plain["lstm"])


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize("used", [False, True])
def test_copies(way, used, blocks):
    fast, x = cf.accelerate(net()), images()
    if used:
        settle(fast, x)
        fast(x).sum().backward()
    twin = way(fast)
    assert type(twin) is Net and twin.conv1.weight is not fast.conv1.weight
    blocks.clear()
    assert_same(twin, net().train(), x)
    assert blocks[-3:] == NET_BLOCKS
    assert len(twin.report().sites) >= 3
    with torch.no_grad():
        twin.conv1.weight.zero_()
    assert fast.conv1.weight.any()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("child", ["conv1", "bn1", "relu", "pool", "conv2", "fc"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "changes"])
def test_hooks_on_a_child(when, child, kind):
    """Called once a call, with the right values, and what they change counts."""
    model = net()
    model.relu.inplace = False  # with backward hooks PyTorch itself refuses it
    fast = cf.accelerate(model)
    x = images()
    if when == "after":
        settle(fast, x)
    twin = copy.deepcopy(model)
    seen = {}

    def hook(label):
        def note(module, *args):
            tensors = [a[0] if isinstance(a, tuple) else a for a in args]
            seen.setdefault(label, []).append([t.detach().clone() for t in tensors if t is not None])
            return args[-1] * 2 if kind == "changes" else None

        return note

    for label, m in (("fast", fast), ("twin", twin)):
        register = "register_forward_hook" if kind == "changes" else f"register_{kind}_hook"
        getattr(m.get_submodule(child), register)(hook(label))
    for _ in range(3):
        twin.load_state_dict(fast.state_dict())
        grad = torch.randn(2, 5)
        got, expected = results(fast, (x,), grad), results(twin, (x,), grad)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
    assert len(seen["fast"]) == len(seen["twin"]) == 3
    for ours, theirs in zip(seen["fast"], seen["twin"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_features_kept_by_a_hook():
    """Collected now, read after the forward."""
    model = net().eval()
    model.relu.inplace = False
    fast, x = cf.accelerate(model), images()
    settle(fast, x)
    kept, expected = [], []
    fast.bn1.register_forward_hook(lambda m, i, o: kept.append(o))
    twin = copy.deepcopy(model)
    twin.bn1.register_forward_hook(lambda m, i, o: expected.append(o))
    for _ in range(3):
        fast(x), twin(x)
    for mine, true in zip(kept, expected, strict=True):
        assert mine.shape == true.shape and isinstance(mine, Tensor)
        torch.testing.assert_close(mine.detach().numpy(), true.detach().numpy(), rtol=1e-4, atol=1e-4)
        mine.sum().backward()
        true.sum().backward()


MENDED = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "old_weight_norm": nn.utils.weight_norm,
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.4),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", MENDED)
def test_parametrized_and_pruned_weights(kind, when):
    model = net().eval()
    twin = copy.deepcopy(model)
    if when == "before":
        for m in (model, twin):
            torch.manual_seed(1)
            MENDED[kind](m.conv1)
        fast = cf.accelerate(model.eval())
        twin.eval()
    else:
        fast = cf.accelerate(model)
        settle(fast, images())
        torch.manual_seed(1)
        MENDED[kind](fast.conv1)
        torch.manual_seed(1)
        MENDED[kind](twin.conv1)
        assert isinstance(model.conv1._parameters["weight"], nn.Parameter)
        fast.eval(), twin.eval()
    x = images()
    for _ in range(3):
        torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p, q in zip(fast.parameters(), twin.parameters(), strict=True):
            q.copy_(p.mul_(0.5))
    torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)


def test_frozen_parameters():
    model = net()
    model.conv1.weight.requires_grad_(False)
    model.bn1.bias.requires_grad_(False)
    model.conv2.requires_grad_(False)
    assert_same(cf.accelerate(model), copy.deepcopy(model), images())
    model.requires_grad_(False)
    fast, x = cf.accelerate(model), images()
    for _ in range(3):
        assert not fast(x).requires_grad


def test_a_module_used_twice_and_shared_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
            self.tied = nn.Conv2d(4, 4, 3, padding=1)
            self.tied.weight = self.conv.weight

        def forward(self, x):
            x = self.relu(self.conv(self.relu(self.conv(x))))
            return F.max_pool2d(torch.tanh(self.tied(x)), 2) * self.conv(x).mean()

    model = on_grid(Twice())
    assert_same(cf.accelerate(model), copy.deepcopy(model), grid(2, 4, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", ["fast", "model"])
def test_converted_after_accelerating(dtype, which):
    model = net().eval()
    fast, x = cf.accelerate(model), images()
    settle(fast, x)
    twin = copy.deepcopy(model).to(dtype)
    (fast if which == "fast" else model).to(dtype)
    true = copy.deepcopy(twin).double()(x.double()).detach()
    for _ in range(3):
        got = fast(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got, twin(x.to(dtype)), rtol=5e-2, atol=5e-2)
    del true
    torch.testing.assert_close(model(x.to(dtype)), twin(x.to(dtype)), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast(mode):
    model = net().train(mode == "train")
    fast, x = cf.accelerate(model), images()
    for _ in range(3):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = fast(x), twin(x)
        assert got.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=1e-1)
        assert fast(x).dtype == torch.float32


def test_functional_call():
    model = net()
    fast, x = cf.accelerate(model), images()
    settle(fast, x)
    for _ in range(3):
        other = {n: torch.randn_like(p).requires_grad_() for n, p in model.named_parameters()}
        expected = torch.func.functional_call(copy.deepcopy(model), other, (x,))
        got = torch.func.functional_call(fast, other, (x,))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(got)
        for mine, theirs in zip(
            torch.autograd.grad(got, list(other.values()), grad),
            torch.autograd.grad(expected, list(other.values()), grad), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_vmap_and_jvp():
    model = net().eval()
    fast, x = cf.accelerate(model), images()
    settle(fast, x)
    batched = grid(3, 2, 3, 6, 8)
    torch.testing.assert_close(
        torch.func.vmap(fast)(batched), torch.func.vmap(model)(batched), rtol=1e-4, atol=1e-4
    )
    tangent = torch.randn_like(x)
    for mine, theirs in zip(
        torch.func.jvp(fast, (x,), (tangent,)), torch.func.jvp(model, (x,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_double_backward():
    model = net().eval()
    fast, x = cf.accelerate(model), images()
    settle(fast, x)

    def second(module):
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(
            g.pow(2).sum(), [module.conv1.weight, module.bn1.weight, module.conv2.weight]
        )

    for mine, theirs in zip(second(fast), second(model), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_compile_export_onnx_and_trace():
    model = net().eval()
    fast, x = cf.accelerate(model), images()
    settle(fast, x)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(fast, fullgraph=True, backend="eager")(x), expected, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            torch.export.export(fast, (x,)).module()(x), expected, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(torch.jit.trace(fast, x)(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.fx.symbolic_trace(fast)(x), expected, rtol=1e-4, atol=1e-4)
        program = torch.onnx.export(fast, (x,), dynamo=True, verbose=False)
        nodes = {node.op_type for node in program.model_proto.graph.node}
        assert "Conv" in nodes and not any(
            "cnnlstm" in node.domain for node in program.model_proto.graph.node
        )


def test_data_parallel_replicas():
    """What DataParallel does with a module, without its devices."""
    model = net().eval()
    fast, x = cf.accelerate(model), images()
    settle(fast, x)
    modules = list(fast.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        replica = replicas[id(m)]
        for name, child in m._modules.items():
            replica._modules[name] = replicas[id(child)]
        for name, p in m._parameters.items():
            setattr(replica, name, None if p is None else p * 1)
    replica = replicas[id(fast)]
    for _ in range(3):
        torch.testing.assert_close(replica(x), model(x), rtol=1e-4, atol=1e-4)
    replica(x).sum().backward()
    assert fast.conv1.weight.grad is not None
    torch.testing.assert_close(nn.DataParallel(fast)(x), model(x), rtol=1e-4, atol=1e-4)


def test_modules_in_plain_lists_and_partials():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(1, 4, 3), nn.Dropout(0.9)
            self.chain = [self.conv, self.drop]
            self.hidden = [nn.Conv2d(4, 4, 3)]  # not registered
            self.act = self.activate
            self.stream = iter(())
            self.state = None

        def activate(self, x):
            return F.relu(x) if self.training else F.relu(x) * 2

        def forward(self, x):
            for module in self.chain:
                x = module(x)
            self.state = x
            return self.act(self.hidden[0](x))

    model = Lists().eval()
    fast, x = cf.accelerate(model), images()[:, :1]
    assert fast.chain[0] is fast.conv and fast.hidden[0] is not model.hidden[0]
    assert fast.hidden[0].weight is model.hidden[0].weight
    for _ in range(3):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert (fast.state - model.state).abs().max() < 1e-5
    fast.train()
    assert not model.training and not model.drop.training and fast.chain[1].training


# ---------------------------------------------------------------- traps


def module_with(forward, *, children=None):
    """A module of a convolution and a norm whose forward is ``forward(self, x)``."""

    class Trap(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.other = nn.Conv2d(6, 6, 3, padding=1)
            self.flag = False

    Trap.forward = forward
    Trap.__qualname__ = "Trap"
    return on_grid(Trap())


class Doubling(torch.autograd.Function):
    """Looks like an identity; its gradient says whether it was there."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class ReluInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (y > 0) * 3


class Same(torch.autograd.Function):
    """Hands its very argument back."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 5


def masked(self, x):
    y = self.conv(x)
    y = y.masked_fill(torch.arange(y.shape[-1]) > 4, 0)
    return F.relu(y)


def skipped(self, x):
    y = self.conv(x)
    z = F.relu(self.bn(y))
    return F.max_pool2d(z, 2).mean() * y + z


def read_in_training(self, x):
    y = self.bn(self.conv(x))
    self.seen = y.mean()
    return F.relu(y) * self.seen


def kept(self, x):
    self.feature = self.bn(self.conv(x))
    return F.relu(self.feature)


def late_consumer(self, x):
    y = self.conv(x)
    z = F.relu(self.bn(y))
    w = F.max_pool2d(self.other(z), 2)
    return w.sum() * y


def in_list(self, x):
    ys = [self.conv(x * k) for k in (1, 2, 3)]
    return torch.cat([F.relu(y) for y in ys])


def grad_mode_between(self, x):
    y = self.conv(x)
    with torch.no_grad():
        z = F.relu(self.bn(y))
    return z + F.elu(self.bn(self.conv(x)))


def autocast_between(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.conv(x)
    return F.relu(y.float())


def changed_input(self, x):
    x = x * 1
    y = self.conv(x)
    x.detach().mul_(0)
    return F.relu(self.bn(y))


def unused_norm(self, x):
    self.bn(self.conv(x))
    return F.relu(self.other(self.conv(x)))


def in_place_methods(self, x):
    y = self.bn(self.conv(x))
    y.relu_()
    return F.avg_pool2d(y, 2)


def in_place_then_read(self, x):
    y = self.conv(x)
    z = F.relu_(y)
    return z + y


def shapes_in_between(self, x):
    y = self.conv(x)
    n, c, h, w = y.shape
    assert y.size(1) == c == 6 and y.dim() == 4 and len(y) == n and y.dtype == x.dtype
    y = F.hardtanh(self.bn(y), 0, 20)
    assert y.ndim == 4 and y.numel() == n * c * h * w and y.requires_grad == torch.is_grad_enabled()
    return F.max_pool2d(y, (2, 1)).view(n, c, -1)


TRAPS = {
    "masked": masked,
    "skip": skipped,
    "read": read_in_training,
    "kept": kept,
    "late_consumer": late_consumer,
    "list": in_list,
    "custom_function": lambda self, x: F.relu(Doubling.apply(self.conv(x))),
    "custom_function_relu": lambda self, x: F.max_pool2d(ReluInside.apply(self.bn(self.conv(x))), 2),
    "custom_function_same": lambda self, x: F.relu(Same.apply(self.bn(self.conv(x)))),
    "checkpoint_reentrant": lambda self, x: F.relu(
        checkpoint(lambda t: self.bn(self.conv(t)), x, use_reentrant=True)
    ),
    "checkpoint_reentrant_all": lambda self, x: checkpoint(
        lambda t: F.max_pool2d(F.relu(self.bn(self.conv(t))), 2), x, use_reentrant=True
    ),
    "checkpoint_after_conv": lambda self, x: checkpoint(
        lambda t: F.relu(self.bn(t)), self.conv(x), use_reentrant=True
    ),
    "checkpoint": lambda self, x: checkpoint(
        lambda t: F.max_pool2d(F.relu(self.bn(self.conv(t))), 2), x, use_reentrant=False
    ),
    "checkpoint_half": lambda self, x: F.relu(
        checkpoint(lambda t: self.bn(self.conv(t)), x, use_reentrant=False)
    ),
    "grad_mode_between": grad_mode_between,
    "autocast_between": autocast_between,
    "unused_norm": unused_norm,
    "in_place_methods": in_place_methods,
    "in_place_then_read": in_place_then_read,
    "shapes": shapes_in_between,
    "numpy": lambda self, x: F.relu(self.conv(x)) + torch.from_numpy(self.conv(x).detach().numpy()),
    "no_activation": lambda self, x: self.other(self.conv(x)),
    "pool_first": lambda self, x: torch.sigmoid(F.max_pool2d(self.bn(self.conv(x)), 3, 2, 1)),
    "silu_after_pool": lambda self, x: F.silu(F.max_pool2d(self.conv(x), 2)),
    "gelu_average": lambda self, x: F.adaptive_avg_pool2d(F.gelu(self.conv(x)), (3, 2)),
    "dropout": lambda self, x: F.max_pool2d(F.dropout(F.relu(self.conv(x)), 0.5, self.training), 2),
    "split": lambda self, x: torch.cat(self.conv(x).chunk(2, 1)[::-1], 1).relu(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap, mode):
    model = module_with(TRAPS[trap]).train(mode == "train")
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for size in ((2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 6, 10)):
        x = grid(*size).requires_grad_()
        torch.manual_seed(3)
        got = fast(x)
        torch.manual_seed(3)
        expected = twin(x)
        assert real_strides(got) == real_strides(expected)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(expected)
        ours, theirs = (
            torch.autograd.grad(out, [x, *m.parameters()], grad, allow_unused=True)
            if "reentrant" not in trap and "after_conv" not in trap
            else gradients(out, x, m, grad)
            for out, m in ((got, fast), (expected, twin))
        )
        for mine, true in zip(ours, theirs, strict=True):
            assert (mine is None) == (true is None)
            if mine is not None:
                torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
        del got, ours
        with torch.no_grad():
            torch.manual_seed(3)
            got = fast(x)
            torch.manual_seed(3)
            torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-4)
        if hasattr(twin, "feature"):
            torch.testing.assert_close(fast.feature + 0, twin.feature + 0, rtol=1e-4, atol=1e-4)


def gradients(out, x, module, grad):
    """By ``backward``, as reentrant checkpoints need it."""
    for t in (x, *module.parameters()):
        t.grad = None
    out.backward(grad)
    return [t.grad for t in (x, *module.parameters())]


def assert_same_gradients(got, expected, x, fast, twin):
    grad = torch.randn_like(expected)
    for mine, true in zip(gradients(got, x, fast, grad), gradients(expected, x, twin, grad), strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


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
    "another mode": lambda self, y: torch.no_grad()(torch.relu)(y) + y,
    "checkpoint": lambda self, y: checkpoint(torch.tanh, y, use_reentrant=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pooled", [False, True], ids=["activation", "pool"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("look", LOOKS)
def test_what_is_handed_on(look, mode, pooled, monkeypatch):
    """A result lies as convolutions like it only for as long as nobody else looks."""
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
    for call, flag in enumerate((False, False, False, True, False, True)):
        fast.flag = twin.flag = flag
        x = grid(2, 3, 8, 6).requires_grad_()
        layouts.clear()
        got, expected = fast(x), twin(x)
        assert call != 2 or layouts == ["channels_last", "channels_first"]
        assert type(got) is Tensor and got.stride() == expected.stride()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(got, expected, x, fast, twin)
        del got
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)


def test_a_map_is_handed_on_only_where_the_next_block_gains(monkeypatch):
    """A block that would be slower on channels-last maps gets them as PyTorch lays them out."""
    layouts, (run_block, plan_block) = [], (run.run_block, run.plan_block)

    def noted(*args, layout, **kwargs):
        layouts.append(layout)
        return run_block(*args, layout=layout, **kwargs)

    def slower(x, *args):
        found = plan_block(x, *args)
        return found._replace(choice=found.choice._replace(us=1.0 + 9.0 * lies_channels_last(x)))

    monkeypatch.setattr(run, "run_block", noted)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    x = torch.randn(8, 3, 24, 22)
    for given, expected in ((plan_block, "channels_last"), (slower, "channels_first")):
        monkeypatch.setattr(run, "plan_block", given)
        fast = cf.accelerate(model)
        with torch.no_grad():
            for _ in range(4):
                layouts.clear()
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        assert layouts[0] == expected


@pytest.mark.parametrize("pooled", [False, True], ids=["activation", "pool"])
@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Identity()], ids=repr)
def test_handed_through_what_does_nothing(drop, pooled, monkeypatch):
    """Dropout in evaluation gives back what it got."""
    layouts = []
    run_block = run.run_block

    def noted(*args, layout, **kwargs):
        layouts.append(layout)
        return run_block(*args, layout=layout, **kwargs)

    pool = [nn.MaxPool2d(2)] if pooled else []
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), *pool, drop, nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    fast, x = cf.accelerate(model), torch.randn(8, 3, 24, 22)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x))
        with monkeypatch.context() as patched:
            patched.setattr(run, "run_block", noted)
            for _ in range(2):
                x = torch.randn(8, 3, 24, 22)
                torch.testing.assert_close(fast(x), model(x))
    assert layouts == ["channels_last", "channels_first"] * 2
    fast.train(), model.train()
    for seed in range(3):
        torch.manual_seed(seed)
        got = fast(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(got, model(x))


def test_handed_to_weights_that_lie_channels_last():
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


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("groups", [1, 6])
def test_grouped_convolutions_are_handed_nothing(groups, pooled):
    """They are slower on channels-last maps."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2) if pooled else nn.Identity(),
        nn.Conv2d(6, 6, 3, groups=groups), nn.ReLU(),
    ).eval()  # fmt: skip
    fast, x = cf.accelerate(model), torch.randn(2, 3, 12, 13)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x))
    (recipe,) = fast[0]._conv_forward.known.values()
    assert recipe.hands_on == (groups == 1)


#: What a forward does once it has been observed as conv, norm, activation, pool.
FLIPS = {
    "look": lambda self, y, stage: (y.mean(), y)[1],
    "use_twice": lambda self, y, stage: y + 0 * y.abs(),
    "other_activation": lambda self, y, stage: torch.tanh(y),
    "custom_function": lambda self, y, stage: ReluInside.apply(y),
    "same_function": lambda self, y, stage: Same.apply(y),
    "checkpoint": lambda self, y, stage: checkpoint(torch.tanh, y, use_reentrant=True),
    "detach": lambda self, y, stage: y.detach() + y,
    "numpy": lambda self, y, stage: y * float(y.detach().numpy().sum() * 0 + 2),
    "no_grad": lambda self, y, stage: y + torch.no_grad()(torch.relu)(y),
    "in_place": lambda self, y, stage: y.mul_(2) if stage < 2 else y * 2,  # ReLU keeps its result
    "item": lambda self, y, stage: y if y.sum().item() == 0.123 else y * 3,
    "index": lambda self, y, stage: y[:, :, :4, :4],
    "raw_op": lambda self, y, stage: torch.ops.aten.relu.default(y),
    "hook": lambda self, y, stage: (y.register_hook(lambda g: g * 7) if y.requires_grad else 0, y)[1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_small_inputs_do_not_take(dtype):
    """It was seen with a large one; for a small one it would raise."""

    def forward(self, x):
        y = self.conv(x)
        return F.relu(F.max_pool2d(y, 2) if y.shape[-1] > 1 else y)

    model = module_with(forward).to(dtype)
    fast = cf.accelerate(copy.deepcopy(model))
    for size in (8, 8, 1, 8):
        x = grid(2, 3, size, size).to(dtype)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("flip", FLIPS)
def test_a_flow_that_changes_later(flip, mode, stage):
    """Deferred values leave in every way; value, gradient and statistics are eager's."""

    def forward(self, x):
        steps = (lambda t: self.bn(t), lambda t: F.relu(t), lambda t: F.max_pool2d(t, 2))
        y = self.conv(x)
        for i, step in enumerate(steps):
            if self.flag and i == stage:
                y = FLIPS[flip](self, y, stage)
            y = step(y)
        return y

    model = module_with(forward).train(mode == "train")
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for flag in (False, False, True, False, False, True):
        fast.flag = twin.flag = flag
        x = grid(2, 3, 8, 8).requires_grad_()
        got, expected = fast(x), twin(x)
        assert type(got) is Tensor
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(got, expected, x, fast, twin)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
        del got
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)


def test_statistics_of_a_norm_whose_result_is_dropped():
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y.new_zeros(()) if self.flag else F.relu(y)

    model = module_with(forward)
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for flag in (False, False, True, False):
        fast.flag = twin.flag = flag
        x = grid(2, 3, 8, 8)
        fast(x), twin(x)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("looks", [False, True])
def test_input_changed_in_place_later(looks):
    """The block has run before that. A value that the program asks for is the one of before the write."""

    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        if self.flag:
            x.zero_()
            y = y * 2 if looks else y
        return F.relu(y)

    model = module_with(forward).eval()
    fast, x = cf.accelerate(model), images()
    with torch.no_grad():
        settle(fast, x)
        fast.flag = model.flag = True
        for _ in range(4):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_input_always_changed_in_place():
    model = module_with(changed_input).eval()
    fast = cf.accelerate(model)
    for _ in range(4):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                x = images()
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_flat_sequential_that_ends_in_a_recurrent_wrapper(blocks):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(8, 4, batch_first=True)

        def forward(self, x):
            return self.gru(x.flatten(2).transpose(1, 2))[0]

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        Last(),
    )
    on_grid(model)
    fast = cf.accelerate(model)
    assert_same(fast, copy.deepcopy(model), grid(2, 3, 12, 12))
    assert blocks[-2:] == [("BatchNorm2d", "ReLU", "MaxPool2d"), (None, "ReLU", None)]


def test_other_methods_changing_lengths_and_mode_flips(blocks):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ELU(), nn.MaxPool1d(2))

        def encode(self, x):
            return self.net(x)

    model = on_grid(Encoder())
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_var.uniform_(0.5, 2)
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for call in range(12):
        for m in (fast, twin):
            m.train(call % 3 != 0)
        x = grid(2, 4, 20 + call)
        blocks.clear()
        torch.testing.assert_close(fast.encode(x), twin.encode(x), rtol=1e-4, atol=1e-4)
        if call > 5:
            assert blocks == [("BatchNorm1d", "ELU", "MaxPool1d")]
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_norms_of_all_kinds(momentum, affine, tracks):
    bn = nn.BatchNorm2d(8, momentum=momentum, affine=affine, track_running_stats=tracks)
    model = on_grid(nn.Sequential(nn.Conv2d(3, 8, 3)))
    model.append(freshen(bn) if affine and tracks else bn).append(nn.ReLU())
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model)
    for call in range(8):
        for m in (fast, twin):
            m.train(call % 4 != 3)
            m[1].train(call % 2 == 0)
        x = images()
        torch.testing.assert_close(fast(x), twin(x), rtol=1e-4, atol=1e-4)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_alive():
    fast, x = cf.accelerate(net()), images().requires_grad_()
    for _ in range(3):
        out = fast(x)
        out.sum().backward()
        ref = weakref.ref(out)
        del out
        assert ref() is None
    last = images()
    fast.eval()(last)
    ref = weakref.ref(last)
    fast(images())
    fast(images())
    del last
    assert ref() is None


def test_results_are_plain_tensors():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    fast, x = cf.accelerate(model), images()
    for _ in range(3):
        out = fast(x)
        assert isinstance(out, Tensor) and not isinstance(out, Placeholder)
        assert torch.equal(pickle.loads(pickle.dumps(out)), out) and type(out) is Tensor
        assert not isinstance(out, ObservedTensor)
        del out


def test_what_cannot_be_copied_is_shared():
    model = net()
    model.lock = __import__("threading").Lock()
    model.stack = nn.ModuleList([nn.Conv2d(1, 1, 1)])
    fast = cf.accelerate(model)
    assert fast.lock is model.lock and fast.stack[0] is not model.stack[0]
    again = cf.accelerate(fast)
    assert (
        isinstance(again.conv1._conv_forward, ConvSite) and again.conv1._conv_forward.module() is again.conv1
    )


def test_small_blocks_run_as_they_are(monkeypatch):
    monkeypatch.setattr(sys.modules["cnnlstm_fast.fusion.plan"], "OVERHEAD_US", 1e6)
    fast, x = cf.accelerate(net().eval()), images()
    for _ in range(3):
        fast(x)
    assert {site.plan for site in fast.report().sites} == {"PyTorch"}
    assert all("costs more" in site.reason for site in fast.report().sites)


def test_report():
    fast, x = cf.accelerate(net()), images()
    assert "has not been called" in str(fast.report())
    fast(x)
    assert "observed once" in str(fast.report())
    fast(x)
    rows = {site.name: site for site in fast.report().sites}
    assert rows["conv1"].block == "Conv2d+BatchNorm+ReLU+MaxPool2d" and "training" in rows["conv1"].mode
    assert rows["conv2"].block == "Conv2d+LeakyReLU" and rows["conv3"].block == "Conv2d+BatchNorm"
    fast.conv1.register_forward_hook(lambda *_: None)
    fast.eval()(x)
    mixed = cf.accelerate(nn.Sequential(cf.Sequential(nn.Conv2d(3, 4, 3)), nn.LSTM(3, 4), nn.Conv3d(1, 1, 1)))
    reasons = [site.reason for site in mixed.report().sites]
    assert reasons == ["its container fuses it", "", "is not fused"]
    lines = str(fast.report()).splitlines()
    assert lines[0].split() == ["name", "block", "mode", "plan", "reason"]


def test_what_a_rule_left_to_pytorch_is_not_looked_at_again(monkeypatch):
    monkeypatch.setattr(sys.modules["cnnlstm_fast.fusion.plan"], "OVERHEAD_US", 1e9)
    looked_at = []
    convolve = ConvSite._convolve

    def watched(self, running, module, function, x, conv):
        looked_at.append(tuple(x.shape))
        return convolve(self, running, module, function, x, conv)

    monkeypatch.setattr(ConvSite, "_convolve", watched)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval()
    fast = cf.accelerate(model)

    def calls(x, times=3):
        looked_at.clear()
        for _ in range(times):
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
        return len(looked_at)

    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8)
        assert calls(x) == 2  # observed once, then left alone
        assert calls(x) == 0
        assert calls(torch.randn(2, 3, 9, 8)) == 1
        assert calls(x.to(memory_format=torch.channels_last)) == 1
        assert calls(x) == 0
        assert cf.explain(fast, x).stages[1].plan == "PyTorch"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            looked_at.clear()
            fast(x)
            assert len(looked_at) == 1
    assert calls(x) == 2  # with gradients
    fast.train()
    assert calls(x) == 2
    with pytest.raises(RuntimeError, match="Input type"):
        fast(x.to_sparse())
    symbolic = make_fx(torch.func.vmap(fast), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    torch.testing.assert_close(symbolic(x[None])(x[None])[0], model(x))
    for module in (fast[0], model[0]):
        module.padding_mode, module._reversed_padding_repeated_twice = "circular", (1, 1, 1, 1)
    calls(torch.randn(2, 3, 7, 7))
    assert calls(torch.randn(2, 3, 9, 9)) == 3  # what is convolved is not what came in
