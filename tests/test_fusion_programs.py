"""Sums and norms behind activations in a running program: an epilogue runs them behind the convolution."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerated import assert_same, results
from helpers import assert_close_as_torch
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import speculate

pytestmark = pytest.mark.usefixtures("always_worth_it")


@pytest.fixture
def programs(monkeypatch):
    """What ran as programs: the stages of each, and whether a tensor was added."""
    seen = []
    run_program = speculate.run_program

    def noted(z, program, added, moments):
        seen.append((tuple(program.stages), added is not None))
        return run_program(z, program, added, moments)

    monkeypatch.setattr(speculate, "run_program", noted)
    return seen


class Residual(nn.Module):
    """Two convolutions and a sum, whose way is ``how``."""

    def __init__(self, how: str, downsample: bool, channels: int = 6):
        super().__init__()
        self.how = how
        out, stride = (8, 2) if downsample else (channels, 1)
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if downsample
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        early = self.down(x) if "early" in self.how else None
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        other = self.down(x) if early is None else early
        if "second" in self.how:
            y = other + y
        elif "in place" in self.how:
            y += other
        elif "alpha" in self.how:
            y = torch.add(y, other, alpha=0.5)
        else:
            y = y + other
        return F.leaky_relu(y, 0.2) if "leaky" in self.how else F.relu(y)


HOWS = (
    "first",
    "second",
    "in place",
    "alpha",
    "early",
    "early in place",
    "leaky second",
    "early in place leaky",
)


def model_of(*blocks: nn.Module) -> nn.Module:
    model = nn.Sequential(*blocks)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("how", HOWS)
def test_residual_blocks(programs, how, downsample, training):
    model = model_of(Residual(how, downsample)).train(training)
    fast = cf.accelerate(copy.deepcopy(model))
    assert_same(fast, model, torch.randn(3, 6, 11, 14))
    assert any(added for _, added in programs)
    with torch.no_grad():
        programs.clear()
        for _ in range(3):
            x = torch.randn(3, 6, 11, 14)
            torch.testing.assert_close(fast(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)
    assert training or [added for _, added in programs] == [True, True]


@pytest.mark.parametrize("training", [True, False])
def test_numbers_of_a_residual_network(training):
    """Results and gradients by the numbers rule, over two blocks whose maps are handed on channels-last."""
    model = model_of(nn.Conv2d(1, 6, 3, padding=1), Residual("in place", False), Residual("second", True))
    model.train(training)
    x = torch.randn(3, 1, 12, 17)
    fast = cf.accelerate(copy.deepcopy(model))
    state = copy.deepcopy(fast.state_dict())
    for _ in range(3):
        fast.load_state_dict(state)
        found = results(fast, (x,), grad := torch.randn(3, 8, 6, 9))
    plain = [copy.deepcopy(model), copy.deepcopy(model).to(memory_format=torch.channels_last)]
    ways = [results(way, (x,), grad) for way in plain]
    true = results(copy.deepcopy(model).double(), (x.double(),), grad.double())
    for k in true:
        assert_close_as_torch(found[k], [way[k] for way in ways], true[k], k)
    assert found["out"].stride() == ways[0]["out"].stride()


def test_statistics_are_updated_when_the_norm_is_called():
    class Looks(Residual):
        def forward(self, x):
            y = self.bn2(self.conv2(self.conv1(x)))
            self.seen = self.bn2.running_mean.clone(), self.bn2.running_var.clone()
            y += x
            return F.relu(y)

    model = model_of(Looks("", False))
    fast = cf.accelerate(copy.deepcopy(model))
    for _ in range(4):
        x = torch.randn(4, 6, 7, 9)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast[0].seen, model[0].seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_values_around_a_sum_that_are_held(training):
    """A program that keeps the values before and behind a sum gets PyTorch's, and gradients through all."""

    class Keeps(Residual):
        def forward(self, x, keep=False):
            y = self.bn2(self.conv2(self.conv1(x)))
            z = y + x
            out = F.relu(z)
            return (out, y, z) if keep else out

    model = model_of(Keeps("", False)).train(training)[0]
    fast = cf.accelerate(copy.deepcopy(model))
    for call in range(5):
        found = []
        x = torch.randn(3, 6, 7, 9)
        for m in (model, fast):
            leaf = x.clone().requires_grad_()
            out = m(leaf, keep=call == 3)
            total = sum(t.square().sum() for t in out) if isinstance(out, tuple) else out.square().sum()
            total.backward()
            found.append([total.detach(), leaf.grad, *(p.grad for p in m.parameters() if p.grad is not None)])
            m.zero_grad()
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_the_other_operand_may_be_written_to_behind_the_sum():
    class Writes(Residual):
        def forward(self, x):
            x = x * 1.0
            y = F.relu(self.bn2(self.conv2(self.conv1(x.clone()))) + x)
            with torch.no_grad():
                x.neg_()
            return y + x

    model = model_of(Writes("", False))
    fast = cf.accelerate(copy.deepcopy(model))
    assert_same(fast, model, torch.randn(3, 6, 7, 9))


@pytest.mark.parametrize("wrong", ["broadcast", "dtype", "strides", "itself", "number"])
def test_sums_that_are_not_fused(programs, wrong):
    class Odd(Residual):
        def forward(self, x, odd=False):
            y = self.bn2(self.conv2(self.conv1(x)))
            other = {
                "broadcast": x[:, :1], "dtype": x.double(),
                "strides": x.transpose(2, 3).contiguous().transpose(2, 3),
                "itself": y, "number": 2.0,
            }[wrong] if odd else x  # fmt: skip
            return F.relu((y + other).float())

    model = model_of(Odd("", False)).eval()[0]
    fast = cf.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        for call in range(5):
            x = torch.randn(2, 6, 8, 9)
            torch.testing.assert_close(fast(x, odd=call == 2), model(x, odd=call == 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.01), nn.Tanh(), nn.ReLU(inplace=True), nn.SiLU()])
@pytest.mark.parametrize("training", [True, False])
def test_norms_behind_activations(programs, activation, training):
    """As networks of order books have them."""
    model = model_of(
        nn.Conv2d(1, 8, (1, 2), (1, 2)), activation, nn.BatchNorm2d(8), nn.Conv2d(8, 8, (4, 1)),
        copy.deepcopy(activation), nn.BatchNorm2d(8), nn.ReLU(),
    ).train(training)  # fmt: skip
    fast = cf.accelerate(copy.deepcopy(model))
    # Gradients through two norms are differences of larger terms.
    assert_same(fast, model, torch.randn(3, 1, 14, 12), rtol=1e-3, atol=1e-3)
    assert programs and not any(added for _, added in programs)


def test_what_a_residual_block_keeps_for_its_backward():
    """Of a sum and its ReLU a bit for each element: no map but the convolution's and the result is kept."""
    model = model_of(Residual("in place", False, 32))
    fast = cf.accelerate(copy.deepcopy(model))
    x = torch.randn(4, 32, 16, 16)
    for _ in range(3):
        out = fast(x)
    found: dict[int, int] = {}

    def walk(node, seen):
        if node is None or node in seen:
            return
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved") and isinstance(t := getattr(node, name), Tensor):
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        for t in getattr(node, "saved_tensors", None) or ():
            if t is not None:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        for following, _ in node.next_functions:
            walk(following, seen)

    walk(out.grad_fn, set())
    size = x.numel() * 4
    weights = sum(p.numel() for p in fast.parameters()) * 4
    # x, the first convolution's map, its block's result, the second convolution's map; codes and bits.
    assert sum(found.values()) < 4.5 * size + 2 * weights


def test_explanation_of_a_program():
    model = model_of(Residual("in place", False, 16)).eval()
    fast = cf.accelerate(model)
    with torch.no_grad():
        for _ in range(3):
            fast(torch.randn(8, 16, 32, 32))
    rows = {site.name: site for site in fast.report().sites}
    assert rows["0.conv2"].block == "Conv2d+BatchNorm+sum+ReLU" and rows["0.conv2"].plan.endswith("+epilogue")
    assert "in one pass behind the convolution" in rows["0.conv2"].reason
    with torch.no_grad():
        stages = cf.explain(fast, torch.randn(8, 16, 32, 32)).stages
    assert [stage.plan for stage in stages if stage.op == "sum+ReLU"] == ["epilogue"]


#: What may follow a sum.
BEHIND = {
    "nothing": lambda y: y,
    "relu": F.relu,
    "relu in place": F.relu_,
    "leaky": lambda y: F.leaky_relu(y, 0.3),
    "nothing else": lambda y: F.dropout(y, 0.5, False),
}


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("how", ["in place", "first", "second"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_gradient_that_only_the_other_operand_needs(programs, normed, how, behind, image):
    """The result needs one, too. Images are carried."""

    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.Conv2d if image else nn.Conv1d
            self.entry, self.main, self.short = (conv(c, 6, 3, padding=1) for c in (2, 6, 6))
            norm = nn.BatchNorm2d if image else nn.BatchNorm1d
            self.norm = norm(6).requires_grad_(False) if normed else nn.Identity()

        def forward(self, x):
            x = self.entry(x)
            y, short = self.norm(self.main(x)), self.short(x)
            if how == "in place":
                y += short
            else:
                y = y + short if how == "first" else short + y
            return BEHIND[behind](y)

    model = Shortcut()
    for conv in (model.entry, model.main):
        conv.requires_grad_(False)
    fast = cf.accelerate(copy.deepcopy(model))
    for _ in range(4):
        x = torch.randn(3, 2, *((9, 8) if image else (9,)))
        found, grad = [], torch.randn_like(model(x))
        for m in (fast, model):
            out = m(x)
            found.append([out.detach(), *torch.autograd.grad(out, [*m.short.parameters()], grad)])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert any(added for _, added in programs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("behind", [True, False])
def test_sums_of_channels_last_maps_lie_as_pytorchs(programs, behind, other, batch):
    """As the first operand, where one lies otherwise; then no epilogue runs them."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x):
            y, z = self.left(x).contiguous(memory_format=other), F.relu(self.right(x))
            y = y + z if behind else z + y
            return y, torch.empty_like(y)

    model = Sum()
    fast = cf.accelerate(copy.deepcopy(model))
    for last in (False, True, True):
        x = torch.randn(batch, 3, 7, 8)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        programs.clear()
        (got, like), (expected, _) = fast(x), model(x)
        torch.testing.assert_close(got, expected)
        assert like.stride() == got.stride() == expected.stride()
    assert [added for _, added in programs] == [True] * (other is torch.channels_last)


def test_the_gradient_of_a_sum_lies_as_its_operand():
    """PyTorch's gradient of ``instance_norm`` is wrong where it gets a channels-last one."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(2, 4, 5), nn.Conv2d(2, 4, 5)
            self.inside, self.norm = nn.InstanceNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.inside(self.left(x)) + self.norm(self.right(x)))

    model = Sum()
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()
    for last in (False, False, True, True):
        x = torch.randn(1, 2, 11, 8)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        out = [m(x.to(next(m.parameters()).dtype)) for m in (fast, twin)]
        grad = torch.randn_like(out[1])
        found = [
            torch.autograd.grad(y, [m.left.weight, m.right.weight], grad.to(y.dtype))
            for y, m in zip(out, (fast, twin), strict=True)
        ]
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_penalty_on_gradients_through_a_sum(batch):
    """A gradient of one image that PyTorch's norm reads has the strides that PyTorch would give it."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 2, 5)
            self.left, self.right = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.first(x)
            return F.relu(self.norm(self.left(y)) + self.norm(self.right(y)))

    def gradients(model, x, grad):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x), x, grad.to(x.dtype), create_graph=True)
        return slope, *torch.autograd.grad(slope.square().sum(), [*model.parameters()], allow_unused=True)

    model = Sum()
    fast, twin = cf.accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()
    x = torch.randn(batch, 3, 6, 11)
    grad = torch.randn_like(model(x))
    expected = gradients(twin, x.double(), grad)
    for _ in range(4):
        found = gradients(fast, x.clone(), grad)
        for name, got, true in zip(("x", *dict(model.named_parameters())), found, expected, strict=True):
            if true is not None and true.norm() > 1e-9:
                assert (got - true).norm() < 1e-3 * true.norm(), name
