"""cf.Sequential against nn.Sequential."""

import copy
import io
import math
import pickle
from collections import OrderedDict

import pytest
import torch
from chains import CHAINS, chains, pair, step_sizes
from helpers import assert_close_as_torch, needs_extension
from torch import nn
from torch.nn.utils import parametrizations, prune
from twins import Ops, assert_like_twin, grid, on_grid, real_strides

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import match
from cnnlstm_fast.planning import choose

# ---------------------------------------------------------------- Sequential: results


@chains
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sequential_results(chain, mode):
    children, shape, _ = chain
    ours, twin = pair(children())
    if mode == "eval":
        ours.eval(), twin.eval()
    elif any(isinstance(m, (nn.Dropout2d, nn.BatchNorm2d)) for m in twin.modules()):
        return check_same_in_training(ours, twin, grid(*shape))
    assert_like_twin(ours, twin, grid(*shape), gradients=len(ours) > 0)


def check_same_in_training(ours, twin, x):
    """Batch statistics and seeded dropout: the values, and what they leave in the buffers."""
    ours, twin = copy.deepcopy(ours), copy.deepcopy(twin)
    torch.manual_seed(5)
    got = ours(x)
    torch.manual_seed(5)
    expected = twin(x)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(ours.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["tutorial", "two_blocks", "signal", "flatten", "conv"])
def test_empty_and_unbatched(name):
    children, shape, _ = CHAINS[name]
    ours, twin = pair(children())
    empty = torch.empty(0, *shape[1:])
    assert ours(empty).shape == twin(empty).shape
    if name in ("flatten", "signal"):  # they end in a Flatten of the wrong dimensions then
        ours, twin = ours[:3], twin[:3]
    x = grid(*shape[1:])
    assert_like_twin(ours, twin, x)


def test_unbatched_flatten_keeps_channels():
    ours, twin = pair([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()])
    x = grid(3, 6, 7)
    assert ours(x).shape == twin(x).shape == (8, 20)
    torch.testing.assert_close(ours(x), twin(x))


MEMORY = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "sliced_channels_last": lambda x: MEMORY["channels_last"](x.repeat_interleave(2, 1))[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("pool", [False, True], ids=["no_pool", "pool"])
@pytest.mark.parametrize("dims", [1, 2], ids=["signal", "image"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("weight_last", [False, True], ids=["weight", "weight_channels_last"])
@pytest.mark.parametrize("shape", [(3, 4, 6, 7), (2, 1, 6, 7), (1, 3, 6, 1), (2, 3, 1, 7), (0, 3, 6, 7)])
def test_strides_are_eagers(pool, dims, memory, weight_last, shape):
    if dims == 1:
        shape = (*shape[:2], shape[2] * shape[3])
    conv = (nn.Conv2d if dims == 2 else nn.Conv1d)(shape[1], 5, 3, padding=1)
    children = [conv, nn.ReLU()]
    if pool and min(shape[2:]) > 1:
        children.append((nn.MaxPool2d if dims == 2 else nn.MaxPool1d)(2))
    ours, twin = pair(children)
    if weight_last:
        conv.weight.data = MEMORY["channels_last"](conv.weight.data)
    x = MEMORY[memory](grid(*shape))
    with torch.no_grad():
        got, expected = ours(x), twin(x)
        assert got.shape == expected.shape
        if not expected.numel():
            return
        torch.testing.assert_close(got, expected)
        assert real_strides(got) == real_strides(expected)
        one, one_expected = ours(x[0]), twin(x[0])
        torch.testing.assert_close(one, one_expected)
        assert real_strides(one) == real_strides(one_expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    ours, twin = pair(CHAINS["two_blocks"][0]())
    x = grid(2, 1, 8, 13).to(dtype)
    true = copy.deepcopy(twin).double()(x.double()).detach()
    twin.to(dtype)  # the children are shared
    assert_close_as_torch(ours(x).detach(), [twin(x).detach()], true)


def test_autocast():
    ours, twin = pair(CHAINS["flatten"][0]())
    x = grid(3, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = ours(x), twin(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    assert_close_as_torch(got, [expected], copy.deepcopy(twin).double()(x.double()).detach())


def test_frozen_parameters():
    ours, twin = pair(CHAINS["two_blocks"][0]())
    ours[0].weight.requires_grad_(False)
    ours[3].bias.requires_grad_(False)
    assert_like_twin(ours, twin, grid(2, 1, 8, 13))
    for p in ours.parameters():
        p.requires_grad_(False)
    assert not ours(grid(2, 1, 8, 13)).requires_grad


def test_one_module_used_twice():
    conv, relu = on_grid(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU()
    children = [conv, relu, nn.MaxPool2d(2), conv, relu]
    assert_like_twin(cf.Sequential(*children), nn.Sequential(*children), grid(2, 4, 8, 9))


def test_double_backward():
    ours, twin = pair(CHAINS["tutorial"][0]())
    x = grid(1, 3, 6, 6)

    def second(module):
        inputs = x.to(module[0].weight.dtype).clone().requires_grad_()
        (g,) = torch.autograd.grad(module(inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), module[0].weight)[0]

    assert_close_as_torch(second(ours), second(twin), second(copy.deepcopy(twin).double()))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("weight_last", [None, 0, 1, 2])
@pytest.mark.parametrize("end", ["map", "flatten", "columns"])
def test_channels_last_between_blocks(memory, weight_last, end):
    """Whatever the blocks hand on to each other, the result has eager's strides."""
    children = [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1),
        nn.Tanh(), nn.Conv2d(6, 5, (2, 1)), nn.ReLU(),
    ]  # fmt: skip
    children += {"map": [], "flatten": [nn.Flatten()], "columns": [cf.ToSequence("columns")]}[end]
    ours, twin = pair(children)
    ours.eval(), twin.eval()
    if weight_last is not None:
        conv = [m for m in ours if isinstance(m, nn.Conv2d)][weight_last]
        conv.weight.data = MEMORY["channels_last"](conv.weight.data)
    x = MEMORY[memory](grid(2, 3, 12, 14))
    with torch.no_grad():
        got, expected = ours(x), twin(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert real_strides(got) == real_strides(expected)
        distributed = cf.TimeDistributed(ours, flatten=end != "columns")
        clips = distributed(x.unsqueeze(1))
        torch.testing.assert_close(clips.flatten(1), expected.flatten(1), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- Sequential: manners


def test_is_a_sequential_with_the_same_keys():
    named = OrderedDict(conv=nn.Conv2d(3, 8, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2))
    ours, twin = cf.Sequential(named), nn.Sequential(OrderedDict(named))
    assert isinstance(ours, nn.Sequential)
    assert list(ours.state_dict()) == list(twin.state_dict()) == ["conv.weight", "conv.bias"]
    assert ours.conv is named["conv"] and ours[1] is named["act"] and len(ours) == 3
    other = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2)))
    ours.load_state_dict(other.state_dict())
    nn.Sequential(OrderedDict(named)).load_state_dict(ours.state_dict())
    x = grid(2, 3, 8, 8)
    torch.testing.assert_close(ours(x), other(x))


def test_children_may_change_between_calls():
    x = grid(2, 3, 12, 12)
    ours, twin = cf.Sequential(), nn.Sequential()

    def check(*sizes):
        torch.testing.assert_close(ours(x), twin(x))
        assert step_sizes(ours) == list(sizes)

    check()
    for child in (nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)):
        assert ours.append(child) is ours
        twin.append(child)
    check(2)
    relu = nn.ReLU()
    ours.insert(1, relu), twin.insert(1, relu)
    check(3)
    more = [nn.Conv2d(8, 4, 2), nn.ReLU()]
    ours.extend(more), twin.extend(more)
    check(3, 2)
    ours[1] = twin[1] = nn.Softsign()
    check(1, 1, 1, 2)
    del ours[1], twin[1]
    check(2, 2)
    assert type(ours[:2]) is cf.Sequential
    torch.testing.assert_close(ours[:2](x), twin[:2](x))
    assert ours.pop(-1) is twin.pop(-1)
    check(2, 1)
    ours[0].stride = (2, 2)
    ours[1].ceil_mode = True
    check(2, 1)
    ours[0].padding_mode = "reflect"
    ours[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    check(2, 1)
    torch.testing.assert_close((ours + twin[:1][:0])(x), twin(x))


def noted(events, name):
    return lambda *_: events.append(name)


HOOKS = {
    "forward": lambda m, e: m.register_forward_hook(noted(e, "forward")),
    "forward_pre": lambda m, e: m.register_forward_pre_hook(noted(e, "forward_pre")),
    "full_backward": lambda m, e: m.register_full_backward_hook(noted(e, "full_backward")),
    "full_backward_pre": lambda m, e: m.register_full_backward_pre_hook(noted(e, "full_backward_pre")),
    "changes_output": lambda m, e: m.register_forward_hook(lambda m, i, o: e.append("changed") or 2 * o - 1),
    "changes_input": lambda m, e: m.register_forward_pre_hook(lambda m, i: e.append("changed") or i[0] + 1),
}


@pytest.mark.parametrize("at", [0, 1, 2], ids=["conv", "relu", "pool"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_called_and_count(hook, at):
    ours, twin = pair(CHAINS["tutorial"][0]())
    x = grid(2, 3, 8, 8)
    plain = ours(x)
    events = []
    handle = HOOKS[hook](ours[at], events)
    got = ours(x.requires_grad_())
    got.sum().backward()
    assert len(events) == 1
    torch.testing.assert_close(got, twin(x))
    assert (hook.startswith("changes") and not torch.equal(got, plain)) or torch.allclose(got, plain)
    handle.remove()
    assert step_sizes(ours) == [3]
    torch.testing.assert_close(ours(x), plain)


def test_hooks_on_nested_containers():
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    ours, events = cf.Sequential(inner, nn.MaxPool2d(2)), []
    inner.register_forward_hook(noted(events, "inner"))
    ours(grid(2, 3, 8, 8))
    assert events == ["inner"] and step_sizes(ours) == [1, 1]


def test_global_hooks_see_every_child():
    ours, _ = pair(CHAINS["tutorial"][0]())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        ours(grid(1, 3, 4, 4))
    finally:
        handle.remove()
    assert seen == ["Conv2d", "ReLU", "MaxPool2d", "Sequential"]


def test_a_forward_of_its_own_is_called():
    ours, _ = pair([nn.Conv2d(3, 8, 3), nn.ReLU()])
    ours[1].forward = lambda x: x * 0 + 7
    assert (ours(grid(1, 3, 4, 4)) == 7).all()


MENDED_WEIGHTS = {
    "spectral_norm": lambda conv: parametrizations.spectral_norm(conv),
    "weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "old_spectral_norm": lambda conv: nn.utils.spectral_norm(conv),
    "old_weight_norm": lambda conv: nn.utils.weight_norm(conv),
    "pruned": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", MENDED_WEIGHTS)
def test_parametrized_weights(kind):
    ours, twin = pair(CHAINS["tutorial"][0]())
    MENDED_WEIGHTS[kind](ours[0])
    ours.eval(), twin.eval()
    x = grid(2, 3, 8, 8)
    for _ in range(2):
        torch.testing.assert_close(ours(x), twin(x))
        with torch.no_grad():
            for p in ours.parameters():
                p.mul_(0.5)
    assert step_sizes(ours)[0] == 1


def test_functional_call_and_vmap():
    ours, twin = pair(CHAINS["two_blocks"][0]())
    other = {n: grid(*p.shape) for n, p in ours.named_parameters()}
    x = grid(2, 1, 8, 13)
    torch.testing.assert_close(
        torch.func.functional_call(ours, other, (x,)), torch.func.functional_call(twin, other, (x,))
    )
    samples = grid(3, 2, 1, 8, 13)
    torch.testing.assert_close(torch.func.vmap(ours)(samples), torch.func.vmap(twin)(samples))

    def loss(module):
        return lambda p, x: torch.func.functional_call(module, p, (x,)).square().mean()

    ours_grad = torch.func.grad(loss(ours))(other, x)
    twin_grad = torch.func.grad(loss(twin))(other, x)
    for name in other:
        torch.testing.assert_close(ours_grad[name], twin_grad[name], rtol=1e-4, atol=1e-4)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_copies(way, used):
    x = grid(2, 5, 3, 8, 8)
    module = cf.TimeDistributed(cf.Sequential(*CHAINS["tutorial"][0]()))
    if used:
        module(x).sum().backward()
        module.zero_grad()
    twin = COPIES[way](module)
    assert type(twin) is cf.TimeDistributed and type(twin.module) is cf.Sequential
    torch.testing.assert_close(twin(x), module(x))
    with torch.no_grad():
        twin.module[0].weight.zero_()
    assert not torch.equal(twin(x), module(x))


def test_wrong_inputs_raise():
    ours, _ = pair(CHAINS["tutorial"][0]())
    with pytest.raises(ValueError, match=r"4 channels but the weight .* expects 3"):
        ours(torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="TimeDistributed"):
        ours(torch.zeros(2, 5, 3, 8, 8))
    with pytest.raises((TypeError, RuntimeError)):
        ours([1, 2])


@needs_extension
@pytest.mark.parametrize("name", ["tutorial", "flatten", "atari", "signal"])
def test_one_op_per_block_and_no_copies(name, monkeypatch):
    monkeypatch.setattr(choose, "cheapest", lambda *_: choose.Choice("direct", "direct", "whatever the size"))
    children, shape, sizes = CHAINS[name]
    ours, _ = pair(children())
    x = grid(*shape)
    with torch.no_grad(), Ops() as ops:
        ours(x)
    blocks = sum(isinstance(s, match.Block) for s in match.steps(ours.children()))
    assert ops.names.count("cnnlstm_fast::conv_block") == blocks
    assert len(ops.names) == len(sizes)


# ---------------------------------------------------------------- norms and activations behind other modules

# (Without biases before norms of the batch: their gradients are nothing but rounding.)
BEHIND = {
    "norm behind an activation": (
        lambda: [
            nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 5, 3),
        ],
        (4, 3, 12, 12),
    ),
    "linear": (
        lambda: [nn.Linear(20, 33, bias=False), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 4)],
        (16, 20),
    ),
    "conv3d": (
        lambda: [
            nn.Conv3d(2, 6, 3, bias=False), nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.MaxPool3d(2),
        ],
        (2, 2, 6, 9, 9),
    ),
    "transposed": (
        lambda: [nn.ConvTranspose2d(3, 5, 3, 2, bias=False), nn.BatchNorm2d(5), nn.Tanh()],
        (3, 3, 6, 7),
    ),
    "first": (lambda: [nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3)], (3, 4, 9, 9)),
    "writes to its input": (
        lambda: [nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 6, 3)],
        (3, 4, 9, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BEHIND)
def test_epilogues_of_a_chain(monkeypatch, name, training):
    from cnnlstm_fast.nn import chain

    ran = []
    run_program = chain.run_program
    monkeypatch.setattr(chain, "_EPILOGUE_US", -math.inf)
    monkeypatch.setattr(chain, "run_program", lambda *args: ran.append(args) or run_program(*args))
    make, shape = BEHIND[name]
    plain = nn.Sequential(*make()).train(training)
    ours, x = cf.Sequential(*copy.deepcopy(list(plain))).train(training), torch.randn(shape)
    true = copy.deepcopy(plain).double()
    found = []
    for model, dtype in ((ours, torch.float32), (plain, torch.float32), (true, torch.float64)):
        torch.manual_seed(3)
        leaf = x.to(dtype).requires_grad_()
        given = leaf * 1
        out = model(given)
        grads = torch.autograd.grad((out * out.detach().sin()).sum(), [leaf, *model.parameters()])
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        found.append([out, given.detach(), *grads, *buffers])
        strides = out.stride()
    assert len(ran) == 1 and found[0][0].stride() == found[1][0].stride() == strides
    for mine, theirs, exact in zip(*found, strict=True):
        assert_close_as_torch(mine, theirs, exact)


def test_what_a_chain_leaves_to_the_modules(monkeypatch):
    """Errors, hooks and strides are those of the modules."""
    from cnnlstm_fast.nn import chain

    monkeypatch.setattr(chain, "_EPILOGUE_US", -math.inf)
    ours = cf.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match="expected 4D input"):
        ours(torch.randn(3, 4, 5))
    with pytest.raises((RuntimeError, ValueError)):
        ours(torch.randn(3, 5, 5, 5))
    x = torch.randn(3, 4, 6, 5).transpose(2, 3)
    plain = nn.Sequential(*copy.deepcopy(list(ours)))
    assert ours(x).stride() == plain(x).stride()
    seen = []
    ours[0].register_forward_hook(lambda *_: seen.append(1))
    ours(x.contiguous())
    assert seen
