"""Programs around convolutions in which something happens between a convolution and the end of its block.

A program is a function of a :class:`Parts` and of a tensor of images, all of one number of channels. Those of
:data:`BETWEEN` are written by hand; :func:`write` writes random ones.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 4


class Parts(nn.Module):
    """The modules that a program may use."""

    def __init__(self):
        super().__init__()
        for name in ("c", "d"):
            setattr(self, name, nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
        for name in ("m", "n"):
            norm = nn.BatchNorm2d(CHANNELS)
            setattr(self, name, norm)
            norm.running_mean.uniform_(-0.5, 0.5), norm.running_var.uniform_(0.5, 1.5)
        self.relu, self.pool, self.drop = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.0)


# ---------------------------------------------------------------- written by hand

BETWEEN = []


def between(program):
    BETWEEN.append(program)
    return program


def pooled(y):
    return F.max_pool2d(F.relu(y), 2)


@between
def input_cleared(s, t):
    y = s.c(t)
    t.mul_(0.0)
    return pooled(y)


@between
def input_assigned(s, t):
    y = s.c(t)
    t[:, 1] = 5.0
    return pooled(y)


@between
def input_added_to(s, t):
    y = s.c(t)
    t += 1.0
    return pooled(y), t


@between
def input_as_out(s, t):
    y = s.c(t)
    torch.add(t.detach(), 1.0, out=t.detach())
    return pooled(y)


@between
def view_of_input_cleared(s, t):
    v = t.detach()[0].view(-1)[5:]
    y = s.c(t)
    v.zero_()
    return pooled(y)


@between
def input_replaced_by_data(s, t):
    y = s.c(t)
    t.data = t.data * 2.0
    return pooled(y), t * 1.0


@between
def input_changed_through_numpy(s, t):
    n = t.detach().numpy()
    y = s.c(t)
    n *= 2.0
    return pooled(y)


@between
def input_overwritten_by_an_activation(s, t):
    y = s.c(t)
    u = torch.relu_(t)
    return pooled(y) + u.mean()


@between
def input_of_a_later_mutation(s, t):
    y = F.relu(s.c(t))
    t.zero_()
    return F.max_pool2d(y, 2)


@between
def weight_changed_and_back(s, t):
    w = s.c.weight.detach().clone()
    s.c.weight.detach().mul_(3.0)
    y = s.c(t)
    s.c.weight.detach().copy_(w)
    return pooled(y)


@between
def bias_changed(s, t):
    v = s.c.bias.detach()
    y = s.c(t)
    v.add_(1.0)
    return torch.tanh(y)


@between
def weight_changed_before_the_norm(s, t):
    y = s.c(t)
    s.c.weight.detach()[0].mul_(2.0)
    return F.relu(s.n(y))


@between
def scale_changed_behind_the_norm(s, t):
    y = s.n(s.c(t))
    s.n.weight.detach().mul_(2.0)
    s.n.bias.detach().sub_(1.0)
    return F.relu(y)


@between
def statistics_changed_behind_the_norm(s, t):
    y = s.n(s.c(t))
    s.n.running_mean.add_(1.0)
    s.n.running_var.mul_(2.0)
    return F.relu(y)


@between
def statistics_changed_before_the_norm(s, t):
    y = s.c(t)
    s.n.running_mean.add_(1.0)
    return F.relu(s.n(y))


@between
def statistics_read_behind_the_norm(s, t):
    y = s.n(s.c(t))
    z = s.n.running_mean * 2.0
    return F.relu(y), z


@between
def statistics_read_before_the_norm(s, t):
    y = s.c(t)
    z = s.n.running_var.view(2, 2).clone()
    return F.relu(s.n(y)), z


@between
def statistics_read_through_a_view(s, t):
    v = s.n.running_var.view(2, 2)
    y = s.n(s.c(t))
    z = v.sum()
    return pooled(y) * z


@between
def statistics_reset_behind_the_norm(s, t):
    y = s.n(s.c(t))
    s.n.reset_running_stats()
    return F.relu(y)


@between
def norms_in_another_order(s, t):
    y, z = s.c(t), s.d(t)
    y, z = s.n(y), s.n(z)
    z = F.relu(z)
    return F.relu(y) + z


@between
def one_norm_twice(s, t):
    y = s.c(t)
    z = s.n(s.d(t))
    y = s.n(y)
    return F.relu(y) + F.relu(z)


@between
def result_dropped_behind_a_mutation(s, t):
    y = s.n(s.c(t))
    s.n.running_mean.zero_()
    F.relu(y)
    return t + s.n.running_mean.sum()


@between
def convolution_without_gradient(s, t):
    with torch.no_grad():
        y = s.c(t)
    return pooled(y)


@between
def activation_without_gradient(s, t):
    y = s.n(s.c(t))
    with torch.no_grad():
        return F.relu(y)


@between
def pool_without_gradient(s, t):
    y = F.relu(s.c(t))
    with torch.no_grad():
        y = F.max_pool2d(y, 2)
    return y + t.mean()


@between
def gradient_enabled_for_the_convolution(s, t):
    with torch.no_grad():
        with torch.enable_grad():
            y = s.c(t)
        return F.relu(y)


@between
def convolution_under_autocast(s, t):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.c(t)
    return pooled(y)


@between
def activation_under_autocast(s, t):
    y = s.c(t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return pooled(s.d(t)) + pooled(y)


@between
def convolution_without_autocast(s, t):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = s.c(t)
        return F.silu(y)


@between
def convolution_in_inference_mode(s, t):
    with torch.inference_mode():
        y = s.c(t.detach())
    return F.relu(y).clone() + t.mean()


@between
def in_place_behind_a_view(s, t):
    y = s.c(t)
    v = y[:, 0]
    y.relu_()
    return F.max_pool2d(y, 2), v * 2.0


@between
def weight_changed_in_another_branch(s, t):
    y = s.c(t)
    z = F.relu(s.d(t))
    s.c.weight.detach().neg_()
    return F.relu(s.d(z)) + F.relu(y)


@between
def tied_weight_changed(s, t):
    w = s.c.weight.detach().view(-1)
    y = F.conv2d(t, s.c.weight)
    w[::2] = 0.0
    return F.leaky_relu(y, 0.1)


# ---------------------------------------------------------------- random

_ACTIVATIONS = (
    "F.relu({})", "F.relu({}, inplace=True)", "{}.relu_()", "torch.tanh({})", "F.silu({})", "{}.sigmoid_()",
    "F.leaky_relu({}, 0.1)", "F.hardtanh({}, inplace=True)", "s.relu({})",
)  # fmt: skip
_POOLS = ("F.max_pool2d({}, 2)", "F.max_pool2d({}, 3, 1, 1)", "F.avg_pool2d({}, 2)", "s.pool({})")
_MODES = ("torch.no_grad()", "torch.enable_grad()", "torch.inference_mode()")
AUTOCAST = "torch.autocast('cpu', dtype=torch.bfloat16)"
#: Of a module's parameters and buffers, and of values; a leaf that needs a gradient is changed beside it.
_CHANGES = (
    "{}.data.add_(0.5)", "{}.detach().mul_(1.25)", "{}.detach()[0].zero_()",
    "{}.detach().view(-1)[1:].neg_()", "torch.add({0}.detach(), 0.25, out={0}.detach())",
)  # fmt: skip
_CHANGES_OF_VALUES = ("{}.mul_(1.25)", "{}[:, 1] = 0.5", "{} += 0.25", "torch.relu_({})")
_STATE = (
    "s.{}.weight".format, "s.{}.bias".format, "s.{}.running_mean".format, "s.{}.running_var".format,
)  # fmt: skip


def write(rng: random.Random) -> str:
    """The text of a function ``program(s, v0)`` that returns a tuple of tensors.

    It calls convolutions, norms, activations and pools, mostly one behind the other, and in between
    changes or reads inputs, weights, statistics and values, itself or through views, in modes that begin
    and end anywhere.
    """
    lines: list[str] = []
    values, depth, state = ["v0"], 0, "value"
    # Autocast keeps the first copy of a weight that it makes, so nobody changes one there.
    modes, changed = (_MODES, "cdmn") if rng.random() < 0.75 else ((*_MODES, AUTOCAST, AUTOCAST), "mn")

    def put(line: str) -> None:
        lines.append("    " * (depth + 1) + line)

    def new(expression: str) -> None:
        put(f"v{len(values)} = {expression}")
        values.append(f"v{len(values)}")

    for _ in range(rng.randint(4, 14)):
        newest, some = values[-1], rng.choice(values)
        roll = rng.random()
        if roll < 0.6:  # on along the chain
            on = newest if rng.random() < 0.85 else some
            kinds = {
                "value": ("conv",), "conv": ("norm", "activation", "pool", "drop"),
                "norm": ("activation", "activation", "pool"), "activation": ("pool", "conv", "drop"),
                "pool": ("conv", "activation"), "drop": ("activation", "norm"),
            }  # fmt: skip
            state = rng.choice(kinds[state])
            new({
                "conv": rng.choice(("s.c({})", "s.d({})", "F.conv2d({}, s.c.weight, s.d.bias, padding=1)")),
                "norm": rng.choice(("s.m({})", "s.n({})")), "activation": rng.choice(_ACTIVATIONS),
                "pool": rng.choice(_POOLS), "drop": rng.choice(("s.drop({})", "F.dropout({}, 0.5, False)")),
            }[state].format(on))  # fmt: skip
        elif roll < 0.65:
            put(rng.choice(_CHANGES + _CHANGES_OF_VALUES).format(some))
        elif roll < 0.75:
            of = rng.randrange(len(_STATE))
            name = _STATE[of](rng.choice("mn" if of > 1 else changed))
            # A block saves biases, which PyTorch's backward does not read; that reads what a norm's weight
            # has become behind its back.
            hidden = name.endswith("bias")
            choices = _CHANGES[:1] if hidden else _CHANGES[name in ("s.m.weight", "s.n.weight") :]
            put(rng.choice(choices).format(name))
        elif roll < 0.82:
            put(f"seen.append({rng.choice((some, _STATE[rng.randint(2, 3)](rng.choice('mn'))))}.sum() * 2)")
        elif roll < 0.87:
            put(f"w = {some}{rng.choice(('.detach()', '[:, :2]', '.view(-1)', '.detach()[1].t()'))}")
        elif roll < 0.90:
            if any(line.strip().startswith("w =") for line in lines):
                put("w.mul_(0.5)")
        elif roll < 0.93:
            new(f"{newest} * {rng.choice((2, 0.5))} + {some}.mean()")
        elif roll < 0.97 and depth < 2:
            put(f"with {rng.choice(modes)}:")
            depth += 1
            put("pass")
        elif depth:
            depth -= 1
    depth = 0
    kept = sorted({values[-1], rng.choice(values)}, key=values.index)
    put(f"return ({', '.join(kept)}, *seen)")
    return "\n".join(["def program(s, v0):", "    seen = []", *lines]) + "\n"
