"""Lists of modules that ``cf.Sequential`` and the matcher are tested on."""

import pytest
from torch import nn
from twins import on_grid

import cnnlstm_fast as cf
from cnnlstm_fast.fusion import match


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
    "softplus": (
        lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Softplus(0.5, 30), nn.MaxPool2d(2)],
        (2, 3, 9, 9),
        [4],
    ),
    "softplus_after_pool": (  # at its threshold it falls
        lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Softplus()], (2, 3, 9, 9), [2, 1],
    ),
    "mish": (
        lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Mish(), nn.MaxPool2d(2)], (2, 3, 9, 9), [4],
    ),
    "mish_after_pool": (lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Mish()], (2, 3, 9, 9), [2, 1]),
    "hardswish": (lambda: [nn.Conv1d(3, 8, 3), nn.Hardswish(), nn.MaxPool1d(2)], (2, 3, 19), [3]),
    "hardswish_after_pool": (
        lambda: [nn.Conv1d(3, 8, 3), nn.MaxPool1d(2), nn.Hardswish()], (2, 3, 19), [2, 1],
    ),
    "hardsigmoid": (
        lambda: [nn.Conv2d(3, 8, 3), nn.Hardsigmoid(inplace=True), nn.MaxPool2d(2)], (2, 3, 9, 9), [3],
    ),
    "hardsigmoid_after_pool": (
        lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Hardsigmoid()], (2, 3, 9, 9), [3],
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
    "other_activation": (lambda: [nn.Conv2d(3, 8, 3), nn.Softsign()], (2, 3, 9, 9), [1, 1]),
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
