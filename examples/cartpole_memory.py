"""A recurrent PPO agent balances a pole whose velocities it cannot see.

    python examples/cartpole_memory.py [--seed 0] [--steps 400000]

CartPole without velocities needs memory: the LSTM works them out from positions. While acting, a stream
takes one step of all environments per call; while learning, one call runs whole rollouts, and ``reset``
begins anew where an episode ended inside. PyTorch's own LSTM needs a loop over time for that: at the end
the same agent runs that way for a few rollouts, and both speeds are printed.

Needs gymnasium: pip install gymnasium
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

import cnnlstm_fast as cf

ENVIRONMENTS, ROLLOUT = 16, 128
EPOCHS, MINIBATCHES = 6, 4
DISCOUNT, TRACE = 0.98, 0.9  # of rewards, and of generalised advantages (lambda)
CLIP, VALUE_WEIGHT, MAX_NORM = 0.2, 0.5, 0.5
LEARNING_RATE = 7e-4
HIDDEN = 64
SCALE = torch.tensor([2.0, 10.0])  # brings position (m) and angle (rad) to about one
SOLVED = 475.0  # mean return of 100 episodes, as the environment's authors have it
State = tuple[Tensor, Tensor]


class Agent(nn.Module):
    """Positions -> features -> LSTM -> action logits and value."""

    def __init__(self, lstm_type: type[nn.RNNBase]):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh())
        self.lstm = lstm_type(HIDDEN, HIDDEN)
        self.actor = nn.Linear(HIDDEN, 2)
        self.critic = nn.Linear(HIDDEN, 1)
        for module, gain in ((self.body[0], 2**0.5), (self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(module.weight, gain)
            nn.init.zeros_(module.bias)
        for name, p in self.lstm.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)

    def heads(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(memory), self.critic(memory).squeeze(-1)

    def learn(self, seen: Tensor, began: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Logits and values of a rollout ``seen`` (T, B, 2), whose episodes begin where ``began`` (T, B)."""
        features = self.body(seen)
        if isinstance(self.lstm, cf.LSTM):
            return self.heads(self.lstm(features, state, reset=began)[0])
        outs = []
        for x, new in zip(features, began, strict=True):
            keep = (~new).to(x.dtype)[None, :, None]
            out, state = self.lstm(x[None], (state[0] * keep, state[1] * keep))
            outs.append(out)
        return self.heads(torch.cat(outs))

    def acting(self, state: State) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], State]]:
        """``(features, began) -> memory`` for one step after another, and what gives the state then."""
        if isinstance(self.lstm, cf.LSTM):
            stream = self.lstm.stream(ENVIRONMENTS, state)
            return lambda x, began: stream(x, reset=began), lambda: stream.state
        held = [state]

        def step(x: Tensor, began: Tensor) -> Tensor:
            keep = (~began).to(x.dtype)[None, :, None]
            out, held[0] = self.lstm(x[None], tuple(s * keep for s in held[0]))
            return out[0]

        return step, lambda: held[0]


@dataclass
class Rollout:
    """What happened in T steps of B environments; all (T, B), ``seen`` (T, B, 2)."""

    seen: Tensor
    began: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    state: State  # before the first step
    next_began: Tensor  # (B,)
    next_value: Tensor  # (B,)

    def advantages(self) -> Tensor:
        """Generalised advantage estimation (Schulman et al., 2016)."""
        out = torch.zeros_like(self.rewards)
        running = torch.zeros(ENVIRONMENTS)
        value, began = self.next_value, self.next_began
        for t in reversed(range(ROLLOUT)):
            goes_on = (~began).float()
            error = self.rewards[t] + DISCOUNT * value * goes_on - self.values[t]
            running = error + DISCOUNT * TRACE * goes_on * running
            out[t] = running
            value, began = self.values[t], self.began[t]
        return out


class Training:
    """An agent, its environments and its optimizer."""

    def __init__(self, lstm_type: type[nn.RNNBase], seed: int):
        torch.manual_seed(seed)
        self.agent = Agent(lstm_type)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
        self.environments = gymnasium.make_vec(
            "CartPole-v1",
            num_envs=ENVIRONMENTS,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
        )
        self.seen = self._positions(self.environments.reset(seed=seed)[0])
        self.began = torch.ones(ENVIRONMENTS, dtype=torch.bool)
        self.state: State = tuple(torch.zeros(1, ENVIRONMENTS, HIDDEN) for _ in range(2))
        self.returns: deque[float] = deque(maxlen=100)
        self._running = np.zeros(ENVIRONMENTS)

    @staticmethod
    def _positions(observations: np.ndarray) -> Tensor:
        return torch.from_numpy(observations[:, [0, 2]]) * SCALE

    @torch.no_grad()
    def act(self) -> Rollout:
        """Play T steps."""
        step, state_now = self.agent.acting(self.state)
        first_state, rows = self.state, []
        for _ in range(ROLLOUT):
            logits, values = self.agent.heads(step(self.agent.body(self.seen), self.began))
            log_probs = logits.log_softmax(-1)
            actions = (torch.rand(ENVIRONMENTS) < log_probs[:, 1].exp()).long()
            observations, rewards, ended, stopped, _ = self.environments.step(actions.numpy())
            taken = log_probs.gather(-1, actions[:, None]).squeeze(-1)
            scaled = torch.from_numpy(rewards).float() * (1 - DISCOUNT)  # values of about one
            rows.append((self.seen, self.began, actions, taken, values, scaled))
            self._running += rewards
            over = ended | stopped
            self.returns.extend(self._running[over].tolist())
            self._running[over] = 0
            self.seen, self.began = self._positions(observations), torch.from_numpy(over)
        self.state = state_now()
        next_values = self.agent.heads(step(self.agent.body(self.seen), self.began))[1]
        return Rollout(*map(torch.stack, zip(*rows, strict=True)), first_state, self.began, next_values)

    def learn(self, rollout: Rollout) -> None:
        """PPO's clipped objective (Schulman et al., 2017) over whole sequences of some environments."""
        advantages = rollout.advantages()
        targets = advantages + rollout.values
        for _ in range(EPOCHS):
            for some in torch.randperm(ENVIRONMENTS).chunk(MINIBATCHES):
                state = tuple(s[:, some] for s in rollout.state)
                logits, values = self.agent.learn(rollout.seen[:, some], rollout.began[:, some], state)
                log_probs = logits.log_softmax(-1)
                taken = log_probs.gather(-1, rollout.actions[:, some, None]).squeeze(-1)
                ratio = (taken - rollout.log_probs[:, some]).exp()
                gain = advantages[:, some]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                better = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
                value_loss = F.mse_loss(values, targets[:, some])
                loss = VALUE_WEIGHT * value_loss - better
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), MAX_NORM)
                self.optimizer.step()

    def run(self, most_steps: int, report: Callable[[int, float, float], None]) -> tuple[int, float]:
        """Train until solved or for so many steps; returns (steps, seconds)."""
        begin, steps = time.perf_counter(), 0
        while steps < most_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - steps / most_steps)
            self.learn(self.act())
            steps += ROLLOUT * ENVIRONMENTS
            mean = float(np.mean(self.returns)) if self.returns else 0.0
            report(steps, mean, time.perf_counter() - begin)
            if len(self.returns) == self.returns.maxlen and mean >= SOLVED:
                break
        return steps, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400_000, help="give up after so many")
    arguments = parser.parse_args()

    def report(steps: int, mean: float, seconds: float) -> None:
        print(
            f"\r{steps:7d} steps  mean return {mean:5.1f}  {steps / seconds:6.0f} steps/s", end="", flush=True
        )

    training = Training(cf.LSTM, arguments.seed)
    steps, seconds = training.run(arguments.steps, report)
    solved = len(training.returns) == 100 and np.mean(training.returns) >= SOLVED
    print(f"\n{'solved' if solved else 'not solved'} after {steps} steps and {seconds:.0f} seconds")
    fast = steps / seconds
    steps, seconds = Training(nn.LSTM, arguments.seed).run(4 * ROLLOUT * ENVIRONMENTS, lambda *_: None)
    print(f"with cf.LSTM {fast:.0f} steps/s, with nn.LSTM in a loop {steps / seconds:.0f} steps/s")
    if not solved:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
