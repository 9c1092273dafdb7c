"""``cf.accelerate`` as a drop-in: what an accelerated model has in common with its original."""

import copy
import io
import pickle
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerated import NET_BLOCKS, Kinks, Net, assert_same, images, net, results, settle
from field_models import freshen
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from twins import grid, on_grid

import cnnlstm_fast as cf
from cnnlstm_fast.fusion.observe import ObservedTensor
from cnnlstm_fast.fusion.site import ConvSite
from cnnlstm_fast.fusion.speculate import Placeholder

pytestmark = pytest.mark.usefixtures("always_worth_it")


# ---------------------------------------------------------------- drop-in manners


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
    model, kinks = net().eval(), None
    while kinks is None or kinks.near:  # there, rounding decides what a ReLU lets pass
        x = images()
        with Kinks() as kinks:
            model(x)
    fast = cf.accelerate(model)
    settle(fast, x)

    def second(module, x):
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(
            g.pow(2).sum(), [module.conv1.weight, module.bn1.weight, module.conv2.weight]
        )

    exact, eps = second(copy.deepcopy(model).double(), x.double()), torch.finfo(torch.float32).eps
    ways = [second(model, x * (1 + eps * torch.randn_like(x))) for _ in range(4)]  # as well conditioned
    for mine, true, *theirs in zip(second(fast, x), exact, second(model, x), *ways, strict=True):
        error, *own = ((t.double() - true).norm() for t in (mine, *theirs))
        assert error <= 2 * max(own) + 16 * eps * true.norm()


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


def test_softplus_as_a_module_and_as_a_function(blocks):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.curve = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Softplus(2, 30)

        def forward(self, x):
            return F.softplus(self.second(self.curve(self.first(x))), beta=0.5)

    model = on_grid(Net())
    assert_same(cf.accelerate(model), copy.deepcopy(model), grid(2, 3, 12, 12))
    assert blocks[-2:] == [(None, "Softplus", None)] * 2


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
    monkeypatch.undo()  # the fixture's
    monkeypatch.setattr(sys.modules["cnnlstm_fast.fusion.plan"], "OVERHEAD_US", 1e6)
    fast, x = cf.accelerate(net().eval()), images()
    for _ in range(4):
        fast(x)
    assert {site.plan for site in fast.report().sites} == {"PyTorch"}
    assert any("costs more" in site.reason for site in fast.report().sites)


def test_report():
    fast, x = cf.accelerate(net()), images()
    assert "has not been called" in str(fast.report())
    fast(x)
    assert "observed once" in str(fast.report())
    fast(x)
    rows = {site.name: site for site in fast.report().sites}
    assert rows["conv1"].block == "Conv2d+BatchNorm+ReLU+MaxPool2d" and "training" in rows["conv1"].mode
    assert rows["conv2"].block == "Conv2d+LeakyReLU" and rows["conv3"].block == "Conv2d+BatchNorm+sum"
    fast.conv1.register_forward_hook(lambda *_: None)
    fast.eval()(x)
    mixed = cf.accelerate(nn.Sequential(cf.Sequential(nn.Conv2d(3, 4, 3)), nn.LSTM(3, 4), nn.Conv3d(1, 1, 1)))
    reasons = [site.reason for site in mixed.report().sites]
    assert reasons == ["its container fuses it", "", "is not fused"]
    lines = str(fast.report()).splitlines()
    assert lines[0].split() == ["name", "block", "mode", "plan", "reason"]


def test_what_a_rule_left_to_pytorch_is_not_looked_at_again(monkeypatch):
    monkeypatch.undo()
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
            torch.testing.assert_close(fast(x), model(x))
        return len(looked_at)

    with torch.no_grad():
        x = torch.randn(2, 3, 8, 8)
        assert calls(x) == 3  # observed, planned and rehearsed; then left alone
        assert calls(x) == 0
        assert calls(torch.randn(2, 3, 9, 8)) == 2
        assert calls(x.to(memory_format=torch.channels_last)) == 1
        assert calls(x) == 0
        assert cf.explain(fast, x).stages[1].plan == "PyTorch"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            looked_at.clear()
            fast(x)
            assert len(looked_at) == 1
    assert calls(x) == 3  # with gradients
    fast.train()
    assert calls(x) == 3
    with pytest.raises(RuntimeError, match="Input type"):
        fast(x.to_sparse())
    symbolic = make_fx(torch.func.vmap(fast), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    torch.testing.assert_close(symbolic(x[None])(x[None])[0], model(x))
    for module in (fast[0], model[0]):
        module.padding_mode, module._reversed_padding_repeated_twice = "circular", (1, 1, 1, 1)
    calls(torch.randn(2, 3, 7, 7))
    assert calls(torch.randn(2, 3, 9, 9)) == 3  # what is convolved is not what came in
