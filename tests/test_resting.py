"""Convolutions without their hooks, for as long as the model runs."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from twins import grid

import cnnlstm_fast as cf
from cnnlstm_fast import resting
from cnnlstm_fast.capture import HOOK


class Tiny(nn.Module):
    """Convolutions too small to be blocks, whose inputs a test may choose."""

    def __init__(self, count: int = resting.LEAST):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(count)])
        self.seen: list[int] = []
        self.within = lambda model, x: x

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        self.seen.append(hooked(self))
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.within(self, x.flip(-1) if flip else x)


def hooked(model: nn.Module) -> int:
    """How many convolutions carry a hook."""
    return sum(bool(m._forward_pre_hooks) for m in model.modules() if isinstance(m, nn.Conv2d))


def settled(model: nn.Module, x: Tensor, **kwargs) -> nn.Module:
    for _ in range(resting.FIRST):
        model(x, **kwargs)
    return model


@pytest.fixture
def x() -> Tensor:
    return grid(2, 3, 6, 5)


def test_hooks_rest_while_the_model_runs(x):
    model = Tiny().eval()
    fast = cf.accelerate(model)
    for call in range(resting.WATCHED + 2):
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0)
        watched = call < resting.FIRST or (call + 1) % resting.WATCHED == 0
        assert fast.seen[-1] == (resting.LEAST if watched else 0)
        assert hooked(fast) == resting.LEAST


def test_an_input_is_not_kept_alive():
    class Sample:
        """What users wrap their tensors in."""

        def __init__(self):
            self.x = grid(2, 3, 6, 5)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.tiny = Tiny()

        def forward(self, sample: Sample) -> Tensor:
            return self.tiny(sample.x)

    fast, sample = cf.accelerate(Wrapped().eval()), Sample()
    fast(sample)
    alive = weakref.ref(sample)
    del sample
    assert alive() is None


@pytest.mark.parametrize("change", ["size", "strides", "mode", "part's mode", "grad", "keyword", "dtype"])
def test_calls_that_are_not_alike_are_looked_at(change, x):
    fast = settled(cf.accelerate(Tiny().eval()), x)
    kwargs = {}
    if change == "size":
        x = grid(2, 3, 7, 5)
    elif change == "strides":
        x = x.contiguous(memory_format=torch.channels_last)
    elif change == "mode":
        fast.train()
    elif change == "part's mode":
        fast.convs[2].train()
    elif change == "keyword":
        kwargs = {"flip": True}
    elif change == "dtype":
        fast, x = fast.double(), x.double()
    with torch.set_grad_enabled(change != "grad"):
        fast(x, **kwargs)
    assert fast.seen[-1] == resting.LEAST


def test_a_part_called_by_itself_is_fast_as_ever(x):
    """The model was trained; then somebody calls one of its parts on what is worth a block."""
    block = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2))

    class Model(Tiny):
        def __init__(self):
            super().__init__()
            self.block = block

    fast, large = settled(cf.accelerate(Model().eval()), x), torch.randn(4, 3, 96, 96)
    for _ in range(2):
        fast.block(large)
    ours, own = fast.block[0]._forward_pre_hooks[HOOK], fast.convs[0]._forward_pre_hooks[HOOK]
    assert [site.plan for recipe in ours.known.values() for site in recipe.sizes.values()] == ["direct"]
    assert own.known


def test_what_finds_work_later_is_noticed(x):
    """The same inputs, but what goes on inside has grown."""

    class Grows(Tiny):
        times = 1

        def forward(self, x):
            return super().forward(x.repeat(1, 1, self.times, self.times))

    model = Grows().eval()
    fast = settled(cf.accelerate(model), x)
    fast.times = model.times = 30
    for _ in range(2 * resting.WATCHED + resting.FIRST):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    plans = {site.plan for site in fast.report().sites}
    assert plans != {"PyTorch"} and fast.seen[-1] > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_rests(error, x):
    fast = settled(cf.accelerate(Tiny().eval()), x)

    def fail(model, y):
        raise error("on its way")

    fast.within = fail
    with pytest.raises(error, match="on its way"):
        fast(x)
    fast.within = lambda model, y: y
    if error is KeyboardInterrupt:  # PyTorch calls no hook then; the next call puts it right
        fast(grid(2, 3, 9, 5))
        assert fast.seen[-1] == resting.LEAST
    assert hooked(fast) == resting.LEAST


def test_a_hook_set_meanwhile_stays_and_can_be_removed(x):
    fast, calls = settled(cf.accelerate(Tiny().eval()), x), []
    handles = []

    def set_one(model, y):
        handles.append(model.convs[1].register_forward_pre_hook(lambda *_: calls.append(1)))
        return y

    fast.within = set_one
    fast(x)
    fast.within = lambda model, y: y
    assert fast.seen[-1] == 0 and not calls
    fast(x), fast(x)
    assert len(calls) == 2 and HOOK in fast.convs[1]._forward_pre_hooks
    handles[0].remove()
    fast(x)
    assert len(calls) == 2 and hooked(fast) == resting.LEAST


def test_within_itself(x):
    fast = settled(cf.accelerate(Tiny().eval()), x)
    depth = []

    def again(model, y):
        depth.append(1)
        return model(y) if len(depth) < 3 else y

    fast.within = again
    fast(x)
    assert hooked(fast) == resting.LEAST


def test_many_threads(x):
    model = Tiny().eval()
    fast, wrong = settled(cf.accelerate(model), x), []
    inputs = [grid(2, 3, 6, 5 + i % 3) for i in range(6)]
    expected = [model(each) for each in inputs]

    def run(i):
        for _ in range(60):
            if not torch.equal(fast(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    fast(grid(2, 3, 11, 5))
    assert not wrong and hooked(fast) == resting.LEAST


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), cf.accelerate])
def test_copies_rest_by_themselves(copied, x):
    model = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(resting.LEAST)]).eval()
    fast = settled(cf.accelerate(model), x)
    other = copied(fast)
    ours, theirs = fast._forward_pre_hooks[HOOK], other._forward_pre_hooks[HOOK]
    assert theirs is not ours and theirs.sites is None
    assert other._forward_hooks[HOOK].rest is theirs
    torch.testing.assert_close(settled(other, x)(x), model(x), rtol=0, atol=0)
    assert len(theirs.habits[next(iter(theirs.habits))].resting) == resting.LEAST
    whole = cf.accelerate(nn.Sequential(fast, nn.ReLU()))
    assert not whole[0]._forward_hooks and list(whole._forward_hooks) == [HOOK]


def test_few_convolutions_and_other_inputs(x):
    few = cf.accelerate(Tiny(resting.LEAST - 1))
    assert not few._forward_pre_hooks and not few._forward_hooks
    sparse = cf.accelerate(nn.Sequential(nn.Module(), *[nn.Conv2d(1, 1, 1) for _ in range(resting.LEAST)]))
    sparse[0].forward = lambda given: given[0].to_dense()
    for _ in range(resting.FIRST + 2):
        sparse([torch.ones(1, 1, 2, 2).to_sparse(), {"a": 1}])


def test_traced_and_compiled(x):
    model = Tiny().eval()
    fast = settled(cf.accelerate(model), x)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fast, x)(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.compile(fast, backend="eager")(x), expected, rtol=1e-5, atol=1e-5)
    assert hooked(fast) == resting.LEAST
