"""Properties that hold for every configuration: random blocks, chains, clips and recurrent layers.

Hypothesis draws the cases through the generators of helpers.py and sequences.py, so that what those learn is
tested here at once, and shrinks what fails. ``python tests/properties.py`` is the long mode: thousands of
cases under every instruction set, with a result file.
"""

from __future__ import annotations

import collections
import copy
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import (
    LAYOUTS,
    PLANS,
    SEED,
    STRIDED,
    WINOGRAD,
    Block,
    after_conv,
    assert_block,
    decided,
    needs_extension,
    normal_tensors,
    random_block,
    strided,
    torch_block,
)
from norms import assert_normed, random_grad, random_norm
from norms import steady as steady_normed
from sequences import PLANS as RECURRENT_PLANS
from sequences import assert_case, random_case, result_gradients
from torch import nn

import cnnlstm_fast as cf

pytestmark = needs_extension

CASES = int(os.environ.get("CNNLSTM_FAST_CASES", "40"))
counts: collections.Counter[str] = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def _counted():
    """Tell the long mode how many cases of what ran."""
    yield
    if path := os.environ.get("CNNLSTM_FAST_CASES_FILE"):
        Path(path).write_text(json.dumps(counts))


def cases(**strategies):
    """A property over drawn arguments: repeatable from the run's seed, without a folder of examples."""

    def decorate(test):
        test = hypothesis.given(**strategies)(test)
        test = hypothesis.seed(SEED)(test)
        return hypothesis.settings(
            max_examples=CASES, deadline=None, database=None, print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )(test)  # fmt: skip

    return decorate


def start(seed: int, threads: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)


rngs = st.randoms(use_true_random=False)
seeds = st.integers(0, 2**31)
threads = st.sampled_from((1, 2))
dtypes = st.sampled_from((torch.float32, torch.bfloat16))
memory = st.sampled_from((None, *STRIDED))
block_plans = st.sampled_from((*PLANS, "winograd", "fft"))
wanted = st.sampled_from((("x", "weight", "bias"), ("weight", "bias"), ("x",), ("weight",), ("bias",), ()))


def block_for(plan: str, rng, dtype: torch.dtype) -> tuple[Block, torch.dtype]:
    """A block and a dtype of those that a plan takes."""
    if plan == "winograd":
        return random_block(rng, **WINOGRAD), torch.float32
    return random_block(rng), dtype


def library_is_right(block: Block, plan: str, *memory: str | None) -> bool:
    """Whether PyTorch's own convolution, where a plan may run it as it is, computes such memory right.

    Its gradients of overlapping memory differ, and of maps one column wide its channels-last kernels read
    what nobody wrote.
    """
    if plan in ("chunked", "winograd"):
        return "expanded" not in memory
    bare = replace(block, activation=None, pool=None)
    return plan not in ("reference", "auto") or min(block.size[-1], bare.out_shape()[-1]) > 1


def relaid(t: torch.Tensor, how: str | None) -> torch.Tensor:
    """The same values (but for "expanded") in another memory, which no reshape undoes."""
    return t if how is None or t.dim() < 2 else strided(t, how)


def steady(block: Block, tensors: dict[str, torch.Tensor], grad: torch.Tensor | None) -> bool:
    """Whether results are as large as their terms make likely.

    Hypothesis finds seeds at which all results but a cancelled one are cut off by the ReLU; of such a result
    only noise is left, and the rule, which measures by the true norm, says nothing.
    """
    plain = replace(block, activation=None, pool=None)
    true = {k: t.double().requires_grad_() for k, t in tensors.items()}
    squares = {k: t.detach().square().requires_grad_() for k, t in true.items()}
    conv, terms = torch_block(plain, **true), torch_block(plain, **squares)
    out = after_conv(block, conv)
    pairs = [(out, terms)]
    if grad is not None:
        (routed,) = torch.autograd.grad(out, conv, grad.double(), retain_graph=True)
        found = torch.autograd.grad(conv, list(true.values()), routed)
        pairs += zip(found, torch.autograd.grad(terms, list(squares.values()), routed.square()), strict=True)
    return all(t.square().mean() >= 0.01 * sizes.mean() for t, sizes in pairs)


@cases(
    rng=rngs, seed=seeds, threads=threads, dtype=dtypes, plan=block_plans, layout=st.sampled_from(LAYOUTS),
    x_memory=memory, weight_memory=memory, grad_memory=memory, needs=wanted,
)  # fmt: skip
def test_blocks(rng, seed, threads, dtype, plan, layout, x_memory, weight_memory, grad_memory, needs):
    """Any block, in any memory, under any plan: results and the gradients that are asked for."""
    block, dtype = block_for(plan, rng, dtype)
    if not library_is_right(block, plan, x_memory, weight_memory):
        x_memory = weight_memory = None
    start(seed, threads)
    tensors = normal_tensors(block, dtype)
    tensors["x"], tensors["weight"] = relaid(tensors["x"], x_memory), relaid(tensors["weight"], weight_memory)
    needs = tuple(n for n in needs if n in tensors)
    grad = None
    if needs:
        clear = decided(block, tensors)
        grad = (torch.randn(clear.shape) + 0.3).to(dtype) * clear
    hypothesis.assume(steady(block, tensors, grad))
    if grad_memory == "expanded":
        grad_memory = None
    assert_block(
        block, tensors, grad, plan=plan, layout=layout, needs=needs,
        our_grad=partial(relaid, how=grad_memory),
    )  # fmt: skip
    counts[f"block {plan}"] += 1


@cases(
    rng=rngs, seed=seeds, threads=threads, dtype=dtypes, plan=block_plans, layout=st.sampled_from(LAYOUTS),
    x_memory=memory, weight_memory=memory, grad_memory=memory, needs=wanted, training=st.booleans(),
    trained=st.booleans(), affine=st.booleans(),
    kept=st.sampled_from(("kept", "kept", "never kept", "kept no more")),
    momentum=st.sampled_from((None, 0.0, 0.1, 1.0)), eps=st.sampled_from((1e-5, 1e-3, 0.1)),
)  # fmt: skip
def test_normed_blocks(
    rng, seed, threads, dtype, plan, layout, x_memory, weight_memory, grad_memory, needs, training, trained,
    affine, kept, momentum, eps,
):  # fmt: skip
    """Any block with a batch norm: results, the gradients asked for, and what the norm remembers."""
    block, dtype = block_for(plan, rng, dtype)
    if not library_is_right(block, plan, x_memory, weight_memory):
        x_memory = weight_memory = None
    # Over few images statistics, and over few channels sums of gradients, err by luck.
    least = 64 if dtype == torch.bfloat16 else 4
    block = replace(block, n=block.n + 8, c_out=block.c_out * -(-least // block.c_out))
    start(seed, threads)
    tensors = normal_tensors(block, dtype)
    tensors["x"], tensors["weight"] = relaid(tensors["x"], x_memory), relaid(tensors["weight"], weight_memory)
    norm = random_norm(
        block, training, affine=affine, momentum=momentum, eps=eps, track_running_stats=kept != "never kept"
    ).requires_grad_(trained)
    norm.track_running_stats = kept == "kept"
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(rng.choice((0, 1, 7)))
    # The batch's statistics take every constant away: the bias has no gradient but noise.
    of_batch = training or kept == "never kept"
    needs = tuple(n for n in needs if n in tensors and not (n == "bias" and of_batch))
    grad = random_grad(block, tensors, norm)
    hypothesis.assume(steady_normed(block, tensors, norm, grad))
    assert_normed(
        block, tensors, norm, plan=plan, layout=layout, needs=needs, grad=grad,
        our_grad=partial(relaid, how=None if grad_memory == "expanded" else grad_memory),
    )  # fmt: skip
    counts[f"normed {plan}"] += 1


# ---------------------------------------------------------------- chains of modules

# Layers whose results are whole numbers or quarters for such inputs, so that no order of adding rounds.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    partial(nn.LeakyReLU, 0.25),
    nn.Hardtanh,
    nn.Identity,
    partial(nn.Dropout, 0.0),
)
POOLS = (
    None, partial(nn.MaxPool2d, 2), partial(nn.MaxPool2d, 3, 2, 1), partial(nn.MaxPool2d, (2, 1)),
    partial(nn.AvgPool2d, 2), partial(nn.MaxPool2d, 2, ceil_mode=True),
)  # fmt: skip


def random_chain(rng, channels: int) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        out = rng.choice((1, 3, 5, 16, 17))
        kernel = rng.choice((1, 2, 3))
        modules.append(
            nn.Conv2d(
                channels,
                out,
                kernel,
                rng.choice((1, 1, 2)),
                rng.choice((0, kernel // 2)),
                bias=rng.random() < 0.7,
            )
        )
        channels = out
        if rng.random() < 0.8:
            modules.append(rng.choice(ACTIVATIONS)())
        pool = rng.choice(POOLS)
        if pool is not None:
            modules.append(pool())
    if rng.random() < 0.5:
        modules.append(nn.Flatten())
    if len(modules) > 2 and rng.random() < 0.3:
        at = rng.randrange(len(modules))
        modules[at:] = [nn.Sequential(*modules[at:])]
    return modules


def whole_numbers(model: nn.Module) -> None:
    """Sparse parameters of -1, 0 and 1."""
    for p in model.parameters():
        p.data = torch.randint(-1, 2, p.shape) * (torch.rand(p.shape) < 0.4).float()


def results(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    slope = torch.autograd.grad(out, [x, *model.parameters()], grad.view(out.shape).to(out.dtype))
    return [out.detach(), *slope]


def strides(t: torch.Tensor) -> list[int]:
    """Of the dimensions whose strides mean anything."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def assert_exact(ours: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """Results and gradients are those of float64 to the bit, wherever PyTorch's own float32 ones are."""
    try:
        out = plain(x)
    except RuntimeError:  # too small an input for this chain
        with pytest.raises((ValueError, RuntimeError)):
            ours(x)
        return
    hypothesis.assume(out.numel() > 0)
    grad = torch.randint(-1, 2, out.shape).float()
    true = results(copy.deepcopy(plain).double(), x.double(), grad)
    theirs = results(plain, x, grad)
    hypothesis.assume(all(torch.equal(a.double(), b) for a, b in zip(theirs, true, strict=True)))
    mine = results(ours, x, grad)
    for name, got, expected, way in zip(
        ("out", "x", *(n for n, _ in ours.named_parameters())), mine, true, theirs, strict=True
    ):
        assert got.shape == expected.shape and got.dtype == way.dtype, name
        assert torch.equal(got.double(), expected), f"{name} of {ours}"
    assert strides(mine[0]) == strides(theirs[0]), "a chain has eager's strides"
    with torch.no_grad():
        assert torch.equal(ours(x).double(), true[0])


@cases(rng=rngs, seed=seeds, threads=threads, x_memory=memory, last=st.booleans())
def test_chains(rng, seed, threads, x_memory, last):
    """``cf.Sequential`` is ``nn.Sequential``."""
    start(seed, threads)
    channels = rng.choice((1, 2, 3, 5))
    plain = nn.Sequential(*random_chain(rng, channels))
    whole_numbers(plain)
    if last:
        plain = plain.to(memory_format=torch.channels_last)
    ours = cf.Sequential(*plain)
    x = torch.randint(
        -2, 3, (rng.choice((1, 2, 5)), channels, *(rng.choice((1, 4, 7, 12)) for _ in "hw"))
    ).float()
    assert_exact(ours, plain, relaid(x, x_memory))
    counts["chain"] += 1


class StepByStep(nn.Module):
    """What ``cf.TimeDistributed`` means: each step on its own."""

    def __init__(self, module, batch_first, flatten):
        super().__init__()
        self.module, self.batch_first, self.flatten = module, batch_first, flatten

    def forward(self, x):
        y = torch.stack([self.module(step) for step in x.unbind(1)], 1)
        return (y.flatten(2) if self.flatten and y.dim() > 3 else y).contiguous()


@cases(rng=rngs, seed=seeds, threads=threads, batch_first=st.booleans(), flatten=st.booleans())
def test_clips(rng, seed, threads, batch_first, flatten):
    """``cf.TimeDistributed`` is the module on every step, whichever of the first two dimensions is time."""
    start(seed, threads)
    channels = rng.choice((1, 3))
    chain = nn.Sequential(*random_chain(rng, channels))
    whole_numbers(chain)
    plain = StepByStep(chain, batch_first, flatten)
    ours = cf.TimeDistributed(cf.Sequential(*chain), batch_first, flatten)
    size = (rng.choice((1, 2, 3)), rng.choice((1, 2, 4)), channels, *(rng.choice((4, 7, 10)) for _ in "hw"))
    x = torch.randint(-2, 3, size).float()
    try:
        expected = plain(x)
    except RuntimeError:
        with pytest.raises((ValueError, RuntimeError)):
            ours(x)
        return
    true = copy.deepcopy(plain).double()(x.double())
    hypothesis.assume(torch.equal(expected.double(), true))
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            got = ours(x)
        assert got.shape == true.shape and torch.equal(got.double(), true), f"{ours}"
    counts["clip"] += 1


# ---------------------------------------------------------------- recurrent layers


@cases(
    rng=rngs, seed=seeds, threads=threads, dtype=dtypes, plan=st.sampled_from(RECURRENT_PLANS),
    training=st.booleans(),
)  # fmt: skip
def test_recurrent(rng, seed, threads, dtype, plan, training):
    """Any stack of layers with any state, resets and lengths, against cells step by step."""
    case = random_case(rng)
    if plan == "library":
        case = replace(case, reset=False, lengths=False)
    start(seed, threads)
    drawn = case.draw(dtype)
    for p in drawn.params.values():  # larger weights make the recurrence chaotic, and its error luck
        p.mul_(2 / max(case.hidden, 4) ** 0.5)
    functions = cf.reference if plan == "reference" else cf.functional
    run = partial(drawn.ours, functions=functions, plan=plan)
    grads = {n: g.to(dtype) for n, g in result_gradients(drawn).items()} if training else None
    assert_case(drawn, run, grads)
    counts[f"recurrent {plan}"] += 1


# ---------------------------------------------------------------- bridges


@cases(
    rng=rngs, seed=seeds, threads=threads, kind=st.sampled_from(("LSTM", "GRU")), batch_first=st.booleans()
)
def test_bridges(rng, seed, threads, kind, batch_first):
    """Block, layout and recurrent layer together, against PyTorch's operators in float64."""
    start(seed, threads)
    name = rng.choice(("locations", "columns", "rows")) + ("" if batch_first else "_time_major")
    block = random_block(rng, n=rng.choice((1, 2, 3)))
    tensors = normal_tensors(block, torch.float32)
    options = dict(
        stride=block.stride, padding=block.padding, dilation=block.dilation, groups=block.groups,
        activation=block.activation, pool=block.pool_module(), layout=name,
    )  # fmt: skip
    features = cf.reference.conv_block(**tensors, **options)
    rnn = getattr(nn, kind)(features.shape[-1], rng.choice((1, 7, 16, 33)), batch_first=batch_first)
    hypothesis.assume(features.shape[-1] < 3000 and features.numel() < 2**18)
    ours = getattr(cf, kind).like(rnn)
    with torch.no_grad():
        got, last = ours(cf.functional.conv_block(**tensors, **options))
        doubles = {k: t.double() for k, t in tensors.items()}
        true, true_last = copy.deepcopy(rnn).double()(cf.reference.conv_block(**doubles, **options))
        way, way_last = rnn(features)
    pairs = zip((got, *last), (true, *true_last), (way, *way_last), strict=True) if kind == "LSTM" else (
        (got, true, way), (last, true_last, way_last),
    )  # fmt: skip
    for mine, expected, theirs in pairs:
        assert mine.shape == expected.shape
        eps = torch.finfo(torch.float32).eps
        # A state is what is left of terms of about 1: one that happens to be small has their rounding errors.
        size = expected.norm() + expected.numel() ** 0.5 / 16
        assert (mine.double() - expected).norm() <= 4 * (theirs.double() - expected).norm() + 64 * eps * size
    counts[f"bridge {kind}"] += 1
