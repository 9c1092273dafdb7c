"""The rule between the plans on a CUDA device: costs counted by hand, and what is chosen by them."""

from __future__ import annotations

import pytest
import torch
from triton_norms import modes

from cnnlstm_fast.planning import choose, costs_cuda, support
from cnnlstm_fast.planning.problem import Sizes, conv_problem
from cnnlstm_fast.spec import BlockSpec, Pool

POOL_2X2 = Pool((2, 2), (2, 2))


def _planned(
    shape, weight_shape, dtype=torch.float32, tf32=False, training=True, norm="batch", needs_x=None, **spec
):
    """The plans of forward and backward and the reason; inputs of few channels want no gradient."""
    spec = BlockSpec(**{"padding": (1, 1), "pool": POOL_2X2} | spec)
    sizes = Sizes(spec, shape, weight_shape, dtype, "cuda", norm)
    needs_x = shape[1] > 4 if needs_x is None else needs_x
    return choose.cheapest(sizes, training, needs_x, False, True, tf32, 1)[:3]


def _planned_without(*sizes, training=False, needs_x=False, pool=None, **options):
    """The plans of forward and backward of a block without a norm, whose result is a sequence."""
    options = {"layout": "locations"} | options
    return _planned(*sizes, training=training, norm=None, needs_x=needs_x, pool=pool, **options)[:2]


# ---------------------------------------------------------------- a block with a norm

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
    spec = BlockSpec(padding=(1, 1), pool=POOL_2X2)
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
    spec = BlockSpec(padding=(1, 1), pool=POOL_2X2)
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


# ---------------------------------------------------------------- a block without one


def test_small_channels_run_direct_and_arithmetic_goes_to_the_library():
    """The tutorial's block is bound by memory, a VGG layer by arithmetic; TF32 moves the border."""
    tutorial = (1280, 3, 28, 28), (64, 3, 3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        planned = _planned_without(*tutorial, dtype, dtype == torch.float32, pool=POOL_2X2, training=True)
        assert planned == ("direct", "direct")
    vgg = (64, 256, 16, 50), (512, 256, 3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        planned = _planned_without(*vgg, dtype, pool=POOL_2X2, training=True, needs_x=True)
        assert planned == ("chunked", "chunked")
    between = (64, 6, 32, 100), (32, 6, 3, 3)
    assert _planned_without(*between, pool=POOL_2X2)[0] == "chunked"
    assert _planned_without(*between, tf32=True, pool=POOL_2X2)[0] == "direct"


def test_windows_that_overlap_cost_the_direct_plan_their_recomputation():
    sizes = (64, 6, 64, 64), (24, 6, 3, 3)
    assert _planned_without(*sizes, torch.bfloat16, pool=POOL_2X2)[0] == "direct"
    assert _planned_without(*sizes, torch.bfloat16, pool=Pool((5, 5), (1, 1), (2, 2)))[0] == "chunked"


def test_nothing_to_fuse_is_left_to_torch():
    sizes = (8, 3, 28, 28), (64, 3, 3, 3)
    assert _planned_without(*sizes, activation=None, layout="channels_last") == ("reference", "reference")
    assert _planned_without(*sizes, activation=None)[0] != "reference"
    assert _planned_without((8, 32, 28, 28), (32, 1, 3, 3), groups=32) == ("chunked", "chunked")
