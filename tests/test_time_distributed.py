"""cf.TimeDistributed against its module called step by step."""

import pytest
import torch
from chains import CHAINS, Tagged
from helpers import needs_extension
from torch import nn
from twins import Ops, assert_like_twin, grid, on_grid

import cnnlstm_fast as cf
from cnnlstm_fast.nn import time_distributed


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
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Softsign(), nn.AvgPool2d(2), nn.Dropout(), *more
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
    module = nn.Sequential(nn.Softsign(), nn.Conv1d(12, 12, 3))
    ours, x = cf.TimeDistributed(module, flatten=False), grid(3, 4, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), module(x.flatten(0, 1)).unflatten(0, (3, 4)))
