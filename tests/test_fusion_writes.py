"""Operands and statistics that change between a convolution and the end of its block."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerated import Block, assert_alike, close, images, module_with, pair, settle
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import grid

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import carry
from cnnlstm_fast.fusion.context import Contents

pytestmark = pytest.mark.usefixtures("always_worth_it")


#: What changes an operand or a statistic after the convolution, each by another way in.
CHANGES = {
    "input in place": lambda m: m.x.detach().mul_(0),
    "input data": lambda m: m.x.data.mul_(0),
    "input numpy": lambda m: m.x.detach().numpy().fill(0),
    "weight in place": lambda m: torch.no_grad()(m.conv.weight.mul_)(1.5),
    "weight data": lambda m: m.conv.weight.data.mul_(1.5),
    "weight numpy": lambda m: np.multiply(
        m.conv.weight.detach().numpy(), 1.5, out=m.conv.weight.detach().numpy()
    ),
    "bias inference": lambda m: torch.inference_mode()(m.conv.bias.data.add_)(0.5),
    "norm weight": lambda m: torch.no_grad()(m.bn.weight.mul_)(1.25),
    "norm bias data": lambda m: m.bn.bias.data.sub_(0.5),
    "running mean": lambda m: m.bn.running_mean.add_(0.5),
    "running var numpy": lambda m: m.bn.running_var.numpy().__imul__(2),
    "reads statistics": lambda m: m.log.append(m.bn.running_mean.clone()),
}


def test_contents_of_any_tensors():
    """Copies of tensors of all dtypes and strides, and what became of them."""
    tensors = [
        torch.randn(5), torch.randn(3).bfloat16(), torch.randn(0), torch.randn(4, 6).t(), torch.randn(()),
        torch.full((7,), float("nan")), torch.randn(9)[::2], torch.randint(0, 9, (3,), dtype=torch.uint8),
    ]  # fmt: skip
    for at, changed in enumerate(tensors):
        before = [t.clone() for t in tensors]
        contents = Contents(tensors)
        assert contents.same(tensors) and contents.same(tensors[:2]) and contents.same([])
        assert all(contents.then(t) is None for t in [*tensors, torch.randn(2)])
        if changed.numel():
            changed.detach().view(-1)[-1:].add_(1) if changed.is_contiguous() else changed.add_(1)
            if changed.isnan().any():
                changed.zero_()
            assert not contents.same(tensors) and contents.same(tensors[:at])
            then = contents.then(changed)
            assert then.stride() == torch.empty_like(changed).stride()
            torch.testing.assert_close(then, before[at], rtol=0, atol=0, equal_nan=True)


def test_wrong_calls_of_the_ops_of_contents():
    copy, same = (
        getattr(torch.ops.cnnlstm_fast, name).default for name in ("copy_contents", "same_contents")
    )
    held = copy([torch.randn(3), torch.randn(2)])
    assert held.numel() == 32
    for call in (
        lambda: copy([]), lambda: copy([torch.randn(3), torch.randn(2, device="meta")]),
        lambda: copy([torch.eye(3).to_sparse()]), lambda: same(held, [torch.randn(9)]),
        lambda: same(held[::2], [torch.randn(3)]), lambda: same(held, [torch.randn(2)] * 3),
        lambda: same(held.to("meta"), [torch.randn(2)]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call()
    assert same(held, [])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("when", ["always", "fourth call"])
@pytest.mark.parametrize("at", ["conv", "norm", "activation"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_between(change, at, when, mode):
    """A block has read its operands where eager reads them."""

    def between(self, name, value):
        if name == at:
            CHANGES[change](self)

    plain, fast = pair(Block(between, (lambda call: True) if when == "always" else lambda call: call == 4))
    # Where eager's own backward refuses what has changed, or would compute with it.
    refused = ("input", "weight") if at == "conv" else ("input", "weight", "norm", "running")
    grad = not change.startswith(refused)
    assert_alike(plain.train(mode == "train"), fast.train(mode == "train"), grad=grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("look", ["conv", "norm", "late"])
@pytest.mark.parametrize("change", [name for name in CHANGES if "numpy" not in name])
def test_what_changes_before_an_unexpected_look(change, look, mode):
    """What a block does not hand out is computed, if anybody holds it, before an operand changes."""

    def between(self, name, value):
        if name == look:
            CHANGES[change](self)
            self.log += [v.detach().clone() for v in (value if look == "late" else (value,))]

    plain, fast = pair(Block(between))
    grad = not change.startswith(
        ("input", "weight", "norm", "running")
    )  # eager's own backward refuses others
    assert_alike(plain.train(mode == "train"), fast.train(mode == "train"), grad=grad)


def test_values_that_linger_are_watched_once():
    """Watching for writes ends where a program keeps values in variables that it does not read."""

    class Lingering(Block):
        def forward(self, x):
            y = self.conv(x)
            z = F.relu(self.bn(y))
            for _ in range(12):
                z = z + 1
            self.log.append(torch._C._len_torch_dispatch_stack())
            return z

    fast = pair(Lingering().eval())[1]
    with torch.no_grad():
        for _ in range(4):
            fast(grid(2, 3, 8, 6))
    assert fast.log == [0, 1, 0, 0]
    assert torch._C._len_torch_dispatch_stack() == 0


def test_a_mode_entered_in_between():
    """Modes of the program's that are entered behind a convolution leave the stack as they came."""
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Entered(Block):
        def forward(self, x):
            y = self.conv(x)
            with Seeing():
                z = F.relu(self.bn(y))
                del y
                z = z.neg()
            return z.neg()

    plain, fast = pair(Entered().eval())
    assert_alike(plain, fast, grad=False)
    assert seen.count(torch.ops.aten.neg.default) == 12 and torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("steps", ["inside", "across", "read inside"])
def test_inference_mode_in_between(steps, outer):
    """It puts back PyTorch's note of whether there are modes, as it found it; ours may have come or gone."""

    class Inside(Block):
        def forward(self, x):
            if steps == "across":
                with torch.inference_mode():
                    y = self.conv(x)
                y = F.relu(self.bn(y) if outer else y.clone())
            else:
                y = self.conv(x)
                with torch.inference_mode():
                    y = self.bn(y) if steps == "inside" else y * (2 if self.calls == 3 else 1)
                    y = F.relu(y)
                    y = y.neg()
            self.calls += 1
            self.log.append(y.clone().sum().isfinite())
            return torch.ones(3) * y.mean()

    plain, fast = pair(Inside().eval())
    for _ in range(5):
        x = grid(2, 3, 8, 6)
        with torch.inference_mode(outer):
            close(fast(x), plain(x))
        assert torch._C._len_torch_dispatch_stack() == 0
        assert not torch._C._dispatch_tls_is_dispatch_key_included("Python")
        torch.ones(2).add_(1)


def test_a_weight_put_back():
    class Scaled(Block):
        def forward(self, x):
            before = self.conv.weight.detach().clone()
            with torch.no_grad():
                self.conv.weight.mul_(3.0)
            y = self.conv(x)
            with torch.no_grad():
                self.conv.weight.copy_(before)
            return F.max_pool2d(F.relu(y), 2)

    plain, fast = pair(Scaled().eval())
    assert_alike(plain, fast, grad=False)


def test_norms_in_another_order_than_their_activations():
    class Crossed(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv2d(3, 6, 3, padding=1)

        def forward(self, x):
            y, z = self.conv(x), self.other(x)
            z = self.bn(z)
            self.log.append(self.bn.running_mean.clone())
            y = self.bn(y)
            return F.max_pool2d(F.relu(y), 2) + F.max_pool2d(F.relu(z), 2)

    assert_alike(*pair(Crossed()))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("steps", ["norm", "norm and pool", "gelu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_biases_may_change_before_the_backward(steps, mode, again):
    """PyTorch's operators do not save them; second derivatives read what they were."""
    chain = {
        "norm": [nn.BatchNorm2d(6)],
        "norm and pool": [nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)],
        "gelu": [nn.GELU()],
    }[steps]
    plain, fast = pair(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *chain).train(mode == "train"))
    for _ in range(3):
        x, found = grid(2, 3, 8, 6), []
        for model in (plain, fast):
            given = x.clone().requires_grad_()
            out = model(given)
            with torch.no_grad():
                model[0].bias.add_(0.125)
            loss = (out * torch.arange(out.numel()).view(out.shape).cos()).sum()
            grads = torch.autograd.grad(loss, [given, model[0].weight], create_graph=again)
            if again:
                total = sum(g.square().sum() for g in grads)
                grads += torch.autograd.grad(total, [model[0].weight])
            found.append(grads)
        for ours, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_convolution_that_is_used_in_two_ways():
    """Its weight changes before the second use is looked at."""

    class Twice(Block):
        def forward(self, x):
            z = F.relu(self.conv(x))
            y = self.conv(x)
            self.conv.weight.data.neg_()
            return z + y

    plain, fast = pair(Twice())
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(4):
            x = grid(2, 3, 8, 6)
            with mode():
                close(fast(x), plain(x))


def test_views_in_inference_mode_require_what_pytorchs_do():
    """A view says that it requires a gradient where what it views does, but not under a mode that watches."""

    class Steps(Block):
        def forward(self, x):
            ys, views = [], []
            for step in x.unbind(1):
                y = self.conv(step)
                views += step.reshape(step.shape), step[:1]
                ys.append(F.relu(y))
            return torch.stack(ys), views

    plain, fast = pair(Steps())
    for _ in range(3):
        x = grid(2, 4, 3, 8, 6).requires_grad_()
        with torch.inference_mode():
            (y, views), (own, own_views) = fast(x), plain(x)
        close(y, own)
        assert [v.requires_grad for v in views] == [v.requires_grad for v in own_views]


def changed_input(self, x):
    x = x * 1
    y = self.conv(x)
    x.detach().mul_(0)
    return F.relu(self.bn(y))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("change", [Tensor.zero_, lambda x: x.numpy().fill(0)], ids=["operator", "numpy"])
def test_input_changed_in_place_later(change, looks, monkeypatch):
    """The block has run before that. What cannot be computed any more is an error, never another answer."""
    monkeypatch.setattr(carry, "GAIN_PERCENT", 10**6)  # where maps are carried, the block has read a copy

    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        if self.flag:
            change(x)
            y = y * 2 if looks else y
        return F.relu(y)

    model = module_with(forward).eval()
    fast, x = cf.accelerate(model), images()
    with torch.no_grad():
        settle(fast, x)
        fast.flag = model.flag = True
        if looks and change is not Tensor.zero_:  # an operator is seen before it writes
            with pytest.raises(RuntimeError, match="changed in place"):
                fast(x)
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("change", ["weight", "bias", "input"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_numpy_writes_before_an_unexpected_step(mode, normed, change, scale):
    """The value is what it was, or an error says that it is lost, also where a norm hides the change."""

    def forward(self, x):
        self.x = x
        y = self.conv(x)
        if self.flag:
            array = {"weight": self.conv.weight, "bias": self.conv.bias, "input": x}[change].detach().numpy()
            array[...] = array * (1 + scale) + scale
            return torch.tanh(y)  # not the norm or the ReLU that followed
        return F.relu(self.bn(y) if normed else y)

    model = module_with(forward).train(mode == "train")
    fast = cf.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        settle(fast, images())
        fast(images())
        fast.flag = model.flag = True
        x = images()
        expected = model(x.clone())
        try:
            got = fast(x.clone())
        except RuntimeError as error:
            assert "changed in place" in str(error) and not (change == "bias" and normed)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert change == "input" or (change == "bias" and normed)  # of which there are copies


def test_a_norm_flipped_behind_a_changed_bias():
    """The norm takes the bias away again, so that nothing of the block shows the change."""

    class Flipped(Block):
        def forward(self, x):
            y = self.conv(x)
            self.calls += 1
            if self.calls % 3 == 2:
                self.conv.bias.detach().numpy()[:] += 0.5
            return self.bn(y)

    plain, fast = pair(Flipped())
    for call in range(4):
        x = images()
        if call == 1:
            plain.bn.eval(), fast.bn.eval()
        close(fast(x), plain(x))


def test_input_always_changed_in_place():
    model = module_with(changed_input).eval()
    fast = cf.accelerate(model)
    for _ in range(4):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                x = images()
                torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
