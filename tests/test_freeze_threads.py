"""The threads of frozen programs: many callers at a time, as many as torch has."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import needs_extension
from torch import nn

import cnnlstm_fast as cf

pytestmark = needs_extension


@pytest.fixture
def frozen():
    """Convolutions, a product and two recurrent layers that several threads share, and its results."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(2), nn.Linear(196, 130),
        nn.LSTM(130, 128, 2, batch_first=True),
    ).eval()  # fmt: skip
    with torch.no_grad():
        found = cf.freeze(model, torch.randn(1, 3, 28, 28))
    assert found._versions, found.why_not
    inputs = [torch.randn(batch, 3, 28, 28) for batch in (1, 2, 5)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = [found(x)[0] for x in inputs]
    torch.set_num_threads(before)
    yield found, inputs, expected
    torch.set_num_threads(before)


@torch.no_grad()
def test_any_number_of_threads(frozen):
    found, inputs, expected = frozen
    for threads in (2, 7, 3, 1, 16):
        torch.set_num_threads(threads)
        for _ in range(3):
            for x, y in zip(inputs, expected, strict=True):
                torch.testing.assert_close(found(x)[0], y, rtol=1e-5, atol=1e-6)


def test_many_callers_at_a_time(frozen):
    found, inputs, expected = frozen
    torch.set_num_threads(3)
    wrong = []

    def call():
        with torch.no_grad():
            for _ in range(20):
                for x, y in zip(inputs, expected, strict=True):
                    if not torch.allclose(found(x)[0], y, rtol=1e-5, atol=1e-6):
                        wrong.append(x.shape)

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
