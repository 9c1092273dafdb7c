"""The copy that ``accelerate`` works on, against what ``copy.deepcopy`` makes of the same model."""

import collections
import concurrent.futures
import contextvars
import copy
import dataclasses
import functools
import gc
import logging
import queue
import threading
import weakref

import pytest
import torch
from copies import Counter, Net, Takes, assert_like_deepcopy, images
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.copying import copy_sharing_tensors, held_modules

# ---------------------------------------------------------------- hooks


class Saver:
    """A hook that is an object, and knows the model."""

    def __init__(self, model):
        self.model = model

    def __call__(self, module, args, result):
        self.model.keep("c", module, args, result)

    def method(self, module, args, result):
        self(module, args, result)


class SlottedSaver(Saver):
    __slots__ = ("model",)


class LockedSaver(Saver):
    def __init__(self, model):
        super().__init__(model)
        self.lock, self.jobs = threading.Lock(), queue.Queue()

    def __call__(self, module, args, result):
        with self.lock:
            super().__call__(module, args, result)


class WeakSaver(Saver):
    def __init__(self, model):
        self.reference = weakref.ref(model)

    def __call__(self, module, args, result):
        self.reference().keep("c", module, args, result)


class ProxySaver(Saver):
    def __init__(self, model):
        self.model = weakref.proxy(model)


class WeakMethodSaver(Saver):
    def __init__(self, model):
        self.kept = weakref.WeakMethod(model.keep)

    def __call__(self, module, args, result):
        self.kept()("c", module, args, result)


@dataclasses.dataclass(frozen=True)
class FrozenSaver:
    models: tuple

    def __call__(self, module, args, result):
        self.models[0].keep("c", module, args, result)


HOOKS = {
    "partial": lambda m: functools.partial(m.keep, "c"),
    "partial of a partial": lambda m: functools.partial(functools.partial(m.keep), "c"),
    "partial of a function": lambda m: functools.partial(
        lambda model, module, args, result: model.keep("c", module, args, result), m
    ),
    "partial with keywords": lambda m: functools.partial(
        lambda module, args, result, model: model.keep("c", module, args, result), model=m
    ),
    "callable object": Saver,
    "its method": lambda m: Saver(m).method,
    "with slots": SlottedSaver,
    "frozen": lambda m: FrozenSaver((m,)),
    "with a lock": LockedSaver,
    "its method, with a lock": lambda m: LockedSaver(m).method,
    "partial of one with a lock": lambda m: functools.partial(LockedSaver(m)),
    "weak reference": WeakSaver,
    "weak proxy": ProxySaver,
    "weak method": WeakMethodSaver,
}


@pytest.mark.parametrize("where", ["conv2", "bn1", "pool"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_bound_to_the_copy(kind, where):
    model, twin = Takes(), Takes()
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):  # a copy by deepcopy keeps its weak references to the original
        m.get_submodule(where).register_forward_hook(HOOKS[kind](m))
    fast = assert_like_deepcopy(model, twin)
    assert not model.kept
    again = cf.accelerate(fast)
    torch.testing.assert_close(again.eval()(x := images()), fast.eval()(x))
    assert not model.kept and not fast.kept


@pytest.mark.parametrize("kind", ["pre", "with_kwargs", "backward", "backward_pre"])
def test_other_hooks_are_bound_to_the_copy(kind):
    class Counts(Net):
        def __init__(self):
            super().__init__()
            self.calls: list[int] = []
            note = functools.partial(self.note, self.calls)
            if kind == "pre":
                self.conv1.register_forward_pre_hook(note)
            elif kind == "with_kwargs":
                self.conv1.register_forward_hook(note, with_kwargs=True, always_call=True)
            elif kind == "backward":
                self.conv1.register_full_backward_hook(note)
            else:
                self.conv1.register_full_backward_pre_hook(note)

        def note(self, calls, *args):
            assert calls is self.calls
            calls.append(len(args))

    model = Counts()
    twin, fast = copy.deepcopy(model), cf.accelerate(model)
    for m in (twin, fast):
        m(images().requires_grad_()).sum().backward()
    assert fast.calls == twin.calls and fast.calls and not model.calls


def test_handles_remove_what_the_copy_has():
    model = Takes()
    model.handle = model.conv2.register_forward_hook(functools.partial(model.keep, "c"))
    model.kept_alive = model.conv1.weight.register_hook(lambda g: g * 2)
    fast = cf.accelerate(model)
    fast.handle.remove()
    with pytest.raises(KeyError):
        fast(images())
    model(images())
    fast.kept_alive.remove()  # of a tensor, which both have
    assert not model.conv1.weight._backward_hooks


class Renames(nn.Module):
    """Whose ``state_dict`` hooks know their module in every way there is."""

    def __init__(self):
        super().__init__()
        self.conv, self.log = nn.Conv2d(3, 4, 3), []
        self.register_load_state_dict_pre_hook(Renames.before)
        self.register_load_state_dict_post_hook(Renames.after)
        self.register_state_dict_pre_hook(Renames.asked)
        self.register_state_dict_post_hook(Renames.given)
        self._register_load_state_dict_pre_hook(self.old)
        self.conv._register_load_state_dict_pre_hook(
            functools.partial(self.nested, self.log), with_module=True
        )

    def before(self, *args):
        self.log.append("before")

    def after(self, keys):
        self.log.append("after")

    def asked(self, *args):
        self.log.append("asked")

    def given(self, *args):
        self.log.append("given")

    def old(self, *args):
        self.log.append("old")

    def nested(self, log, module, *args):
        assert module is self.conv and log is self.log
        self.log.append("nested")

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("original_lives", [True, False])
def test_state_dict_hooks(original_lives):
    model = Renames()
    twin, fast = copy.deepcopy(model), cf.accelerate(model)
    if not original_lives:
        del model
        gc.collect()
    for m in (twin, fast):
        m.load_state_dict(m.state_dict())
    assert fast.log == twin.log and len(fast.log) == 6
    if original_lives:
        assert not model.log


# ---------------------------------------------------------------- what cannot be copied


class Late(Counter):
    """Whose lock comes after much that can be copied."""

    def __init__(self):
        self.n, self.friends, self.me = 0, [{"a": [1, 2]}], self
        self.lock = threading.RLock()


class Slotted:
    __slots__ = ("lock", "n")

    def __init__(self):
        self.n, self.lock = 0, threading.Lock()

    count = Counter.count


class Refuses:
    n = 0

    def count(self, *_):
        self.n += 1

    def __reduce_ex__(self, protocol):
        raise RuntimeError("is not to be copied")


class RefusesByItself(Refuses):
    __reduce_ex__ = object.__reduce_ex__

    def __deepcopy__(self, memo):
        memo[id(self)] = object()
        raise NotImplementedError


def numbers():
    yield from range(100000)


UNCOPYABLE = {
    "counter": Counter,
    "late": Late,
    "slots": Slotted,
    "reduce": Refuses,
    "deepcopy": RefusesByItself,
    "lock": threading.Lock,
    "condition": threading.Condition,
    "queue": queue.Queue,
    "executor": lambda: concurrent.futures.ThreadPoolExecutor(1),
    "generator": numbers,
    "file": lambda: open(__file__),
    "local": threading.local,
    "context": lambda: contextvars.ContextVar("v"),
    "view": lambda: {"a": 1}.keys(),
    "frame": lambda: __import__("sys")._getframe(),
    "handler": logging.StreamHandler,
    "module": lambda: functools,
}


@pytest.mark.parametrize("kind", UNCOPYABLE)
def test_what_cannot_be_copied_is_shared_whole(kind):
    thing = UNCOPYABLE[kind]()
    model = Net()
    model.thing, model.nested = thing, {"a": [(1, thing), [model.conv1]]}
    model.conv1.thing = thing
    model.alias = getattr(thing, "friends", None)
    if kind != "module":
        with pytest.raises(Exception):  # noqa: B017  # whatever it is
            copy.deepcopy(model)
    attributes = dict(getattr(thing, "__dict__", {}))
    fast = cf.accelerate(model)
    assert fast.thing is thing and fast.conv1.thing is thing and fast.nested["a"][0][1] is thing
    assert fast.nested is not model.nested and fast.nested["a"][1][0] is fast.conv1
    assert fast.alias is model.alias
    now = getattr(thing, "__dict__", {})
    assert now.keys() == attributes.keys() and all(now[k] is v for k, v in attributes.items())


@pytest.mark.parametrize("kind", ["counter", "late", "slots", "reduce", "deepcopy"])
def test_hooks_that_cannot_be_copied(kind):
    model, counter = Net().eval(), UNCOPYABLE[kind]()
    model.conv1.register_forward_hook(counter.count)
    fast = cf.accelerate(model)
    x = images()
    torch.testing.assert_close(fast(x), model(x))
    assert counter.n == 2


def test_nothing_half_built_is_handed_on():
    """The object that fails is met by way of others, before and after it fails."""

    class Inner:
        pass

    outer = Late()
    inner = Inner()
    inner.outer, outer.inner = outer, inner
    model = Net()
    model.first, model.second, model.third = inner, [inner], {"outer": outer}
    fast = cf.accelerate(model)
    assert fast.first.outer.lock is outer.lock and fast.first.outer.inner is fast.first
    assert fast.second[0] is fast.first and fast.third["outer"] is fast.first.outer is outer


class Knows:
    """Knows the model, and cannot be copied as a whole."""

    def __init__(self, model):
        self.lock, self.model, self.queue, self.numbers = threading.Lock(), model, queue.Queue(), [1]
        self.rows = (row for row in [model])


def test_an_object_that_knows_the_model():
    model = Net()
    model.knows = [Knows(model.conv1), Knows(model)]
    fast = cf.accelerate(model)
    assert fast.knows[1].model is fast and fast.knows[0].model is fast.conv1
    for ours, theirs in zip(fast.knows, model.knows, strict=True):
        assert ours is not theirs and ours.lock is theirs.lock and ours.queue is theirs.queue
        assert ours.rows is theirs.rows and ours.numbers is not theirs.numbers


def test_dictionaries_of_a_module_are_never_shared():
    """Even where something that cannot be copied holds them, or a handle of a hook."""
    model, counter = Net(), Counter()
    model.holder, model.handles = Counter(), Counter()
    model.holder.hooks, model.holder.rest = model.conv1._forward_hooks, model.conv2.__dict__["_modules"]
    model.handles.all = [model.bn1.register_forward_hook(counter.count)]
    fast = cf.accelerate(model)
    assert fast.holder.hooks is fast.conv1._forward_hooks is not model.conv1._forward_hooks
    assert fast.holder.rest is fast.conv2._modules is not model.conv2._modules
    assert fast.holder.lock is model.holder.lock
    fast(images())
    fast.handles.all[0].remove()
    fast(images())
    assert counter.n == 1 and len(model.bn1._forward_hooks) == 1


class Guarded(Net):
    """Takes its lock away to be copied, and makes another."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


def test_a_state_of_its_own():
    model = Guarded()
    fast = assert_like_deepcopy(model)
    assert fast.lock is not model.lock


def test_errors_that_are_no_refusal_come_out():
    class Interrupted:
        def __deepcopy__(self, memo):
            raise KeyboardInterrupt

    model = Net()
    model.thing = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        cf.accelerate(model)


# ---------------------------------------------------------------- weak references


class Weak(Net):
    def __init__(self):
        super().__init__()
        self.conv2.__dict__["proxy"] = weakref.proxy(self)
        self.conv2.reference = weakref.ref(self.conv1)
        self.conv2.method = weakref.WeakMethod(self.keep)
        self.conv2.set = weakref.WeakSet([self.conv1])
        self.conv2.keys = weakref.WeakKeyDictionary({self.conv1: [self.bn1]})
        self.conv2.values = weakref.WeakValueDictionary({"self": self})
        self.outside = []
        self.conv2.dead = weakref.ref(nn.ReLU())
        self.conv2.dead_proxy = [weakref.proxy(nn.ReLU())]


def test_weak_references_mean_the_copy():
    model, other = Weak(), nn.ReLU()
    model.other, model.others = weakref.ref(other), weakref.WeakKeyDictionary({other: 3})
    model.noted = weakref.ref(model.conv1, model.outside.append)
    model.of_tensor = weakref.ref(model.conv1.weight)
    twin = Net()
    twin.load_state_dict(model.state_dict())
    fast = assert_like_deepcopy(model, twin)
    part = fast.conv2
    assert part.proxy.conv1 is fast.conv1 and part.reference() is fast.conv1
    assert part.method().__self__ is fast and list(part.set) == [fast.conv1]
    assert list(part.keys.items()) == [(fast.conv1, [fast.bn1])] and part.values["self"] is fast
    assert part.dead() is None and part.dead_proxy[0] is model.conv2.dead_proxy[0]
    assert fast.other() is other and fast.others[other] == 3 and fast.others is not model.others
    assert fast.of_tensor() is model.conv1.weight and fast.noted() is fast.conv1
    assert model.conv2.proxy.conv1 is model.conv1 and list(model.conv2.set) == [model.conv1]


def test_the_original_can_go():
    model = Weak()
    model.conv1.register_forward_hook(functools.partial(model.keep, "c"))
    fast, alive = cf.accelerate(model), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    fast(images())
    assert fast.conv2.proxy.kept is fast.kept and "c" in fast.kept


# ---------------------------------------------------------------- structure


class Cyclic(Net):
    """Holds itself in every way that calls allow."""

    def __init__(self):
        super().__init__()
        self.me, self.by_name = [self], {"me": self}
        self.conv1.parent = [self]
        self.hidden = [nn.Conv2d(8, 8, 3, padding=1), nn.LSTM(8, 8)]
        self.deque, self.order = collections.deque([self.conv1]), collections.OrderedDict(a=self.bn1)
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.conv2.weight
        self.same = self.conv2

    def forward(self, x):
        y = self.pool(torch.relu(self.order["a"](self.deque[0](x))))
        y = self.me[0].tied(y) + self.by_name["me"].same(y) + self.hidden[0](y)
        return self.hidden[1](y.flatten(2).permute(2, 0, 1))[0]


def test_models_that_hold_themselves():
    model = Cyclic()
    fast = assert_like_deepcopy(model)
    assert fast.me[0] is fast.by_name["me"] is fast.conv1.parent[0] is fast and fast.same is fast.conv2
    assert fast.deque[0] is fast.conv1 and fast.order["a"] is fast.bn1
    assert fast.hidden[0].weight is model.hidden[0].weight and fast.hidden[0] is not model.hidden[0]
    assert isinstance(fast.hidden[1], cf.LSTM) and not isinstance(model.hidden[1], cf.LSTM)
    assert {type(m) for m in held_modules(model)} >= {Cyclic, nn.LSTM}


class Marked(Tensor):
    """A subclass, which PyTorch's functions keep."""


def test_tensors_of_all_kinds_are_shared():
    model = Net()
    history = model.conv1.weight * 2
    kinds = {
        "leaf": torch.randn(3),
        "history": history,
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
        "jagged": torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
        "subclass": torch.randn(3).as_subclass(Marked),
        "meta": torch.empty(3, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        "storage": torch.randn(3).untyped_storage(),
        "inference": torch.inference_mode()(torch.ones)(2),
        "parameter": nn.Parameter(torch.randn(2)),
    }
    model.tensors = {name: [value] for name, value in kinds.items()}
    model.packed = nn.utils.rnn.pack_sequence([torch.randn(2, 3)])
    model.optimizer = torch.optim.Adam(model.parameters())
    fast = cf.accelerate(model)
    for name, value in kinds.items():
        assert fast.tensors[name] is not model.tensors[name] and fast.tensors[name][0] is value, name
    assert fast.packed.data is model.packed.data
    ours = fast.optimizer.param_groups[0]["params"]
    assert all(p is q for p, q in zip(ours, model.parameters(), strict=True))
    assert fast.optimizer is not model.optimizer


def test_dictionaries_of_buffers_are_shared():
    model = Net()
    fast = copy_sharing_tensors(model)
    assert fast.bn1._buffers is model.bn1._buffers and fast.bn1._parameters is not model.bn1._parameters
    assert fast.conv1._buffers is not model.conv1._buffers
    fast.double()
    assert model(images().double()).dtype == torch.float64


def test_deeper_than_the_stack():
    class Link(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model: nn.Module = nn.Conv2d(1, 1, 1)
    for _ in range(2000):
        model = Link(model)
    with pytest.raises(RecursionError):
        copy.deepcopy(model)
    fast = copy_sharing_tensors(model)
    depth = 0
    while isinstance(fast, Link):
        fast, model, depth = fast.inner, model.inner, depth + 1
        assert fast is not model
    assert depth == 2000 and fast.weight is model.weight


def test_an_accelerated_model_again():
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(9)], nn.LSTM(6, 4))
    model[-1].batch_first = True
    fast = cf.accelerate(model)
    fast[:-1](images())
    again = cf.accelerate(fast)
    for ours, theirs in zip(again.modules(), fast.modules(), strict=True):
        assert ours is not theirs and type(ours) is type(theirs)
        assert ours._forward_pre_hooks.keys() == theirs._forward_pre_hooks.keys()
        if isinstance(ours, nn.Conv2d):
            assert ours._conv_forward is not theirs._conv_forward and not ours._conv_forward.known
            assert ours._conv_forward.module() is ours
    assert again.report.model() is again
