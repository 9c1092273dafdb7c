"""``accelerate`` on modules with ways of their own: compiled, patched, traced, copying themselves."""

import copy
import functools
import logging
import types
import weakref

import pytest
import torch
import torch.distributed as dist
from copies import Counter, Net, assert_like_deepcopy, fingerprint, images
from forked import run_forked
from torch import nn
from torch.nn.utils import parametrizations, prune

import cnnlstm_fast as cf

# ---------------------------------------------------------------- compiled and patched


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch._dynamo.reset()


class OwnState(Net):
    """Whose state takes along what PyTorch's leaves out."""

    def __getstate__(self):
        return self.__dict__.copy()


def compiled(way: str) -> nn.Module:
    model = OwnState() if way == "own state" else Net()
    if way in ("compile", "own state"):
        model.compile(backend="eager")
    elif way == "compile of parts":
        for part in model.children():
            part.compile(backend="eager")
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif way == "forward of a part":
        model.bn1.forward = torch.compile(model.bn1.forward, backend="eager")
    elif way == "part":
        model.bn1 = torch.compile(model.bn1, backend="eager")
    elif way == "parametrized":
        parametrizations.weight_norm(model.conv1)
        model.conv1.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "way",
    ["compile", "own state", "compile of parts", "forward", "forward of a part", "part", "parametrized"],
)
def test_compiled_models(way):
    model = compiled(way)
    model(images())
    twin = Net() if way != "parametrized" else copy.deepcopy(model)
    if way == "part":
        twin.bn1 = torch.compile(twin.bn1, backend="eager")
    twin.load_state_dict(model.state_dict())
    assert_like_deepcopy(model, twin)


def test_a_compiled_wrapper():
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    fast = cf.accelerate(wrapped)
    assert type(fast) is Net and fast.conv1.weight is model.conv1.weight
    torch.testing.assert_close(fast.eval()(x := images()), copy.deepcopy(model).eval()(x))


@torch.compile(backend="eager")
def doubled(x):
    return x * 2


def twice(self, x):
    return Net.forward(self, x) * 2


PATCHES = {
    "method": lambda m: types.MethodType(twice, m),
    "partial": lambda m: functools.partial(twice, m),
    "old forward": lambda m: functools.partial(lambda old, x: old(x) * 3, m.forward),
    "updated": lambda m: functools.update_wrapper(functools.partial(twice, m), m.forward),
    "weak": lambda m: functools.partial(lambda ref, x: twice(ref, x), weakref.proxy(m)),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_patched_forwards(kind):
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        m.forward = PATCHES[kind](m)
    assert_like_deepcopy(model, twin)


def test_functions_stay():
    """As in a deep copy: nobody can tell what a closure means by what it holds."""
    model = Net().eval()
    forward = model.forward
    model.forward = lambda x: forward(x) * 2
    model.double, model.log = doubled, logging.getLogger("x")
    fast = assert_like_deepcopy(model)
    assert fast.forward is model.forward and fast.double is doubled and fast.log is model.log


# ---------------------------------------------------------------- modules with manners of their own


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(Net())


class Holds(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


@pytest.mark.parametrize("where", ["root", "part"])
def test_graph_modules(where):
    graph = traced()
    graph.note, graph.lock = ["anything"], None
    graph.unused = nn.Conv2d(1, 1, 1)
    fast = assert_like_deepcopy(graph if where == "root" else Holds(graph), deepcopied(graph, where))
    ours = fast if where == "root" else fast.inner
    assert isinstance(ours, torch.fx.GraphModule) and ours.graph is not graph.graph
    assert type(ours) is not type(graph) and ours.note == graph.note and ours.note is not graph.note
    ours.graph.lint()
    ours.recompile()
    torch.testing.assert_close(ours(x := images()), graph.train(ours.training)(x), rtol=1e-4, atol=1e-5)


def deepcopied(graph, where):
    """A copy by deepcopy, which drops what a graph does not use."""
    twin = copy.deepcopy(graph)
    twin.unused = copy.deepcopy(graph.unused)
    return twin if where == "root" else Holds(twin)


def test_hooks_and_locks_of_a_graph_module():
    graph = traced().eval()
    graph.counter = Counter()
    graph.register_forward_hook(graph.counter.count)
    fast = cf.accelerate(graph)
    torch.testing.assert_close(fast(x := images()), graph(x))
    assert graph.counter.n == 2 and fast.counter is graph.counter


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), images())])
def test_torchscript_is_shared(make):
    script = make(Net().eval())
    fast = cf.accelerate(Holds(script))
    assert fast.inner is script
    x = images()
    torch.testing.assert_close(fast(x), script(x) * 2)
    assert cf.accelerate(script) is script and cf.accelerate(script).conv1.weight is script.conv1.weight


def test_data_parallel():
    assert_like_deepcopy(nn.DataParallel(Net()))


_DISTRIBUTED = """
import os, sys
sys.path.insert(0, "tests")
import test_copying_modules as t
t.train_distributed({store!r})
print("the end", flush=True)
os._exit(0)
"""


def train_distributed(store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    model = nn.parallel.DistributedDataParallel(Net())
    twin, fast = copy.deepcopy(model), cf.accelerate(model)
    for m in (twin, fast):
        for _ in range(3):
            torch.manual_seed(1)
            m.zero_grad()
            m(images()).sum().backward()
    for ours, theirs in zip(fast.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert next(fast.parameters()) is next(model.parameters())


def test_distributed_data_parallel(tmp_path):
    """In a process that just ends: gloo's group waits with the GIL for a thread that may wait for it."""
    ran = run_forked(_DISTRIBUTED.format(store=str(tmp_path / "store")))
    assert ran.stdout == "the end\n", ran.stderr[-2000:]


REPARAMETRIZED = {
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.conv1),
    "weight_norm": lambda m: parametrizations.weight_norm(m.conv1),
    "orthogonal": lambda m: parametrizations.orthogonal(m.conv1),
    "old_spectral_norm": lambda m: nn.utils.spectral_norm(m.conv1),
    "old_weight_norm": lambda m: nn.utils.weight_norm(m.conv1),
    "pruned": lambda m: prune.l1_unstructured(m.conv1, "weight", 0.4),
    "pruned twice": lambda m: [prune.random_unstructured(m.conv1, "weight", 0.3) for _ in range(2)],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrized(kind):
    model = Net()
    REPARAMETRIZED[kind](model)
    twin = Net()
    REPARAMETRIZED[kind](twin)
    twin.load_state_dict(model.state_dict())
    model.eval()(images())  # the old norms keep a result with a history, which deepcopy refuses
    assert_like_deepcopy(model, twin)


def test_lazy_modules():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.LazyConv2d(4, 3), nn.LazyLinear(2)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(x)).flatten(1))

    model = Lazy()
    fast = cf.accelerate(model)
    assert type(fast.conv) is nn.LazyConv2d and fast.conv.weight is model.conv.weight
    x = images()
    torch.testing.assert_close(fast(x), model(x))
    assert type(fast.conv) is type(model.conv) is nn.Conv2d and not fast.conv._load_state_dict_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_quantized_modules():
    class Ends(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(super().forward(x))

    try:
        model = torch.ao.quantization.quantize_dynamic(Ends().eval(), {nn.Linear}, dtype=torch.qint8)
    except RuntimeError as error:  # a build without a quantized engine: there is nothing to compare with
        pytest.skip(f"PyTorch itself cannot: {error}")
    twin, fast = copy.deepcopy(model), cf.accelerate(model)
    for _ in range(3):
        torch.testing.assert_close(fast(x := images()), twin(x), rtol=1e-2, atol=1e-3)
    assert list(fast.state_dict()) == list(model.state_dict())


class SlottedNet(Net):
    __slots__ = ("__scale", "unset")

    def __init__(self):
        super().__init__()
        self.__scale = [2.0]

    def forward(self, x):
        return super().forward(x) * self.__scale[0]


class CopiesItself(Net):
    """By a deep copy that knows nothing of the memo, and loses what is not its own."""

    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.load_state_dict(self.state_dict())
        twin.train(self.training)
        return twin


class CopiesWithMemo(Net):
    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()}
        return twin


class IsOne(Net):
    def __deepcopy__(self, memo):
        return self


class WontBeCopied(Net):
    def __deepcopy__(self, memo):
        raise TypeError("there is one of these")


@pytest.mark.parametrize("kind", [CopiesItself, CopiesWithMemo])
@pytest.mark.parametrize("where", ["root", "part"])
def test_own_ways_of_being_copied(kind, where):
    inner = kind()
    inner.note, inner.counter = ["kept"], Counter()
    inner.register_forward_hook(inner.counter.count)
    model = inner if where == "root" else Holds(inner)
    twin = kind()
    twin.load_state_dict(inner.state_dict())
    fast = assert_like_deepcopy(model, twin if where == "root" else Holds(twin))
    ours = fast if where == "root" else fast.inner
    assert ours.note == ["kept"] and ours.note is not inner.note and ours.counter is inner.counter
    assert inner.counter.n == 9 and ours.conv1 is not inner.conv1


def test_slots():
    model, twin = SlottedNet(), SlottedNet()
    twin.load_state_dict(model.state_dict())
    fast = assert_like_deepcopy(model, twin)
    assert not hasattr(fast, "unset")


@pytest.mark.parametrize("kind", [IsOne, WontBeCopied])
def test_modules_that_stay_one(kind):
    """They are shared, so nothing of them becomes fast, and nothing else either."""
    inner = kind()
    inner.lstm = nn.LSTM(3, 4)
    model = Holds(inner).eval()
    before = fingerprint(model)
    fast, x = cf.accelerate(model), images()
    assert fast.inner is inner and fast is not model
    for _ in range(3):
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
    assert fingerprint(model) == before and not inner.conv1._forward_pre_hooks
    assert type(inner.lstm) is nn.LSTM and "PyTorch" in {site.plan for site in fast.report().sites}
    assert cf.accelerate(inner) is inner
    assert not inner._forward_pre_hooks and not hasattr(inner, "report")
