"""The rule between the plans on a CUDA device: costs counted by hand, and what is chosen by them."""

from __future__ import annotations

import pytest
import torch
from triton_norms import modes

from cnnlstm_fast.planning import choose, costs_cuda, support
from cnnlstm_fast.planning.problem import Sizes, conv_problem
from cnnlstm_fast.spec import BlockSpec, Pool


def _planned(shape, weight_shape, dtype=torch.float32, tf32=False, training=True, norm="batch", **spec):
    spec = BlockSpec(**{"padding": (1, 1), "pool": Pool((2, 2), (2, 2))} | spec)
    sizes = Sizes(spec, shape, weight_shape, dtype, "cuda", norm)
    return choose.cheapest(sizes, training, shape[1] > 4, False, True, tf32, 1)[:3]


TUTORIAL_SIZES = (1280, 3, 28, 28), (64, 3, 3, 3)
CRNN_SIZES = (64, 64, 16, 50), (128, 64, 3, 3)


@modes
def test_few_taps_convolve_twice_and_many_leave_it_to_the_library(training):
    for dtype, tf32 in ((torch.float32, True), (torch.bfloat16, False)):
        assert _planned(*TUTORIAL_SIZES, dtype, tf32, training)[:2] == ("direct", "direct")
        assert _planned(*CRNN_SIZES, dtype, tf32, training)[:2] == ("chunked", "chunked")
    assert _planned(*TUTORIAL_SIZES, torch.float32, False, training)[0] == "chunked"  # without tensor cores


def test_given_statistics_of_a_norm_that_trains():
    assert _planned(*TUTORIAL_SIZES, torch.bfloat16, norm="given")[0] == "direct"
    assert _planned(*TUTORIAL_SIZES, torch.bfloat16, norm="given", pool=None)[0] == "chunked"


def test_a_folded_norm_is_a_block_without_one():
    for sizes in (TUTORIAL_SIZES, CRNN_SIZES):
        assert _planned(*sizes, torch.bfloat16, norm="folded") == _planned(*sizes, torch.bfloat16, norm=None)
    bare = dict(pool=None, activation=None)
    assert _planned(*TUTORIAL_SIZES, norm=None, **bare)[0] == "reference"
    assert _planned(*TUTORIAL_SIZES, norm="folded", **bare)[0] != "reference"


def test_costs_counted_by_hand():
    """The tutorial's block in bfloat16, bound by bytes all over, but for what it convolves."""
    spec = BlockSpec(padding=(1, 1), pool=Pool((2, 2), (2, 2)))
    sizes = Sizes(spec, *TUTORIAL_SIZES, torch.bfloat16, "cuda", "batch")
    problem = conv_problem(sizes, training=True, needs_x=False, channels_last=False, threads=1)
    costs = costs_cuda.costs(problem, tf32=False)
    x, out, codes = 2 * 1280 * 3 * 28**2, 2 * 1280 * 64 * 14**2, 1280 * 64 * 14**2
    the_map = 4 * out
    convolved = 2 * 1280 * 64 * 28**2 * 27 / (180 * 0.2)
    library = x + the_map
    assert costs["direct"] == (
        pytest.approx(2 * convolved),
        pytest.approx(max(x + out + codes + the_map, convolved) + 2 * out + library),
    )
    assert costs["chunked"] == (
        pytest.approx(library + the_map + the_map + 2 * out + codes),
        pytest.approx(library + 2 * the_map + out + codes + 2 * out + library),
    )


def test_the_plans_of_calls(monkeypatch):
    """On CUDA tensors without data: what decides knows the norm's mode and whether its weight trains."""
    from torch._subclasses import FakeTensorMode

    seen = []
    decide = choose.cheapest

    def recorded(sizes, *args):
        seen.append(sizes.norm)
        return decide(sizes, *args)

    monkeypatch.setattr(choose, "cheapest", recorded)
    spec = BlockSpec(padding=(1, 1), pool=Pool((2, 2), (2, 2)))
    with FakeTensorMode():
        x, weight = (torch.empty(shape, device="cuda") for shape in TUTORIAL_SIZES)
        norm = torch.nn.BatchNorm2d(64, device="cuda")
        for train, frozen in ((True, False), (False, False), (False, True)):
            norm.train(train).requires_grad_(not frozen)
            choose.choose("auto", spec, x, weight, None, norm)
        assert seen == ["batch", "given", "folded"]
        with torch.no_grad():
            choose.choose("auto", spec, x, weight, None, norm.requires_grad_())
        assert seen[3:] == ["folded"]
        assert support.why_not_by_patches(spec, x, weight) is not None
