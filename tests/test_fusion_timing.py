"""What `accelerate` decides by the model: ways to run a site, predicted with its readers, or timed."""

import copy
import json

import pytest
import torch
from accelerated import assert_same, grid, images, net
from forked import run_forked
from helpers import needs_extension
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import carry, run
from cnnlstm_fast.planning import observer, tuner
from cnnlstm_fast.planning.problem import lies_channels_last

pytestmark = [needs_extension, pytest.mark.usefixtures("free_calls")]


@pytest.fixture
def free_calls(monkeypatch):
    """Speculating costs nothing, so that small blocks are worth it too."""
    from cnnlstm_fast.fusion import plan

    monkeypatch.setattr(plan, "OVERHEAD_US", 0)


def chain(count: int = 3) -> nn.Sequential:
    layers = [[nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU()] for i in range(count)]
    return nn.Sequential(*[layer for pair in layers for layer in pair]).eval()


# ---------------------------------------------------------------- timed


def clock(monkeypatch, seconds) -> list[list[str]]:
    """Ways and plans take ``seconds(name)``; returns what was timed."""
    asked: list[list[str]] = []

    def in_turn(names, run):
        asked.append([*names])
        for name in names:
            run(name)
        return [seconds(name) for name in names]

    monkeypatch.setattr(tuner, "_in_turn", in_turn)
    monkeypatch.setattr(tuner, "shortlist", lambda predicted: ["reference", "direct", "chunked"])
    return asked


def by_direct(name: str) -> float:
    return {"PyTorch": 3e-3, "reference": 3e-3, "direct": 1e-3}.get(name, 2e-3)


@pytest.mark.parametrize("training", [False, True])
def test_where_it_stands_pytorch_may_be_faster(tuning, monkeypatch, training):
    """A block that is faster by itself, and slower in the model."""
    asked = clock(monkeypatch, lambda name: 1e-4 if name == "PyTorch" else by_direct(name))
    model = net().train(training)
    fast, x = cf.accelerate(model), images()
    with cf.tune(), torch.set_grad_enabled(training):
        for _ in range(4):
            fast(x)
        sites = fast.report().sites
        assert {site.plan for site in sites} == {"PyTorch"}
        assert all(site.reason.startswith("timed w") for site in sites[:2])  # the last one ends with a sum
        told = [site.reason for site in sites if "where it stands" in site.reason]
        assert len(told) >= 2 and all(reason.endswith("100 us by PyTorch") for reason in told)
        assert sum("PyTorch" in names for names in asked) >= 3
        asked.clear()
        for other in (fast, cf.accelerate(model)):
            for _ in range(3):
                other(x)
        assert not asked


def test_two_accelerated_models_take_the_same_ways(tuning, monkeypatch):
    """The second one, in a process that knows nothing, reads what the first one kept."""
    asked = clock(monkeypatch, by_direct)
    model, x = chain(), torch.randn(2, 3, 9, 8)
    reports = []
    with cf.tune(), torch.no_grad():
        for _ in range(2):
            fast = cf.accelerate(model)
            for _ in range(3):
                fast(x)
            reports.append(fast.report())
            tuner._known.clear()
            timed = len(asked)
    assert reports[0] == reports[1] and timed == len(asked) == len(list(tuning.iterdir())) > 3
    kept = [json.loads(path.read_text()) for path in tuning.iterdir()]
    sites = [entry for entry in kept if "site" in entry["call"]]
    assert sites and all(entry["choices"][0].startswith("PyTorch") for entry in sites)


def test_what_was_predicted_is_timed_when_asked(tuning, monkeypatch):
    """And the other way round: a decision belongs to the mode in which it was made."""
    asked = clock(monkeypatch, lambda name: 1e-4 if name == "PyTorch" else by_direct(name))
    fast, x = cf.accelerate(chain(1)), torch.randn(8, 3, 24, 22)

    def plans():
        with torch.no_grad():
            fast(x), fast(x)
        return [site.plan for site in fast.report().sites]

    assert plans() == ["direct"] and not asked
    with cf.tune():
        assert plans() == ["direct", "PyTorch"] and asked
    asked.clear()
    plans()
    assert not asked  # both are remembered


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["direct, carried", "PyTorch, carried"])
def test_maps_are_carried_where_that_is_faster(tuning, monkeypatch, way, training):
    """As blocks, and as PyTorch's convolutions."""
    clock(monkeypatch, lambda name: 1e-3 if name == way else by_direct(name) + 1e-3)
    layouts, convolutions = [], []
    run_block, pass_on = run.run_block, carry._pass

    def noted(x, *args, layout, **kwargs):
        layouts.append((lies_channels_last(x), layout))
        return run_block(x, *args, layout=layout, **kwargs)

    monkeypatch.setattr(run, "run_block", noted)
    monkeypatch.setattr(carry, "_pass", lambda passage: (convolutions.append(1), pass_on(passage))[1])
    model = chain().train(training)
    for layer in (0, 2, 4):
        nn.init.constant_(model[layer].bias, 0.291)  # so that no sum is nearly zero, where ReLU has a kink
    fast = cf.accelerate(model)
    with cf.tune(), torch.set_grad_enabled(training):
        for _ in range(4):
            layouts.clear()
            convolutions.clear()
            x = grid(2, 3, 9, 8)
            got, expected = fast(x), copy.deepcopy(model)(x)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert got.stride() == expected.stride() and type(got) is Tensor
    assert layouts == ([(True, "channels_last")] * 3 if way.startswith("direct") else [])
    assert len(convolutions) == (0 if way.startswith("direct") else 3)
    with cf.tune():
        assert_same(cf.accelerate(net().train()), net().train(), images())


def test_timing_leaves_no_trace(tuning, monkeypatch):
    """Statistics, gradients, versions, random numbers, and what `explain` is told."""
    clock(monkeypatch, by_direct)
    told = []

    class Watching:
        alone = True

        def block_begins(self, *args):
            told.append(args[1].shape)

        def epilogue_begins(self, *args): ...

        def block_ends(self, out): ...

        def layer_runs(self, plan, reason): ...

        def as_is(self, module, reason): ...

    model = net().train()
    with cf.tune():
        assert_same(cf.accelerate(model), model, images())
        fast, x = cf.accelerate(model), grid(2, 3, 6, 8)
        fast(x)
        state, buffers = torch.get_rng_state(), copy.deepcopy(dict(fast.named_buffers()))
        versions = [p._version for p in fast.parameters()]
        tuner._known.clear()
        monkeypatch.setattr(observer, "current", Watching())
        fast(x)
        assert len(told) == 3 and type(observer.current) is Watching
        assert torch.equal(torch.get_rng_state(), state)
        assert [p._version for p in fast.parameters()] == versions
        assert all(p.grad is None for p in fast.parameters())
    twin = copy.deepcopy(model)
    twin.load_state_dict({**twin.state_dict(), **buffers})
    twin(x)
    torch.testing.assert_close(dict(fast.named_buffers()), dict(twin.named_buffers()))


def test_nothing_is_timed_while_others_watch(tuning, monkeypatch):
    asked = clock(monkeypatch, by_direct)
    model = chain(2)
    x = torch.randn(2, 3, 9, 8)
    with cf.tune(), torch.no_grad():
        fast = cf.accelerate(model)
        torch.compile(fast, backend="eager")(x)
        torch.jit.trace(fast, x, check_trace=False)
        torch.export.export(fast, (x,))
        torch.func.vmap(lambda one: fast(one.unsqueeze(0)))(x)
        assert not asked
        fast(x), fast(x)
        assert asked


def test_a_way_that_cannot_be_timed_is_predicted(tuning, monkeypatch):
    def fails(names, run):
        raise MemoryError

    monkeypatch.setattr(tuner, "_in_turn", fails)
    monkeypatch.setattr(tuner, "shortlist", lambda predicted: ["reference"])
    model, x = chain(2), torch.randn(8, 3, 24, 22)
    given, run_block = [], run.run_block

    def noted(x, *args, **kwargs):
        given.append(lies_channels_last(x))
        return run_block(x, *args, **kwargs)

    monkeypatch.setattr(run, "run_block", noted)
    fast = cf.accelerate(model)
    with cf.tune(), torch.no_grad():
        for _ in range(3):
            given.clear()
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert not any("timed" in site.reason for site in fast.report().sites)
    assert len(given) == 2


def test_two_processes_have_the_same_bits(tuning):
    """The first one times, whatever it finds; the second one reads it."""
    code = """
import torch, cnnlstm_fast as cf
from torch import nn
from cnnlstm_fast.planning import tuner
torch.manual_seed(0)
if {reads}:
    tuner._in_turn = None
model = nn.Sequential(
    nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 32, 3), nn.SiLU(),
    nn.Conv2d(32, 16, 3, padding=1),
)
fast = cf.accelerate(model)
for _ in range(3):
    loss = fast(torch.randn(4, 3, 30, 26)).square().mean()
    loss.backward()
sums = [float(p.grad.double().sum()).hex() for p in fast.parameters()]
print(tuner.enabled, float(loss.double()).hex(), sums)
"""
    env = {"CNNLSTM_FAST_TUNE": "1", "CNNLSTM_FAST_CACHE": str(tuning)}
    first, second = (run_forked(code.replace("{reads}", reads), **env) for reads in ("False", "True"))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout and first.stdout.startswith("True")
    assert any("site" in json.loads(path.read_text())["call"] for path in tuning.iterdir())
