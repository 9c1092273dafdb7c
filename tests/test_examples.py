"""The examples: small and short, but all of what they do."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cnnlstm_fast as cf

pytest.importorskip("gymnasium", reason="the agent's environment: pip install gymnasium")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "cartpole_memory.py"
    spec = importlib.util.spec_from_file_location("cartpole_memory", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cartpole_memory"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cartpole_memory"]


def test_both_agents_learn_the_same(example):
    """A rollout of the stream and of single steps, and one round of learning, agree."""
    found = []
    for lstm_type in (cf.LSTM, nn.LSTM):
        training = example.Training(lstm_type, seed=3)
        rollout = training.act()
        assert rollout.began[1:].any()  # episodes end inside
        before = copy.deepcopy(training.agent.state_dict())
        with torch.no_grad():
            logits, values = training.agent.learn(rollout.seen, rollout.began, rollout.state)
        torch.testing.assert_close(values, rollout.values, rtol=1e-4, atol=1e-5)
        training.learn(rollout)
        assert any((before[n] != t).any() for n, t in training.agent.state_dict().items())
        found.append((rollout.seen, rollout.actions, logits, training.agent.lstm.weight_hh_l0.detach()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_advantages(example):
    """The sum of discounted errors up to the end of the episode, written out."""
    steps, many = example.ROLLOUT, example.ENVIRONMENTS
    began = torch.rand(steps, many) < 0.1
    rollout = example.Rollout(
        *(torch.zeros(steps, many, 2), began, torch.zeros(steps, many), torch.zeros(steps, many)),
        *(torch.randn(steps, many), torch.randn(steps, many), (), torch.rand(many) < 0.5, torch.randn(many)),
    )
    values = torch.cat([rollout.values, rollout.next_value[None]]).double()
    over = torch.cat([began, rollout.next_began[None]])[1:]
    expected = torch.zeros(steps, many, dtype=torch.float64)
    for b in range(many):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                after = 0.0 if over[k, b] else example.DISCOUNT * values[k + 1, b]
                expected[t, b] += weight * (rollout.rewards[k, b] + after - values[k, b])
                if over[k, b]:
                    break
                weight *= example.DISCOUNT * example.TRACE
    torch.testing.assert_close(rollout.advantages().double(), expected, rtol=1e-4, atol=1e-4)
