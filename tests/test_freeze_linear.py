"""Linear layers of frozen models: packed once, their activation in the same pass, a packing for all uses."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from helpers import assert_close_as_torch, needs_extension
from torch import Tensor, nn

import cnnlstm_fast as cf

pytestmark = needs_extension

ACTIVATIONS = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.25), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.Tanh(),
    nn.Sigmoid(), nn.SiLU(), nn.Softplus(2.0, 5.0), nn.GELU(), nn.GELU("tanh"), nn.Mish(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Softsign(),
]  # fmt: skip


def ops_of(frozen) -> list[str]:
    (version,) = frozen._versions
    return [node["op"] for node in version.data["nodes"]]


@torch.no_grad()
def test_layers_and_activations_of_all_kinds():
    """Odd sizes, one row to many, on one thread and two; NaN and infinities where PyTorch has them."""
    sizes = [1, 7, 33, 130, 64, 97, 16, 3, 48, 31, 5, 65, 40, 21, 17, 34, 600]
    layers = [
        part
        for i, (a, b) in enumerate(pairwise(sizes))
        for part in (nn.Linear(a, b, bias=i % 3 != 1), ACTIVATIONS[i])
    ]
    model = nn.Sequential(*layers).eval()
    frozen = cf.freeze(model, torch.randn(3, 1))
    assert ops_of(frozen).count("linear") == 16
    called = {n.get("name") for n in frozen._versions[0].data["nodes"]}
    assert not {"aten::relu", "aten::gelu", "aten::mish", "aten::hardswish"} & called
    exact = copy.deepcopy(model).double()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 13, 14, 15, 17, 64):
                x = torch.randn(rows, 1)
                assert_close_as_torch(frozen(x), model(x), exact(x.double()), f"{rows} rows")
    finally:
        torch.set_num_threads(before)
    wild = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [1.0]])
    assert torch.equal(frozen(wild).isnan(), model(wild).isnan())
    assert frozen(torch.randn(0, 1)).shape == (0, 600)


class Shapes(nn.Module):
    """A layer on a vector's rank up to four dimensions, on memory in another order, and twice."""

    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Linear(2050, 33), nn.Linear(33, 2050)

    def forward(self, x: Tensor):
        y = self.wide(x.transpose(0, 1)).relu()
        again = self.wide(self.back(y)).tanh()
        return y, again, self.wide(x[0, 0]), self.wide(x.unsqueeze(0))


@torch.no_grad()
def test_shapes_strides_and_shared_weights():
    model = Shapes().eval()
    frozen = cf.freeze(model, torch.randn(3, 2, 2050))
    assert ops_of(frozen).count("linear") == 5
    exact = copy.deepcopy(model).double()
    for batch in (1, 3, 17):
        x = torch.randn(batch, 2, 2050)
        for a, b, c in zip(frozen(x), model(x), exact(x.double()), strict=True):
            assert a.stride() == b.stride()
            assert_close_as_torch(a, b, c, f"batch {batch}")


@torch.no_grad()
def test_new_weights_and_other_dtypes():
    """A refresh packs anew, in bfloat16 too; double runs by PyTorch, with its results."""
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    frozen = cf.freeze(model, torch.randn(3, 20))
    x = torch.randn(5, 20)
    old = frozen(x)
    model[0].weight.mul_(2)
    assert torch.equal(frozen(x), old)
    frozen.refresh()
    assert_close_as_torch(frozen(x), model(x), copy.deepcopy(model).double()(x.double()), "refreshed")
    other = copy.deepcopy(model).double()
    assert torch.equal(cf.freeze(other, x.double())(x.double()), other(x.double()))
    other, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    frozen = cf.freeze(other, x)
    for _ in range(2):
        assert_close_as_torch(frozen(x), other(x), copy.deepcopy(other).double()(x.double()), "bfloat16")
        other[2].weight.mul_(-3)
        frozen.refresh()
    assert ops_of(frozen) == ["linear", "linear"]


@torch.no_grad()
def test_a_prelu_of_one_slope_is_part_of_its_layer(tmp_path):
    """Its slope is a weight: a refresh reads it again, a file keeps it."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1), nn.PReLU(5),
        nn.Flatten(), nn.Linear(45, 7), nn.PReLU(),
    ).eval()  # fmt: skip
    frozen = cf.freeze(model, torch.randn(2, 3, 8, 8))
    assert ops_of(frozen).count("block") == 2
    called = [n.get("name") for n in frozen._versions[0].data["nodes"]]
    assert called.count("aten::prelu") == 1  # that of five slopes
    x = torch.randn(4, 3, 8, 8)
    x[0, 0, 0, 0], x[1, 2, 3, 4] = float("nan"), float("inf")
    for slope in (0.25, -0.5, 0.0):
        model[2].weight.fill_(slope), model[8].weight.fill_(0.5 - slope)
        frozen.refresh()
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        frozen.save(tmp_path / "model")
        for fast in (frozen, cf.load_frozen(tmp_path / "model")):
            found = fast(x)
            assert torch.equal(found.isnan(), expected.isnan())
            finite = expected.isfinite()
            assert_close_as_torch(found[finite], expected[finite], exact[finite], f"slope {slope}")


@pytest.mark.parametrize("plan", ["packed", "packed winograd"])
@torch.no_grad()
def test_blocks_keep_what_their_plan_reads(plan):
    """By either packed plan, with the other's weights left out; NaN in the input included."""
    model = nn.Sequential(nn.Conv2d(16, 40, 3, padding=1), nn.ReLU()).eval()
    frozen = cf.freeze(model, torch.randn(2, 16, 9, 11))
    for node in frozen._versions[0].data["nodes"]:
        if node["op"] == "block":
            node["plans"] = [[1.0, plan]]
    frozen.refresh()
    for shape in ((2, 16, 9, 11), (1, 16, 3, 3)):
        x = torch.randn(shape)
        assert_close_as_torch(frozen(x), model(x), copy.deepcopy(model).double()(x.double()), plan)
        x[0, 1, 1, 1] = float("nan")
        assert torch.equal(frozen(x).isnan(), model(x).isnan())
