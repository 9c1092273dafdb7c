"""Random programs around convolutions, as Python text: what a compiler sees of them, and what it may not move.

A program is a function of a :class:`Parts` and of a tensor of images, all of one number of channels. It
calls convolutions, norms, activations and pools, mostly one behind the other, and in between changes or reads
inputs, weights, statistics and values, itself or through views, in modes that begin and end anywhere.
"""

from __future__ import annotations

import random

from torch import nn

CHANNELS = 4

_ACTIVATIONS = (
    "F.relu({})", "F.relu({}, inplace=True)", "{}.relu_()", "torch.tanh({})", "F.silu({})", "{}.sigmoid_()",
    "F.leaky_relu({}, 0.1)", "F.hardtanh({}, inplace=True)", "s.relu({})",
)  # fmt: skip
_POOLS = ("F.max_pool2d({}, 2)", "F.max_pool2d({}, 3, 1, 1)", "F.avg_pool2d({}, 2)", "s.pool({})")
_MODES = ("torch.no_grad()", "torch.enable_grad()", "torch.inference_mode()")
AUTOCAST = "torch.autocast('cpu', dtype=torch.bfloat16)"
#: Of a module's parameters and buffers, and of values; a leaf that needs a gradient is changed beside it.
_CHANGES = (
    "{}.detach().mul_(1.25)", "{}.detach()[0].zero_()", "{}.data.add_(0.5)", "{}.detach().view(-1)[1:].neg_()",
    "torch.add({0}.detach(), 0.25, out={0}.detach())",
)  # fmt: skip
_CHANGES_OF_VALUES = ("{}.mul_(1.25)", "{}[:, 1] = 0.5", "{} += 0.25", "torch.relu_({})")
_STATE = (
    "s.{}.weight".format, "s.{}.bias".format, "s.{}.running_mean".format, "s.{}.running_var".format,
)  # fmt: skip


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


def write(rng: random.Random) -> str:
    """The text of a function ``program(s, v0)`` that returns a tuple of tensors."""
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
            put(rng.choice(_CHANGES).format(_STATE[of](rng.choice("mn" if of > 1 else changed))))
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
