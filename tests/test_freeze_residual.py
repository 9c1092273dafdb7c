"""Residual sums of frozen models: added in the convolution before them, on packed weights."""

from __future__ import annotations

import copy

import pytest
import torch
from field_models import freshen
from helpers import UNIT, assert_close_as_torch, needs_extension
from public_models import ResidualRecogniser
from torch import Tensor, nn

import cnnlstm_fast as cf
from cnnlstm_fast.freeze.plans import PACKED

pytestmark = needs_extension


def blocks_of(frozen) -> list[dict]:
    (version,) = frozen._versions
    return [node for node in version.data["nodes"] if node["op"] == "block"]


def assert_equal_to(model: nn.Module, frozen: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    exact = copy.deepcopy(model).double()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for shape in shapes:
                x = torch.randn(shape).to(next(model.parameters()).dtype)
                got, plain = frozen(x), model(x)
                assert got.stride() == plain.stride() or 1 in got.shape
                assert_close_as_torch(got, plain, exact(x.double()), str(shape))
                x.view(-1)[:: x.numel() // 3 + 1] = float("inf")
                # PyTorch's convolution in bfloat16 multiplies infinities beyond a window by zeros.
                nan, either = frozen(x).isnan(), (model(x).isnan(), exact(x.double()).isnan())
                assert torch.equal(nan, either[0]) or torch.equal(nan, either[1])
    finally:
        torch.set_num_threads(before)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@dtypes
@torch.no_grad()
def test_a_residual_recogniser(dtype):
    model = freshen(ResidualRecogniser(width=16, hidden=5, classes=6)).eval().to(dtype)
    frozen = cf.freeze(model, torch.randn(3, 1, 32, 24).to(dtype))
    adding = [node for node in blocks_of(frozen) if node["added"]]
    assert len(adding) == 4 and all(node["activation"] == "relu" for node in adding)
    assert not any(node["op"] == "sum" for node in frozen._versions[0].data["nodes"])
    assert_equal_to(model, frozen, [(3, 1, 32, 24), (1, 1, 32, 36), (17, 1, 32, 20)])


class Sums(nn.Module):
    """Sums behind convolutions in several ways: (B, 12, H, W), or (B, 12, L), of the same size."""

    def __init__(self, signal: bool, activation: nn.Module, pool: bool):
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if signal else (nn.Conv2d, nn.BatchNorm2d)
        self.first = nn.Sequential(conv(12, 12, 3, padding=1), norm(12))
        self.second = conv(12, 12, 1, bias=False)
        self.third = conv(12, 12, 5, padding=2, groups=3)
        self.last = conv(12, 12, 3, padding=1)
        self.activation = activation
        self.pool = (nn.MaxPool1d if signal else nn.MaxPool2d)(3, 1, 1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.activation(x + self.first(x)))  # the input itself
        y = self.activation(self.second(y) + self.third(y))  # two convolutions
        y = y + self.last(y) + 0.5 * self.last(y)  # a layer twice, once with a factor
        return self.first(y) + y.mean(1, keepdim=True)  # not of the same size


@pytest.mark.some(4)
@pytest.mark.parametrize("signal", [True, False])
@pytest.mark.parametrize(("activation", "pool"), [(nn.ReLU(), True), (nn.GELU(), False), (nn.ELU(0.7), True)])
@dtypes
@torch.no_grad()
def test_sums_of_all_kinds(signal, activation, pool, dtype):
    model = freshen(Sums(signal, activation, pool)).eval().to(dtype)
    image = (17,) if signal else (7, 9)
    frozen = cf.freeze(model, torch.randn(2, 12, *image).to(dtype))
    assert sum(node["added"] is not None for node in blocks_of(frozen)) == 3
    for plan in PACKED if dtype is torch.float32 else ["packed library", *["packed"] * bool(UNIT)]:
        for node in blocks_of(frozen):
            grouped = dtype is torch.bfloat16 and node["conv"][6] > 1  # which the unit does not take
            node["plans"] = [[1.0, "packed library" if grouped else plan]]
        frozen.refresh()
        assert_equal_to(
            model,
            frozen,
            [(2, 12, *image), (1, 12, *(s + 4 for s in image)), (5, 12, *image), (2, 12, *image[1:], 1)],
        )


@torch.no_grad()
def test_a_stream_with_residual_sums():
    """Causal convolutions whose sums wait for nothing."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(6, 6, 3), nn.GRU(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = (x + self.conv(nn.functional.pad(x, (2, 0)))).relu()
            return self.head(y.transpose(1, 2))[0]

    model = Causal().eval()
    frozen = cf.freeze(model, torch.randn(2, 6, 20))
    assert blocks_of(frozen)[0]["added"]
    stream, x = frozen.stream(2), torch.randn(2, 6, 41)
    found = torch.cat([stream(chunk) for chunk in x.split([1, 7, 20, 13], 2)], 1)
    torch.testing.assert_close(found, model(x), rtol=0, atol=1e-6)
