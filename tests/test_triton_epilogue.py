"""The Triton kernels of the op ``epilogue``: in the interpreter, and compiled on a CUDA device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import assert_close_as_torch
from interpreted import interpreter_and_cuda, kernels_of, launch_in_bounds
from test_epilogue import SHAPES, eager, inside, norm_of, ours, results

from cnnlstm_fast.ops import epilogue as op
from cnnlstm_fast.spec import canonical_stages


@interpreter_and_cuda
def kernels(request):
    """The kernels on a device, in place of the ops."""

    def make(module, device):
        def moved(function):
            def call(*args):
                if device == "cpu":
                    return function(*args, run=launch_in_bounds)
                args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
                found = function(*args)
                return found.cpu() if isinstance(found, torch.Tensor) else [t.cpu() for t in found]

            return call

        names = {"forward_op": module.forward, "backward_op": module.backward, "moments_op": module.moments}
        return mock.patch.multiple(op, **{name: moved(function) for name, function in names.items()})

    for patch in kernels_of("epilogue", request.param, make):
        with patch:
            yield


@pytest.mark.some(16)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["image", "channels", "signal", "rows", "volume"])
@pytest.mark.parametrize(
    "program",
    ["n", "nr", "n+r", "n+l", "n+h", "+r", "rn", "ln", "tn", "rnr", "en+l", "ns+", "gn", "mn", "wnd"],
)
def test_epilogue_as_torch(kernels, program, name, last, training):
    shape = SHAPES[name]
    tensors = {"z": inside(shape, last) + 0.5} | ({"added": inside(shape, last)} if "+" in program else {})
    norm, alpha = norm_of(shape, training), 0.75 if training else 1.0
    grad = torch.randn(shape)
    true = {k: t.double() for k, t in tensors.items()}
    exact = results(eager, program, true, norm, alpha, grad.double())
    torchs = results(eager, program, tensors, norm, alpha, grad)
    found = results(ours, program, tensors, norm, alpha, grad)
    for k in exact:
        assert_close_as_torch(found[k], torchs[k], exact[k], k)


@pytest.mark.parametrize("program", ["n+r", "rn", "+l", "wn", "dn"])
@pytest.mark.parametrize("last", [False, True])
def test_specials(kernels, program, last):
    shape = (2, 5, 6, 7)
    z, added, grad = inside(shape, last), inside(shape, last), torch.randn(shape)
    z[0, 0, 0, 0], z[1, 1, 2, 3], added[0, 2, 1, 1] = float("nan"), float("inf"), float("nan")
    z[:, 4] = added[:, 4] = 0
    z[0, 3, 0, 0] = -5
    grad[0, 3:, 0, 0] = float("inf")
    tensors = {"z": z} | ({"added": added} if "+" in program else {})
    norm = norm_of(shape, False)
    norm.bias.data[4] = 0
    torchs = results(eager, program, tensors, norm, 1.0, grad)
    found = results(ours, program, tensors, norm, 1.0, grad)
    for k in torchs:
        assert torch.equal(found[k].isnan(), torchs[k].isnan()), k
        assert torch.equal(found[k].isinf(), torchs[k].isinf()), k


def test_stages_in_order():
    assert canonical_stages([0, 1, 3]) == [None, None, 2]
    assert canonical_stages([3, 0, 4, 1, 5]) == [0, 2, 4]
    assert canonical_stages([3]) == [None, 0, None]
    assert canonical_stages([3, 4]) is None
