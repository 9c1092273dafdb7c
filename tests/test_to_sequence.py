"""cf.ToSequence, by itself and written by the block before."""

import pytest
import torch
from chains import CHAINS
from helpers import LAYOUTS, in_layout, needs_extension
from torch import nn
from twins import Ops, grid, on_grid

import cnnlstm_fast as cf

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
