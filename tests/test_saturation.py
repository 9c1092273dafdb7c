"""Gates of a recurrent layer driven to their ends: no value of a pre-activation gives NaN."""

import pytest
import torch
from torch import nn

import cnnlstm_fast as cf


@pytest.mark.instruction_sets
@pytest.mark.parametrize("name, gate", [*(("LSTM", g) for g in range(4)), *(("GRU", g) for g in range(3))])
def test_a_gate_saturates_as_in_pytorch(name, gate):
    """Every hundredth from -150 to 150, past where e^x overflows and where it becomes denormal."""
    values = torch.cat([torch.arange(-150, 150, 0.01), torch.tensor([-1e30, 1e30])])
    plain, fast = getattr(nn, name)(1, 1), getattr(cf, name)(1, 1)
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
        plain.weight_ih_l0[gate] = 1
    fast.load_state_dict(plain.state_dict())
    x = values.view(1, -1, 1)
    h = torch.rand(1, len(values), 1)
    hx = (h, torch.randn_like(h)) if name == "LSTM" else h
    for training in (False, True):
        with torch.set_grad_enabled(training):
            expected, _ = plain(x, hx)
            found, _ = fast(x, hx)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        if training:
            found.sum().backward()
            assert all(p.grad.isfinite().all() for p in fast.parameters())
