"""Maps that one block hands on to the next in the layout that the next one reads."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerated import ReluInside, assert_alike, assert_same_gradients, close, module_with, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twins import grid, real_strides

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import run
from cnnlstm_fast.planning.problem import lies_channels_last

pytestmark = pytest.mark.usefixtures("always_worth_it")


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


def test_a_map_of_one_place_lies_as_pytorchs():
    """It is contiguous in any layout; its strides say which one the next convolution writes."""
    plain, fast = pair(nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 3, padding=2), nn.ReLU(),
    ))  # fmt: skip
    for grad in (True, False):
        for _ in range(4):
            x = grid(2, 3, 8, 6)
            with torch.set_grad_enabled(grad):
                ours, theirs = fast(x), plain(x)
            assert ours.stride() == theirs.stride()
            close(ours, theirs)


def test_gradients_at_a_map_that_is_handed_on():
    """Asked for within the forward, and by a hook."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
            self.log, self.calls = [], 0

        def forward(self, x):
            self.calls += 1
            y = F.relu(self.conv(x))
            z = self.other(y)
            if self.calls > 3 and z.requires_grad:
                y.register_hook(lambda grad: self.log.append(grad.clone()))
                self.log += torch.autograd.grad(z.sum(), y, retain_graph=True)
            return F.relu(z)

    assert_alike(*pair(Inside()))
