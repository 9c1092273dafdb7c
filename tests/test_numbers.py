"""What equality alone does not show: specials, ties, repeatability, and the helper's own strictness."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Block,
    PoolCase,
    assert_block,
    assert_close_as_torch,
    evaluate,
    fused_plans,
    integer_tensors,
    needs_extension,
    normal_tensors,
    our_block,
    plans,
    random_block,
    random_blocks,
    torch_block,
    torch_ways,
)

BLOCK = Block(3, 5, (9, 14), 18, (3, 3), padding=(1, 1), pool=PoolCase((2, 2), (2, 2), (0, 0), (1, 1)))
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# what pools do with a special value: exactly once, several windows at once, at the padded edge, never
SPECIAL_BLOCKS = {
    "2x2": BLOCK,
    "overlapping": replace(BLOCK, pool=PoolCase((3, 3), (1, 1), (1, 1), (1, 1))),
    "ceil": replace(BLOCK, pool=PoolCase((3, 3), (2, 2), (1, 1), (1, 1), True)),
    "dilated": replace(BLOCK, pool=PoolCase((2, 2), (1, 2), (0, 1), (2, 3))),
    "bytes": replace(BLOCK, pool=PoolCase((4, 5), (2, 3), (2, 2), (1, 1))),
    "no pool": replace(BLOCK, pool=None),
    "no activation": replace(BLOCK, activation=None),
    "neither": replace(BLOCK, activation=None, pool=None),
    "signal": Block(3, 5, (31,), 18, (3,), (1,), (1,), (1,), pool=PoolCase((3,), (2,), (1,), (1,))),
    "pointwise": Block(3, 5, (9, 14), 33, (1, 1), pool=PoolCase((2, 2), (2, 2), (0, 0), (1, 1))),
}
special_blocks = pytest.mark.parametrize("block", SPECIAL_BLOCKS.values(), ids=SPECIAL_BLOCKS)

some_special_blocks = pytest.mark.parametrize(
    "block", [SPECIAL_BLOCKS[name] for name in ("2x2", "ceil", "no pool", "neither")],
    ids=("2x2", "ceil", "no pool", "neither"),
)  # fmt: skip


def assert_same_with_specials(block, tensors, grad, plan, names=("out", "x", "weight", "bias")):
    """Whole numbers, NaNs and infinities exactly where one of PyTorch's ways has them."""
    ours = evaluate(lambda **t: our_block(block, **t, plan=plan), tensors, grad)
    ways, true = torch_ways(block, tensors, grad)
    for name in names:
        mine = ours[name].double()
        theirs = [way[name].double() for way in (*ways, true)]
        same = torch.stack([(mine == t) | (mine.isnan() & t.isnan()) for t in theirs]).any(0)
        assert same.all(), (
            f"{name}: {(~same).sum().item()} of {same.numel()} elements differ from every way of PyTorch, "
            f"the first at {(~same).nonzero()[0].tolist()}: {mine[~same][0].item()}, PyTorch's "
            f"{[t[~same][0].item() for t in theirs]}"
        )


# ------------------------------------------------------------- NaN and infinities


def with_specials(block, dtype, specials):
    """A case with special values at a few places of the input."""
    tensors, grad = integer_tensors(block, dtype)
    x, weight = tensors["x"].view(-1), tensors["weight"]
    for special in specials:
        x[torch.randperm(x.numel())[:4]] = special
    # 0 * inf is NaN: infinities come through sets of nonzero weights alone
    weight[::2] = torch.randint(0, 2, weight[::2].shape) * 2 - 1
    weight[4:8] = 1
    return tensors, grad.clamp(-1, 1)


@pytest.mark.instruction_sets
@plans
@special_blocks
@pytest.mark.parametrize(
    "specials", [[math.nan], [math.inf], [-math.inf], [math.nan, math.inf, -math.inf]], ids=str
)
@floats
def test_specials_in_the_input(plan, block, specials, dtype):
    tensors, grad = with_specials(block, dtype, specials)
    assert_same_with_specials(block, tensors, grad, plan, ("out", "x", "bias"))


@plans
@some_special_blocks
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_specials_reach_the_weights_gradient(plan, block, special):
    """Also from places whose own gradient is zero: 0 * NaN and 0 * inf are NaN."""
    tensors, grad = with_specials(block, torch.float32, [special])
    assert_same_with_specials(block, tensors, grad, plan, ("weight",))


@plans
@special_blocks
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_specials_in_the_weight(plan, block, special):
    # 0 * inf in the padding differs between PyTorch's own ways
    block = replace(block, padding=tuple(0 for _ in block.padding))
    tensors, grad = integer_tensors(block, torch.float32)
    tensors["x"] = tensors["x"].abs() + 1
    tensors["weight"][2].view(-1)[0] = special
    assert_same_with_specials(block, tensors, grad.clamp(-1, 1), plan, ("out", "weight", "bias"))


@plans
@some_special_blocks
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=str)
def test_specials_reach_the_inputs_gradient(plan, block, special):
    """From the weight, also where the gradient that meets them is zero."""
    tensors, grad = integer_tensors(block, torch.float32)
    tensors["weight"][2].view(-1)[0] = special
    assert_same_with_specials(block, tensors, grad.clamp(-1, 1), plan, ("x",))


@plans
@special_blocks
@floats
@pytest.mark.parametrize("where", ["bias", "grad"])
def test_specials_in_the_bias_and_the_gradient(plan, block, dtype, where):
    tensors, grad = integer_tensors(block, dtype)
    tensors["x"] = torch.where(tensors["x"] == 0, 1, tensors["x"])
    tensors["weight"] = torch.where(tensors["weight"] == 0, 1, tensors["weight"])
    grad = grad.clamp(-1, 1)
    for c, special in enumerate((math.nan, math.inf, -math.inf)):
        if where == "bias":
            tensors["bias"][c] = special
        else:
            grad[1, c].view(-1)[0] = special
    names = ("out", "bias") if dtype == torch.bfloat16 else ("out", "x", "weight", "bias")
    assert_same_with_specials(block, tensors, grad, plan, names)


@plans
def test_overflow_goes_to_infinity(plan):
    tensors, _ = integer_tensors(BLOCK, torch.float32)
    tensors["x"] = tensors["x"].abs() * 3e38
    tensors["weight"] = tensors["weight"].abs() + 1
    out = our_block(BLOCK, **tensors, plan=plan)
    assert torch.equal(out.isinf(), torch_block(BLOCK, **tensors).isinf()) and out.isinf().any()


@plans
@floats
def test_a_map_of_nothing_but_specials(plan, dtype):
    for value in (math.nan, math.inf, -math.inf):
        for activation in ("relu", None):
            block = Block(2, 1, (6, 6), 20, (1, 1), activation=activation, pool=BLOCK.pool)
            tensors = {
                "x": torch.full((2, 1, 6, 6), value, dtype=dtype),
                "weight": torch.ones(20, 1, 1, 1, dtype=dtype),
                "bias": torch.zeros(20, dtype=dtype),
            }
            grad = torch.ones(block.out_shape(), dtype=dtype)
            assert_same_with_specials(block, tensors, grad, plan, ("out", "x", "bias"))


@plans
def test_the_last_nan_of_a_window_takes_the_gradient(plan):
    """Places in a 2x2 window: two NaNs, the later one wins; then one NaN before a larger number."""
    block = Block(1, 1, (2, 4), 1, (1, 1), bias=False, pool=BLOCK.pool)
    x = torch.tensor([[[[math.nan, 9.0, math.nan, 1.0], [math.nan, 7.0, 5.0, 9.0]]]])
    ours = evaluate(
        lambda **t: our_block(block, **t, plan=plan),
        {"x": x, "weight": torch.ones(1, 1, 1, 1)},
        torch.tensor([[[[3.0, 5.0]]]]),
    )
    assert ours["out"].isnan().all()
    expected = torch.tensor([[[[0.0, 0.0, 5.0, 0.0], [3.0, 0.0, 0.0, 0.0]]]])
    assert torch.equal(ours["x"], expected)


@plans
@floats
def test_subnormal_numbers_and_negative_zero(plan, dtype):
    """Flushed to zero, or as PyTorch has them; normal ones exactly; and -0 does not pass the ReLU."""
    block = Block(2, 1, (8, 8), 16, (1, 1), bias=False, activation=None, pool=BLOCK.pool)
    smallest = torch.finfo(dtype).smallest_normal
    x = (torch.randint(-64, 65, (2, 1, 8, 8)) * (smallest / 64)).to(dtype)
    weight = torch.ones(16, 1, 1, 1, dtype=dtype)
    out = our_block(block, x, weight, plan=plan)
    exact = torch_block(block, x.double(), weight.double())
    flushed = (out.abs() < smallest) & (exact.abs() < smallest)  # or not told apart by a pool
    assert ((out == exact) | (out == torch_block(block, x, weight)) | flushed).all()
    block = replace(block, activation="relu")
    zeros = evaluate(
        lambda **t: our_block(block, **t, plan=plan),
        {"x": torch.full_like(x, -0.0), "weight": weight},
        torch.ones(block.out_shape(), dtype=dtype),
    )
    assert not any(t.any() for t in zeros.values())


# ------------------------------------------------------------- ties


@pytest.mark.instruction_sets
@plans
@special_blocks
@floats
def test_ties_go_to_the_first(plan, block, dtype):
    """An input of two values ties nearly every window."""
    tensors, grad = integer_tensors(block, dtype)
    tensors["x"] = (tensors["x"] > 0).to(dtype)
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    tensors["weight"][:, 0] = 1 if tensors["weight"].dim() == 3 else torch.eye(tensors["weight"].shape[-1])
    assert_block(block, tensors, grad.clamp(-1, 1), plan=plan, needs=("x", "bias"), exact=True)


@plans
@special_blocks
@floats
def test_all_negative_maps(plan, block, dtype):
    """Under a ReLU nothing passes and no gradient flows; without it the least negative wins."""
    tensors, grad = integer_tensors(block, dtype)
    tensors["x"], tensors["weight"] = tensors["x"].clamp(-1, 1), tensors["weight"].clamp(-1, 1)
    tensors["bias"] = torch.full_like(tensors["bias"], -100)  # 45 taps
    ours = assert_block(block, tensors, grad.clamp(-1, 1), plan=plan, exact=True)
    if block.activation:
        assert not any(t.any() for t in ours.values())
    else:
        assert (ours["out"] < 0).any() and ours["bias"].any()


@plans
def test_zero_does_not_pass_the_relu(plan):
    """The gradient of ReLU at 0 is 0, as PyTorch has it."""
    block = replace(BLOCK, c=1, kernel=(1, 1), padding=(0, 0))
    tensors = {"x": torch.zeros(3, 1, 9, 14), "weight": torch.ones(18, 1, 1, 1), "bias": torch.zeros(18)}
    ours = assert_block(block, tensors, torch.ones(block.out_shape()), plan=plan, exact=True)
    assert not ours["bias"].any()


# ------------------------------------------------------------- bits


@pytest.mark.instruction_sets
@random_blocks(12)
@fused_plans
@floats
def test_the_same_bits_twice(block, plan, dtype):
    tensors = normal_tensors(block, dtype)
    grad = torch.randn(block.out_shape()).to(dtype)

    def run():
        return evaluate(lambda **t: our_block(block, **t, plan=plan), tensors, grad)

    first, second = run(), run()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.instruction_sets
@needs_extension
@random_blocks(12)
@floats
def test_direct_bits_do_not_depend_on_threads(block, dtype):
    tensors = normal_tensors(block, dtype)
    grad = torch.randn(block.out_shape()).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(lambda **t: our_block(block, **t, plan="direct"), tensors, grad))
    for other in results[1:]:
        assert torch.equal(results[0]["out"], other["out"])
        assert torch.equal(results[0]["x"], other["x"])


@pytest.mark.instruction_sets
@needs_extension
@random_blocks(12)
@floats
def test_direct_bits_do_not_depend_on_neighbours(block, dtype):
    """A sample alone, in another batch, at another place, and beside NaNs."""
    block = replace(block, n=max(block.n, 5))
    tensors = normal_tensors(block, dtype)
    whole = our_block(block, **tensors, plan="direct")
    x = tensors["x"]
    i = random.randrange(block.n)
    for batch in (x[i : i + 1], x[i:], x[: i + 1].flip(0), x.clone()):
        at = next(j for j in range(len(batch)) if torch.equal(batch[j], x[i]))
        if len(batch) == len(x):
            batch = torch.where(torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)) == at, batch, math.nan)
        assert torch.equal(our_block(block, **tensors | {"x": batch}, plan="direct")[at], whole[i])


@fused_plans
@floats
@pytest.mark.parametrize("keeps_gradient", [False, True])
def test_forward_bits_do_not_depend_on_gradients(plan, dtype, keeps_gradient):
    """With and without winner codes the same result."""
    block = random_block(random.Random(torch.initial_seed()), groups=1)
    tensors = normal_tensors(block, dtype)
    plain = our_block(block, **tensors, plan=plan)
    leaves = {k: t.clone().requires_grad_(keeps_gradient or k == "bias") for k, t in tensors.items()}
    assert torch.equal(plain, our_block(block, **leaves, plan=plan))


@plans
def test_a_result_is_never_overwritten(plan):
    """Later calls of the same shape, results dropped in between, gradients too."""
    tensors = normal_tensors(BLOCK, torch.float32)
    grad = torch.randn(BLOCK.out_shape())

    def run(scale):
        return evaluate(
            lambda **t: our_block(BLOCK, **t, plan=plan), tensors | {"x": tensors["x"] * scale}, grad
        )

    kept = run(1.0)
    copies = {k: t.clone() for k, t in kept.items()}
    for scale in (2.0, -1.0, 0.5):
        later = run(scale)
        storages = {t.untyped_storage().data_ptr() for t in (*kept.values(), *later.values())}
        assert len(storages) == 2 * len(kept)
        del later
    assert all(torch.equal(kept[k], copies[k]) for k in kept)


@plans
def test_results_do_not_share_memory_with_arguments(plan):
    """Not even where the block does nothing: a 1x1 convolution by one, no activation, no pool."""
    block = Block(2, 1, (4, 4), 1, (1, 1), bias=False, activation=None)
    x, weight = torch.randn(2, 1, 4, 4), torch.ones(1, 1, 1, 1)
    grad = torch.randn(2, 1, 4, 4)
    ours = evaluate(lambda **t: our_block(block, **t, plan=plan), {"x": x, "weight": weight}, grad)
    pointers = [t.untyped_storage().data_ptr() for t in (x, weight, grad, *ours.values())]
    assert len(set(pointers)) == len(pointers)


# ------------------------------------------------------------- that these tests can fail


def test_fresh_memory_is_poisoned():
    """What the op allocates through the dispatcher goes through these."""
    like = torch.ones(2)
    assert torch.ops.aten.new_empty.default(like, [7]).isnan().all()
    assert torch.ops.aten.new_empty.default(like, [7], dtype=torch.bfloat16).isnan().all()
    assert (torch.ops.aten.new_empty.default(like, [7], dtype=torch.uint8) == 255).all()
    assert torch.empty_like(like).isnan().all()


class TestTheRule:
    """assert_close_as_torch itself."""

    true = torch.linspace(1, 2, 1000, dtype=torch.float64)

    def test_takes_the_truth_rounded(self):
        for dtype in (torch.float32, torch.bfloat16):
            assert_close_as_torch(self.true.to(dtype), self.true.to(dtype), self.true)

    def test_takes_twice_the_worst_of_pytorchs_errors(self):
        good, bad = self.true.float(), (self.true * (1 + 1e-4)).float()
        assert_close_as_torch((self.true * (1 - 1.9e-4)).float(), [good, bad], self.true)
        with pytest.raises(AssertionError, match="PyTorch's own"):
            assert_close_as_torch((self.true * (1 - 2.2e-4)).float(), [good, bad], self.true)

    @pytest.mark.parametrize("wrong", [1.001, math.nan, math.inf, -math.inf, 0.0], ids=str)
    def test_refuses_one_wrong_element(self, wrong):
        ours = self.true.float()
        ours[500] = wrong
        with pytest.raises(AssertionError):
            assert_close_as_torch(ours, self.true.float(), self.true)

    def test_wants_nans_and_signs_of_infinity_where_pytorch_has_them(self):
        theirs = self.true.float()
        theirs[3], theirs[4], theirs[5] = math.nan, math.inf, -math.inf
        true = theirs.double()
        assert_close_as_torch(theirs.clone(), theirs, true)
        for place, other in ((3, 1.0), (3, math.inf), (4, -math.inf), (5, math.nan)):
            ours = theirs.clone()
            ours[place] = other
            with pytest.raises(AssertionError, match="NaN"):
                assert_close_as_torch(ours, theirs, true)

    def test_takes_empty_tensors(self):
        assert_close_as_torch(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3).double())

    @pytest.mark.parametrize("ours", [torch.ones(999), torch.ones(1000).double()], ids=["shape", "dtype"])
    def test_refuses_another_shape_or_dtype(self, ours):
        with pytest.raises(AssertionError):
            assert_close_as_torch(ours, self.true.float(), self.true)

    def test_refuses_a_truth_in_single_precision(self):
        with pytest.raises(AssertionError, match="not float64"):
            assert_close_as_torch(self.true.float(), self.true.float(), self.true.float())


def test_exact_whole_numbers_see_one_wrong_winner(monkeypatch):
    """The sweep's comparison notices a pool whose ties go to the last element."""
    import helpers

    def last_wins(block, x, weight, bias, *, plan, layout):
        y = F.relu(F.conv2d(x, weight, bias, padding=1))
        return F.max_pool2d(y.flip(2, 3)[:, :, 1:], 2).flip(2, 3)

    monkeypatch.setattr(helpers, "our_block", last_wins)
    tensors, grad = integer_tensors(BLOCK, torch.float32)
    with pytest.raises(AssertionError, match="differ from exact whole numbers"):
        assert_block(BLOCK, tensors, grad, plan="auto", exact=True)
