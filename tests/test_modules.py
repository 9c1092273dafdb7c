"""Sequential and TimeDistributed against what they replace."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from helpers import LAYOUTS, assert_close_as_torch, in_layout, needs_extension
from torch import nn
from torch.nn.utils import parametrizations, prune
from twins import Ops, assert_compiles, assert_like_twin, grid, on_grid, real_strides

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import match
from cnnlstm_fast.nn import time_distributed
from cnnlstm_fast.planning import choose


class Tagged(nn.Conv2d):
    """A subclass whose forward does something else."""

    def forward(self, x):
        return super().forward(x) + 1


# name: (children, input shape, what the chain becomes: how many modules each step holds)
CHAINS = {
    "tutorial": (lambda: [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], (3, 3, 14, 15), [3]),
    "inplace": (lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)], (2, 3, 9, 8), [2]),
    "conv": (
        lambda: [nn.Conv2d(2, 5, (3, 2), stride=(2, 1), dilation=(1, 3), bias=False)], (2, 2, 9, 8), [1],
    ),
    "conv_pool": (lambda: [nn.Conv2d(2, 18, 3, groups=2), nn.MaxPool2d(3, 2, 1)], (2, 2, 9, 11), [2]),
    "flatten": (
        lambda: [nn.Conv2d(1, 9, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(9 * 3 * 3, 4)],
        (3, 1, 8, 8),
        [4, 1],
    ),
    "two_blocks": (
        lambda: [
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
        ],
        (2, 1, 8, 13),
        [3, 3],
    ),
    "atari": (
        lambda: [
            nn.Conv2d(4, 16, 8, stride=4), nn.ReLU(), nn.Conv2d(16, 24, 4, stride=2), nn.ReLU(), nn.Flatten(),
        ],
        (2, 4, 28, 28),
        [2, 3],
    ),
    "signal": (
        lambda: [
            nn.Conv1d(6, 33, 5, padding=2), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(33, 8, 3), nn.Flatten(1, 2),
        ],
        (3, 6, 21),
        [3, 2],
    ),
    "norm_between": (
        lambda: [
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Dropout2d(),
        ],
        (2, 3, 7, 9),
        [3, 2, 1],
    ),
    "dropouts": (
        lambda: [
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(), nn.ELU(), nn.Dropout(), nn.AvgPool2d(2),
            nn.Dropout(),
        ],
        (2, 3, 9, 9),
        [2, 1, 1, 1, 1, 1],
    ),
    "average_pool": (
        lambda: [
            nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.AvgPool2d((2, 3), (2, 1), (1, 1), ceil_mode=True),
            nn.Conv2d(8, 6, 3, padding=1), nn.Hardtanh(0, 20), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(),
        ],
        (2, 3, 9, 8),
        [3, 4],
    ),
    "adaptive_max_pool": (
        lambda: [nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Tanh(), nn.AdaptiveMaxPool1d(4)], (2, 3, 19), [4],
    ),
    "unflatten": (
        lambda: [nn.Conv2d(3, 4, 3), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Unflatten(0, (2, 3))],
        (6, 3, 8, 8),
        [4, 1],
    ),
    "to_sequence": (
        lambda: [
            nn.Conv2d(3, 18, 3), nn.GELU(), nn.Conv2d(18, 5, 2), nn.Sigmoid(), nn.MaxPool2d((2, 1)),
            cf.ToSequence("columns_time_major"),
        ],
        (2, 3, 9, 8),
        [2, 4],
    ),
    "nested": (
        lambda: [
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU())), nn.MaxPool2d(2),
            cf.Sequential(nn.Conv2d(8, 8, 1)),
        ],
        (2, 3, 9, 9),
        [3, 1],
    ),
    "activation_after_pool": (
        lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU()], (2, 3, 9, 9), [3],
    ),
    "curved_activation_after_pool": (
        lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.SiLU()], (2, 3, 9, 9), [2, 1],
    ),
    "activation_after_average": (
        lambda: [nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.ReLU()], (2, 3, 9, 9), [2, 1],
    ),
    "norm_after_activation": (
        lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)], (2, 3, 9, 9), [2, 1],
    ),
    "two_activations": (lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ReLU()], (2, 3, 9, 9), [2, 1]),
    "other_rank": (lambda: [nn.Conv1d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)], (2, 3, 9), [2, 1]),
    "padding_same": (lambda: [nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU()], (2, 3, 9, 9), [2]),
    "padding_mode": (
        lambda: [nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU()], (2, 3, 9, 9), [2],
    ),
    "subclass": (lambda: [Tagged(3, 8, 3), nn.ReLU()], (2, 3, 9, 9), [1, 1]),
    "other_activation": (lambda: [nn.Conv2d(3, 8, 3), nn.Softplus()], (2, 3, 9, 9), [1, 1]),
    "other_flatten": (lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2)], (2, 3, 9, 9), [2, 1]),
    "no_block": (lambda: [nn.Flatten(), nn.Linear(27, 3)], (2, 3, 3, 3), [1, 1]),
    "nothing": (lambda: [], (2, 3), []),
}  # fmt: skip
chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def pair(children) -> tuple[cf.Sequential, nn.Sequential]:
    """Our container and the plain one, over the same children."""
    children = [on_grid(child) for child in children]
    return cf.Sequential(*children), nn.Sequential(*children)


def step_sizes(module: nn.Module) -> list[int]:
    steps = match.steps(module.children())
    return [sum(m is not None for m in s) if isinstance(s, match.Block) else 1 for s in steps]


# ---------------------------------------------------------------- the matcher


def test_spans():
    conv, signal, act = match.Part("conv", 4), match.Part("conv", 3), match.Part("activation")
    pool, flatten, norm = match.Part("pool", 4), match.Part("flatten"), match.Part("norm", 4)
    relu, max_pool, drop = match.Part("monotone"), match.Part("max_pool", 4), match.Part("identity")
    assert match.spans([]) == []
    assert match.spans([act, pool, "other"]) == []
    assert match.spans([conv]) == [(0, 1)]
    assert match.spans(["other", conv, act, pool, flatten, act]) == [(1, 5)]
    assert match.spans([conv, pool, act, conv, act, "other", conv]) == [(0, 2), (3, 5), (6, 7)]
    assert match.spans([signal, act, pool]) == [(0, 2)]
    assert match.spans([conv, flatten, pool]) == [(0, 2)]
    assert match.spans([conv, norm, relu, max_pool, flatten, drop]) == [(0, 5)]
    assert match.spans([conv, drop, norm, drop, act, drop, pool, drop]) == [(0, 8)]
    assert match.spans([conv, max_pool, relu, flatten]) == [(0, 4)]
    assert match.spans([conv, relu, max_pool, relu]) == [(0, 3)]
    for chain in ([conv, max_pool, act], [conv, pool, relu], [conv, act, norm], [conv, norm, norm]):
        assert match.spans(chain) == [(0, 2)]


@chains
def test_what_is_fused(chain):
    children, _, expected = chain
    assert step_sizes(cf.Sequential(*children())) == expected


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
        inputs = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), module[0].weight)[0]

    torch.testing.assert_close(second(ours), second(twin))


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
    ours[1] = twin[1] = nn.Softplus()
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


# ---------------------------------------------------------------- TimeDistributed


def step_by_step(module, x, batch_first, flatten):
    """What TimeDistributed means: the module on one time step after the other."""
    time = 1 if batch_first else 0
    steps = [module(x.select(time, t)) for t in range(x.shape[time])]
    return torch.stack([s.flatten(1) if flatten and s.dim() > 2 else s for s in steps], time)


DISTRIBUTED = {
    "sequential": (lambda: nn.Sequential(*CHAINS["tutorial"][0]()), (3, 9, 8)),
    "fused_sequential": (lambda: cf.Sequential(*CHAINS["tutorial"][0]()), (3, 9, 8)),
    "two_blocks": (lambda: nn.Sequential(*CHAINS["two_blocks"][0]()), (1, 8, 13)),
    "flatten_inside": (lambda: nn.Sequential(*CHAINS["flatten"][0]()), (1, 8, 8)),
    "signal": (lambda: nn.Sequential(nn.Conv1d(6, 9, 3), nn.ReLU(), nn.MaxPool1d(2)), (6, 11)),
    "conv": (lambda: nn.Conv2d(3, 8, 3), (3, 5, 6)),
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "activation": (lambda: nn.Tanh(), (3, 4)),
    "own_forward": (lambda: Tagged(3, 8, 3), (3, 5, 6)),
    "norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ELU(), nn.AvgPool2d(2)).eval(),
        (3, 7, 7),
    ),
}
distributed = pytest.mark.parametrize("case", DISTRIBUTED.values(), ids=DISTRIBUTED)


@distributed
@pytest.mark.parametrize("flatten", [True, False], ids=["flat", "maps"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "time_first"])
def test_time_distributed_is_step_by_step(case, flatten, batch_first):
    make, shape = case
    module = on_grid(make())
    ours = cf.TimeDistributed(module, batch_first=batch_first, flatten=flatten)
    x = grid(3, 4, *shape)
    plain = nn.Sequential(*module) if isinstance(module, nn.Sequential) else module

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = plain

        def forward(self, x):
            return step_by_step(self.module, x, batch_first, flatten)

    assert_like_twin(ours, Loop(), x)
    got = ours(x)
    assert got.shape[:2] == (3, 4)
    if flatten:
        assert got.is_contiguous() and got.dim() == 3


@pytest.mark.parametrize("batch_first", [True, False])
def test_time_distributed_reads_any_strides(batch_first):
    ours = cf.TimeDistributed(on_grid(nn.Sequential(*CHAINS["tutorial"][0]())), batch_first)
    x = grid(4, 3, 3, 8, 9)
    expected = ours(x)
    torch.testing.assert_close(ours(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    torch.testing.assert_close(ours(x.movedim(2, -1).contiguous().movedim(-1, 2)), expected)
    torch.testing.assert_close(ours(x.expand(4, 3, 3, 8, 9)), expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (1, 1)])
def test_time_distributed_empty(shape):
    ours = cf.TimeDistributed(nn.Sequential(*CHAINS["tutorial"][0]()))
    assert ours(torch.zeros(*shape, 3, 8, 8)).shape == (*shape, 64 * 4 * 4)


def test_time_distributed_keys_and_repr():
    ours = cf.TimeDistributed(nn.Sequential(nn.Conv2d(3, 8, 3)), batch_first=False)
    assert list(ours.state_dict()) == ["module.0.weight", "module.0.bias"]
    assert "batch_first=False, flatten=True" in repr(ours)


def test_time_distributed_errors():
    ours = cf.TimeDistributed(nn.Sequential(*CHAINS["tutorial"][0]()))
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\).*expected \(B, T, C, H, W\).*unsqueeze\(1\)"):
        ours(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected \(T, B, C, H, W\).*unsqueeze\(0\)"):
        cf.TimeDistributed(ours.module, batch_first=False)(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected \(B, T, C, L\)"):
        cf.TimeDistributed(nn.Conv1d(3, 4, 3))(torch.zeros(4, 2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(7,\).*expected \(B, T, \*step\)"):
        cf.TimeDistributed(nn.Linear(7, 7))(torch.zeros(7))
    with pytest.raises(TypeError, match="got a list"):
        ours([1])
    with pytest.raises(TypeError, match=r"nn\.Module"):
        cf.TimeDistributed(torch.relu)
    with pytest.raises(TypeError, match="LSTM returned a tuple"):
        cf.TimeDistributed(nn.LSTM(3, 4))(torch.zeros(2, 5, 6, 3))
    with pytest.raises(ValueError, match=r"returned shape \(1, 10, 3\) for 2 x 5 steps, expected 10 results"):
        cf.TimeDistributed(nn.Unflatten(0, (1, 10)), flatten=False)(torch.zeros(2, 5, 3))


@needs_extension
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("container", [nn.Sequential, cf.Sequential])
def test_time_distributed_writes_straight_into_the_result(batch_first, container):
    ours = cf.TimeDistributed(container(*CHAINS["tutorial"][0]()), batch_first)
    x = grid(2, 5, 3, 8, 8)
    with torch.no_grad(), Ops() as ops:
        out = ours(x)
    assert ops.names == ["cnnlstm_fast::conv_block"]
    assert out.is_contiguous() and out.shape == (2, 5, 64 * 4 * 4)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2)  # channels last
    with torch.no_grad(), Ops() as ops:
        ours(x)
    assert ops.names == ["cnnlstm_fast::conv_block"]


class Counting(nn.Identity):
    """Counts its calls; unknown to the package."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x


def generic(*more):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softplus(), nn.AvgPool2d(2), nn.Dropout(), *more
    )


def calls_of(module, x, layer):
    """How often ``layer`` runs in one call, seen from outside."""
    count = 0
    inner = layer.__class__.forward

    def forward(self, *args):
        nonlocal count
        count += self is layer
        return inner(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.__class__, "forward", forward)
        out = module(x)
    return count, out


def test_many_frames_go_in_chunks(monkeypatch):
    module = on_grid(generic(nn.Flatten(), nn.Linear(8 * 4 * 4, 5))).eval()
    ours, x = cf.TimeDistributed(module), grid(5, 7, 3, 8, 8)
    with torch.no_grad():
        whole, expected = calls_of(ours, x, module[2])
        # 8 channels of 8 x 8 float32 a frame: 2 KiB
        monkeypatch.setattr(time_distributed, "CHUNK_BYTES", 12 * 2048)
        chunks, got = calls_of(ours, x, module[2])
        torch.testing.assert_close(got, expected)
        maps = cf.TimeDistributed(module[:4], flatten=False)
        torch.testing.assert_close(maps(x), step_by_step(module[:4], x, True, False))
    assert (whole, chunks) == (1, 3)
    assert calls_of(ours, x, module[2])[0] == 1, "with gradients: all at once"


UNCHUNKED = {
    "norm_in_training": lambda m: m[1].train(),
    "dropout_in_training": lambda m: m[4].train(),
    "hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "unknown_layer": lambda m: m.append(Counting()),
    "no_running_statistics": lambda m: setattr(m[1], "running_mean", None),
    "hook_on_the_container": lambda m: m.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("why", UNCHUNKED)
def test_what_must_not_be_chunked(why, monkeypatch):
    monkeypatch.setattr(time_distributed, "CHUNK_BYTES", 1)
    module = generic().eval()
    UNCHUNKED[why](module)
    if why == "no_running_statistics":
        module[1].running_var = None
    ours = cf.TimeDistributed(module)
    with torch.no_grad():
        assert calls_of(ours, grid(5, 7, 3, 8, 8), module[2])[0] == 1


def test_unbatched_layers_are_not_chunked(monkeypatch):
    """A Conv1d behind a layer that left (N, F) takes the batch for channels."""
    monkeypatch.setattr(time_distributed, "CHUNK_BYTES", 1)
    module = nn.Sequential(nn.Softplus(), nn.Conv1d(12, 12, 3))
    ours, x = cf.TimeDistributed(module, flatten=False), grid(3, 4, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), module(x.flatten(0, 1)).unflatten(0, (3, 4)))


# ---------------------------------------------------------------- tracing and compiling


def compiled_cases():
    yield "norm", cf.Sequential(*CHAINS["norm_between"][0]()), (2, 3, 7, 9)
    yield "flatten", cf.Sequential(*CHAINS["flatten"][0]()), (3, 1, 8, 8)
    yield "signal", cf.Sequential(*CHAINS["signal"][0]()), (3, 6, 21)
    yield "distributed", cf.TimeDistributed(nn.Sequential(*CHAINS["tutorial"][0]())), (2, 4, 3, 8, 8)
    yield "maps", cf.TimeDistributed(nn.Sequential(*CHAINS["tutorial"][0]()), False, False), (2, 4, 3, 8, 8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", compiled_cases(), ids=lambda case: case[0])
def test_compile_without_graph_breaks(case, backend):
    _, module, shape = case
    module = on_grid(copy.deepcopy(module)).eval()
    assert_compiles(module, module, grid(*shape), backend)


def test_compile_with_inductor():
    children = [*CHAINS["two_blocks"][0](), nn.Flatten(), nn.Linear(24 * 2 * 7, 3)]
    module = on_grid(cf.TimeDistributed(nn.Sequential(*children)))
    assert_compiles(module, module, grid(2, 3, 1, 8, 13), "inductor")


def test_compile_any_length_at_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    module = cf.TimeDistributed(on_grid(nn.Sequential(*CHAINS["tutorial"][0]())))
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for t in (9, 8, 13, 20):  # PyTorch's own convolution compiles batches below 16 apart
        x = grid(2, t, 3, 8, 8)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


def test_export():
    module = cf.TimeDistributed(on_grid(nn.Sequential(*CHAINS["flatten"][0]())))
    x = grid(2, 5, 1, 8, 8)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: length},))
    x = grid(2, 9, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_script_trace_and_fx():
    ours, twin = pair(CHAINS["flatten"][0]())
    x = grid(3, 1, 8, 8)
    torch.testing.assert_close(torch.jit.script(ours)(x), twin(x))
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), twin(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), twin(x))


# ---------------------------------------------------------------- ToSequence

SEQUENCES = [layout for layout in LAYOUTS if not layout.startswith("channels_")]


@pytest.mark.parametrize("layout", [*SEQUENCES, "frames", "frames_time_major"])
@pytest.mark.parametrize("container", [nn.Sequential, cf.Sequential])
def test_to_sequence(layout, container):
    steps = 3 if layout.startswith("frames") else None
    block = [on_grid(nn.Conv2d(3, 17, 3, padding=1)), nn.ReLU(), nn.MaxPool2d(2)]
    x = grid(6, 3, 8, 10)
    y = nn.Sequential(*block)(x)
    if steps is None:
        expected = in_layout(y, layout)
    elif layout == "frames":
        expected = torch.stack([torch.stack([y[b * 3 + t].flatten() for t in range(3)]) for b in range(2)])
    else:
        expected = torch.stack([torch.stack([y[t * 2 + b].flatten() for b in range(2)]) for t in range(3)])
    got = container(*block, cf.ToSequence(layout, steps))(x)
    assert got.shape == expected.shape and got.is_contiguous()
    torch.testing.assert_close(got, expected)


@needs_extension
def test_to_sequence_is_written_by_the_block_before():
    ours = cf.Sequential(*CHAINS["tutorial"][0](), nn.Dropout(), cf.ToSequence("columns_time_major")).eval()
    x = grid(2, 3, 8, 10)
    with torch.no_grad(), Ops() as ops:
        ours(x)
    assert ops.names == ["cnnlstm_fast::conv_block"]


def test_to_sequence_of_signals():
    x = grid(2, 3, 16)
    for container in (nn.Sequential, cf.Sequential):
        ours = container(on_grid(nn.Conv1d(3, 8, 3)), nn.ReLU(), cf.ToSequence("locations"))
        torch.testing.assert_close(ours(x), nn.Sequential(*ours[:2])(x).transpose(1, 2))


def test_to_sequence_errors():
    with pytest.raises(ValueError, match="unknown layout 'channels_last', expected frames or one of"):
        cf.ToSequence("channels_last")
    with pytest.raises(ValueError, match="steps=None: frames need it"):
        cf.ToSequence("frames")
    with pytest.raises(ValueError, match="nothing else does"):
        cf.ToSequence("rows", steps=3)
    with pytest.raises(ValueError, match=r"got shape \(2, 3\), expected a map"):
        cf.ToSequence("rows")(torch.zeros(2, 3))
