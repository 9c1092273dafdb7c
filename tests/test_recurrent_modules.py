"""cf.LSTM and cf.GRU in the places of nn.LSTM and nn.GRU."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from functools import partial

import pytest
import torch
from helpers import needs_extension
from layers import assert_same, layers, pair, r
from sequences import assert_case, kinds, random_cases, result_gradients
from torch import nn
from torch.nn.utils import parametrizations, prune, rnn
from twins import Ops

import cnnlstm_fast as cf
from cnnlstm_fast import _ext


def through_module(drawn, module_type, leaves):
    """A case through a module: {out, h_n, c_n}, time-major and with a batch."""
    case, one = drawn.case, drawn.case.batch is None
    module = case.module(module_type, dtype=leaves["x"].dtype)
    state = [leaves[n].squeeze(1) if one else leaves[n] for n in ("h_0", "c_0") if n in leaves]
    hx = None if not state else state[0] if case.kind == "GRU" else tuple(state)
    more = {
        "reset": None if drawn.reset is None else drawn.laid_out(drawn.reset),
        "lengths": None if drawn.lengths is None else drawn.lengths[0] if one else drawn.lengths,
    }
    params = {n: leaves[n] for n in drawn.params}
    out, last = torch.func.functional_call(module, params, (drawn.laid_out(leaves["x"]), hx), more)
    last = (last,) if case.kind == "GRU" else last
    out = out.unsqueeze(1) if one else out.transpose(0, 1) if case.batch_first else out
    last = [s.unsqueeze(1) for s in last] if one else last
    return {"out": out, **dict(zip(("h_n", "c_n"), last, strict=False))}


@random_cases(12)
def test_results_and_gradients(case):
    drawn = case.draw()
    assert_case(drawn, lambda **leaves: through_module(drawn, cf, leaves), result_gradients(drawn))


# ---------------------------------------------------------------- as a module


@layers
def test_attributes_keys_and_repr(kind, more):
    ours, twin = pair(kind, **more)
    assert isinstance(ours, nn.RNNBase) and not isinstance(ours, getattr(nn, kind))
    assert repr(ours) == repr(twin)
    assert list(ours.state_dict()) == list(twin.state_dict())
    for name in nn.RNNBase.__constants__:
        assert getattr(ours, name) == getattr(twin, name)
    assert [len(ws) for ws in ours.all_weights] == [len(ws) for ws in twin.all_weights]
    ours.flatten_parameters()
    torch.manual_seed(1)
    first = getattr(cf, kind)(5, 7, **more)
    torch.manual_seed(1)
    assert_same(tuple(first.parameters()), tuple(getattr(nn, kind)(5, 7, **more).parameters()), 0)


CONSTRUCTORS = {
    "all by position": ((5, 7, 2, False, True, 0.5, True), {}),
    "no sizes": ((), {}),
    "zero inputs": ((0, 7), {}),
    "float inputs": ((5.0, 7), {}),
    "zero hidden": ((5, 0), {}),
    "no layers": ((5, 7, 0), {}),
    "a word for dropout": ((5, 7, 2), {"dropout": "a"}),
    "a dropout of two": ((5, 7, 2), {"dropout": 2}),
    "an int for bias": ((5, 7), {"bias": 1}),
    "a large projection": ((5, 7), {"proj_size": 7}),
    "an unknown keyword": ((5, 7), {"layers": 2}),
    "a dtype": ((5, 7), {"dtype": torch.float64, "device": "cpu"}),
}


@kinds
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(kind, name):
    args, keywords = CONSTRUCTORS[name]
    try:
        expected = getattr(nn, kind)(*args, **keywords)
    except Exception as error:
        with pytest.raises(type(error)):
            getattr(cf, kind)(*args, **keywords)
    else:
        got = getattr(cf, kind)(*args, **keywords)
        assert repr(got) == repr(expected)
        assert [p.dtype for p in got.parameters()] == [p.dtype for p in expected.parameters()]


# input, initial state of an LSTM, of a GRU
WRONG_CALLS = {
    "four dimensions": (r(1, 6, 3, 5), None, None),
    "one dimension": (r(5), None, None),
    "other features": (r(6, 3, 4), None, None),
    "no steps": (r(0, 3, 5), None, None),
    "doubles": (r(6, 3, 5).double(), None, None),
    "a state's width": (r(6, 3, 5), (r(1, 3, 6), r(1, 3, 7)), r(1, 3, 6)),
    "a state's batch": (r(6, 3, 5), (r(1, 2, 7), r(1, 2, 7)), r(1, 2, 7)),
    "a state's rank": (r(6, 3, 5), (r(1, 7), r(1, 7)), r(1, 7)),
    "a batched state": (r(6, 5), (r(1, 1, 7), r(1, 1, 7)), r(1, 1, 7)),
    "packed, other features": (rnn.pack_sequence([r(6, 4), r(2, 4)]), None, None),
}


@kinds
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls_raise_as_torch(kind, name):
    ours, twin = pair(kind)
    x, lstm_state, gru_state = WRONG_CALLS[name]
    hx = lstm_state if kind == "LSTM" else gru_state
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        twin(x, hx)
    with pytest.raises(theirs.type):
        ours(x, hx)


def test_like_shares_parameters():
    ours, twin = pair("LSTM", num_layers=2, dropout=0.3)
    shared = cf.LSTM.like(twin.eval())
    assert all(a is b for a, b in zip(shared.parameters(), twin.parameters(), strict=True))
    assert not shared.training and repr(shared) == repr(twin)
    x = r(6, 3, 5)
    assert_same(shared(x), twin(x))
    shared.weight_ih_l0 = nn.Parameter(torch.zeros(28, 5))
    assert twin.weight_ih_l0.any()
    for other in (nn.GRU(5, 7), ours):
        with pytest.raises(TypeError, match=r"expected an nn\.LSTM"):
            cf.LSTM.like(other)


def copies():
    def saved(module):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "save": saved,
        "double and back": lambda m: m.double().float(),
        "share_memory": lambda m: m.share_memory(),
        "to_empty": lambda m: _refilled(m),
    }


def _refilled(module):
    state = {n: t.clone() for n, t in module.state_dict().items()}
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    return module


@kinds
@pytest.mark.parametrize("how", copies())
def test_copies(kind, how):
    ours, twin = pair(kind, num_layers=2)
    copied = copies()[how](ours)
    x = r(6, 3, 5)
    assert_same(copied(x), twin(x))
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(0.5)
        for p in twin.parameters():
            p.mul_(0.5)
    assert_same(copied(x), twin(x))


@kinds
def test_weights_may_change_at_any_time(kind):
    ours, twin = pair(kind)
    x = r(6, 3, 5)
    ours(x)
    for module in (ours, twin):
        module.weight_hh_l0.data.mul_(0.5)  # moves no version counter
        module.bias_ih_l0 = nn.Parameter(torch.ones_like(module.bias_ih_l0))
    assert_same(ours(x), twin(x))


@kinds
def test_training_follows_the_same_curve(kind):
    ours, twin = pair(kind, num_layers=2)
    x, target = r(8, 4, 5), r(8, 4, 7)
    losses = []
    for module in (ours, twin):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = (module(x)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    assert losses[0][-1] < losses[0][0]


# ---------------------------------------------------------------- packed sequences


@kinds
@needs_extension
@pytest.mark.parametrize("name", ["bias_hh_l0", "x"])
def test_a_second_derivative_minds_every_change(kind, name):
    """A bias, and the batch-first input, that only a backward of the backward reads."""
    ours, _ = pair(kind, batch_first=True)
    x = r(3, 6, 5).requires_grad_() * 1
    out, _ = ours(x)
    with torch.no_grad():
        (x if name == "x" else getattr(ours, name)).add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*create_graph"):
        torch.autograd.grad(out.sum(), ours.weight_hh_l0, create_graph=True)


# ---------------------------------------------------------------- what is done to modules


@kinds
def test_hooks(kind):
    ours, twin = pair(kind)
    x = r(6, 3, 5).requires_grad_()
    seen = []
    found = []
    for module in (ours, twin):
        handles = [
            module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:])),
            module.register_forward_hook(lambda m, args, out: (out[0] + 1, out[1])),
            module.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].sum())),
        ]
        out, _ = module(x)
        found.append((out, *torch.autograd.grad(out.sum(), [x, *module.parameters()])))
        for handle in handles:
            handle.remove()
    assert_same(found[0], found[1])
    assert len(seen) == 2


def weight_changes():
    def parametrized(change):
        def change_both(ours, twin):
            for module in (ours, twin):
                torch.manual_seed(0)
                change(module)

        return change_both

    def old_weight_norm(module):
        with contextlib.suppress(FutureWarning):
            nn.utils.weight_norm(module, "weight_hh_l0")

    return {
        "weight_norm": parametrized(lambda m: parametrizations.weight_norm(m, "weight_hh_l0")),
        "spectral_norm": parametrized(lambda m: parametrizations.spectral_norm(m.eval(), "weight_hh_l0")),
        "orthogonal": parametrized(lambda m: parametrizations.orthogonal(m, "weight_ih_l0")),
        "old weight_norm": parametrized(old_weight_norm),
        "pruned": parametrized(lambda m: prune.random_unstructured(m, "weight_ih_l0", amount=0.4)),
    }


@kinds
@pytest.mark.parametrize("how", weight_changes())
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights(kind, how):
    """Weights that are computed from others, anew in every call."""
    ours, twin = pair(kind)
    weight_changes()[how](ours, twin)
    x = r(6, 3, 5)
    assert_same(ours(x), twin(x))
    for module in (ours, twin):
        module(x)[0].square().sum().backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(p.grad, alpha=0.01)
    for (name, mine), theirs in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert_same(ours(x), twin(x))


@kinds
def test_functional_call_and_ensembles(kind):
    ours, twin = pair(kind)
    x = r(6, 3, 5)
    other = {n: r(p.shape) for n, p in ours.named_parameters()}
    assert_same(torch.func.functional_call(ours, other, (x,)), torch.func.functional_call(twin, other, (x,)))
    assert_same(ours(x), twin(x))
    models = [pair(kind)[0] for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(params, buffers, x):
        return torch.func.functional_call(base, (params, buffers), (x,))

    stacked = torch.func.vmap(call, in_dims=(0, 0, None))(params, buffers, x)
    for i, model in enumerate(models):
        torch.testing.assert_close(stacked[0][i], model(x)[0])


IN_PLACE = {
    "one layer": {},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "batch first, both ways": {"num_layers": 2, "batch_first": True, "bidirectional": True},
    "no bias": {"bias": False},
    "projected": {"proj_size": 3},
    "projected both ways": {"proj_size": 3, "bidirectional": True},
}

CHANGED = (
    "out",
    "h_n",
    "c_n",
    "x",
    "h_0",
    "c_0",
    "weight_ih_l0",
    "weight_hh_l0",
    "bias_ih_l0",
    "weight_hr_l0",
)


def change(module, target, packed, frozen, mkldnn, state, x, states):
    """Gradients where ``target`` is changed in place between forward and backward, None where it raises."""
    x, states = x.clone().requires_grad_(), [s.clone().requires_grad_() for s in states]
    module.zero_grad()
    inputs, given = x * 1, [s * 1 for s in states]
    if packed:
        inputs = rnn.pack_padded_sequence(inputs, torch.tensor([4, 3, 1]), module.batch_first)
    hx = None if not state else given[0] if module.mode == "GRU" else tuple(given)
    torch.manual_seed(0)
    with torch.backends.mkldnn.flags(enabled=mkldnn):
        out, last = module(inputs, hx)
    last = (last,) if module.mode == "GRU" else last
    if packed:
        out, inputs = out.data, inputs.data
    tensors = {"out": out, "x": inputs, **dict(zip(("h_n", "c_n"), last, strict=False))}
    tensors |= dict(zip(("h_0", "c_0"), given, strict=False)) if state else {}
    tensors |= dict(module.named_parameters())
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + sum(s.sum() for s in last)
    if target in tensors:
        with torch.no_grad():
            tensors[target].add_(1.0)
    leaves = [x, *states, *(() if frozen else module.parameters())]
    try:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
    except RuntimeError as error:
        assert "modified" in str(error)
        found = None
    finally:
        if target in dict(module.named_parameters()):
            with torch.no_grad():
                tensors[target].sub_(1.0)
    return found


@pytest.mark.some(15)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
@kinds
@pytest.mark.filterwarnings("ignore::UserWarning")
@needs_extension
def test_in_place_changes_before_the_backward(kind, name, packed, frozen):
    """What PyTorch's layers allow is allowed, and what changes a gradient is never silent."""
    more = IN_PLACE[name]
    if kind == "GRU" and "proj_size" in more:
        return
    ours, twin = pair(kind, **more)
    ours.requires_grad_(not frozen), twin.requires_grad_(not frozen)
    x = r(3, 4, 5) if ours.batch_first else r(4, 3, 5)
    rows = ours.num_layers * (1 + ours.bidirectional)
    states = [r(rows, 3, ours.proj_size or 7), r(rows, 3, 7)]
    for mkldnn, state in ((True, False), (True, True), (False, True)):
        args = packed, frozen, mkldnn, state, x, states
        clean = change(ours, None, *args)
        for target in CHANGED:
            found = change(ours, target, *args)
            if change(twin, target, *args) is not None:
                assert found is not None, f"{target} may be changed, state {state}"
            for mine, expected in zip(found or (), clean, strict=found is not None):
                torch.testing.assert_close(mine, expected, msg=f"{target}, state {state}")
            if target == "x" and not frozen and not ours.batch_first:
                assert found is None


class Steps(nn.Module):
    """Frames, a chain along time, and a recurrent layer."""

    def __init__(self, rnn, given):
        super().__init__()
        self.given = given
        frame = cf.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.frames = cf.TimeDistributed(frame)
        self.signal = cf.Sequential(nn.Conv1d(72, 5, 3, padding=1), nn.ReLU())
        self.rnn = rnn
        self.fc = nn.Linear(7, 2)

    def forward(self, x, h_0):
        steps = self.signal(self.frames(x).transpose(1, 2)).transpose(1, 2)
        hx = h_0 if self.rnn.mode == "GRU" else (h_0, h_0)
        out, _ = self.rnn(steps, hx) if self.given else self.rnn(input=steps)
        return self.fc(out[:, -1])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("rnn", [cf.LSTM, cf.GRU, nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fx_takes_them_as_leaves(rnn, given):
    """One node each, as PyTorch's own, by the plain tracer; hooks run once, when the module runs."""
    model = Steps(rnn(5, 7, 2, batch_first=True), given).eval()
    called = []
    model.rnn.register_forward_hook(lambda m, args, out: (called.append(m), (out[0] * 2, out[1]))[1])
    if rnn in (nn.LSTM, nn.GRU):
        model = cf.accelerate(model)
    args = r(3, 4, 3, 8, 8), r(2, 3, 7)
    traced = torch.fx.symbolic_trace(model)
    assert not called
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["frames", "signal.0", "signal.1", "rnn", "fc"]
    torch.testing.assert_close(traced(*args), model(*args))
    assert len(called) == 2
    copied = copy.deepcopy(traced).train()
    copied(*args).sum().backward()
    model.train()(*args).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    for name, p in copied.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5)
    assert "__module__" not in vars(model.rnn)
    pickle.loads(pickle.dumps(model.frames))


@kinds
def test_double_backward(kind):
    ours, _ = pair(kind)
    x = r(6, 3, 5)

    def penalty(module, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(module.parameters()))

    got = penalty(ours, x)
    expected = penalty(copy.deepcopy(ours).double(), x.double())  # PyTorch's oneDNN layer cannot
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@kinds
def test_checkpoint(kind):
    ours, twin = pair(kind)
    x = r(6, 3, 5).requires_grad_()
    out, _ = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    got = torch.autograd.grad(out.sum(), [x, *ours.parameters()])
    assert_same(got, torch.autograd.grad(twin(x)[0].sum(), [x, *twin.parameters()]))


def test_a_subclass_with_a_forward_of_its_own():
    class Residual(cf.LSTM):
        def forward(self, input, hx=None):
            out, hx = super().forward(input, hx)
            return out + input, hx

    layer = Residual(7, 7)
    x = r(6, 3, 7)
    assert_same(layer(x)[0], cf.LSTM.forward(layer, x)[0] + x)


@kinds
def test_meta_device_and_inference_mode(kind):
    ours, twin = pair(kind, num_layers=2)
    with torch.inference_mode():
        assert_same(ours(r(6, 3, 5).fill_(0.5)), twin(r(6, 3, 5).fill_(0.5)))
    out, _ = copy.deepcopy(ours).to("meta")(r(6, 3, 5).to("meta"))
    assert out.shape == (6, 3, 7) and out.device.type == "meta"


@needs_extension
@kinds
@pytest.mark.parametrize("reset", [True, False])
def test_one_op_per_layer(kind, reset):
    ours, _ = pair(kind, num_layers=3, bidirectional=True)
    more = {"reset": torch.rand(6, 3) < 0.5, "lengths": torch.tensor([6, 1, 3])} if reset else {}
    x = r(6, 3, 5)
    with Ops() as ops, torch.no_grad():
        ours(x, **more)
    assert ops.names.count("cnnlstm_fast::recurrent_layer") == 3
    others = [n for n in ops.names if n != "cnnlstm_fast::recurrent_layer"]
    assert others == ["aten::cat"] * (2 if kind == "LSTM" else 1)  # the final states of the layers


# ---------------------------------------------------------------- compilers and exporters


@needs_extension
@kinds
def test_compile_whole_in_bfloat16(kind):
    """Plain, so that oneDNN's layer is thought of."""
    torch._dynamo.reset()
    layer, x = getattr(cf, kind)(5, 7).bfloat16(), r(6, 3, 5).bfloat16()
    out, state = torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close((out, state), layer(x))


@pytest.mark.some(2)
@kinds
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_whole(kind, backend):
    """Without a graph break, forward and backward, with resets and lengths, and with another length."""
    torch._dynamo.reset()
    ours, _ = pair(kind, bidirectional=True, num_layers=2)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for time in (6, 9, 11) if backend == "aot_eager" else (6,):
        x = r(time, 3, 5)
        more = {"reset": torch.rand(time, 3) < 0.3, "lengths": torch.tensor([time, 2, 0])}
        got, expected = compiled(x, **more), ours(x, **more)
        assert_same(got, expected)
        for mine, theirs in zip(
            torch.autograd.grad(got[0].sum(), list(ours.parameters())),
            torch.autograd.grad(expected[0].sum(), list(ours.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


def test_compile_without_kernels():
    """Float64 has none: still one graph."""
    torch._dynamo.reset()
    ours, twin = pair("LSTM", dtype=torch.float64)
    x = r(4, 3, 5).double()
    assert_same(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), twin(x))


@kinds
def test_export(kind):
    ours, _ = pair(kind)
    x, reset = r(6, 3, 5), torch.rand(6, 3) < 0.3
    time, batch = torch.export.Dim("time", min=2), torch.export.Dim("batch", min=2)
    shapes = {"input": {0: time, 1: batch}, "reset": {0: time, 1: batch}}
    program = torch.export.export(ours, (x,), {"reset": reset}, dynamic_shapes=shapes)
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "cnnlstm_fast.recurrent_layer.default" in names or not _ext.loaded
    x, reset = r(9, 2, 5), torch.rand(9, 2) < 0.3
    assert_same(program.module()(x, reset=reset), ours(x, reset=reset))


@needs_extension
def test_aot_inductor_of_a_whole_system(tmp_path):
    model = cf.CNN_LSTM_Simple(1, 12, 1, 3).eval()
    x = r(2, 1, 8, 8)
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    x = r(2, 1, 8, 8)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x))


@kinds
def test_jit_trace_and_script(kind):
    ours, twin = pair(kind, num_layers=2, batch_first=True)
    x = r(3, 6, 5)
    traced = torch.jit.trace(ours.eval(), x)
    assert_same(traced(r(3, 6, 5).fill_(0.3)), twin(r(3, 6, 5).fill_(0.3)))
    scripted = torch.jit.script(nn.Sequential(ours))
    assert_same(scripted(x), twin(x))


@pytest.mark.some(2)
@kinds
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx_has_standard_nodes(kind, dynamo):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, twin = pair(kind, num_layers=2, bidirectional=True, batch_first=True)
    x = r(3, 6, 5)
    if dynamo:
        model = torch.onnx.export(ours.eval(), (x,), dynamo=True, verbose=False).model_proto
    else:
        buffer = io.BytesIO()
        torch.onnx.export(ours.eval(), (x,), buffer, dynamo=False)
        model = onnx.load_from_string(buffer.getvalue())
    assert [n.op_type for n in model.graph.node].count(kind) == 2
    assert {n.domain for n in model.graph.node} <= {"", "ai.onnx"}
    x = r(3, 6, 5)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    out, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), twin(x)[0], rtol=1e-4, atol=1e-5)


@needs_extension
@kinds
def test_opcheck(kind):
    from cnnlstm_fast.functional.recurrent import GRU, LSTM
    from cnnlstm_fast.ops import recurrent

    ours, _ = pair(kind, bidirectional=True)
    cell = LSTM if kind == "LSTM" else GRU
    w = [p.detach() for p in ours.parameters()]
    weights = [*w[:4], None, *w[4:], None]
    state = (r(2, 3, 7), r(2, 3, 7) if kind == "LSTM" else None)
    reset, lengths = torch.rand(6, 3) < 0.3, torch.tensor([6, 0, 4])
    args = (r(6, 3, 5), *state, *weights, reset, lengths, cell.mode, False, True)
    torch.library.opcheck(recurrent.forward_op, args, test_utils=("test_schema", "test_faketensor"))


@kinds
def test_dropout_between_layers(kind):
    ours, twin = pair(kind, num_layers=3, dropout=0.5, batch_first=True)
    x = r(3, 6, 5)
    run = partial(torch.random.manual_seed, 4)
    run()
    got = ours(x)
    run()
    assert_same(got, twin(x))
    assert_same(ours.eval()(x), twin.eval()(x))


@kinds
@needs_extension
@pytest.mark.parametrize("batch", [1, 3])
def test_the_gradient_of_a_transposed_input_lies_as_it(kind, batch):
    """PyTorch's backward of a norm is wrong for a gradient that lies otherwise than its map."""
    norm, theirs = nn.BatchNorm2d(6).eval(), getattr(nn, kind)(6, 4)
    ours = getattr(cf, kind)(6, 4)
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(batch, 6, 2, 5), []
    for layer in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        if layer is theirs:
            y.register_hook(lambda grad: grad.contiguous())
        out, _ = layer(y.flatten(2).permute(2, 0, 1))
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
