"""The race: verify, then let everyone run in turn, then compare within rounds.

1. Verify. Every contestant's result (in training, every parameter gradient too) is compared with
   float64 eager on fresh inputs. A peer passes at ``PEER_ERROR``; the fast model passes by the
   project's rule, twice PyTorch's own error plus 16 eps of the true norm. A fast model that fails
   is not timed: :class:`WrongResult`. A peer that fails, or cannot be prepared, is left out by name.
2. Run. Each round draws fresh inputs and gives every contestant one turn, in an order that rotates
   from round to round: a pause, an uncounted call, then calls over the round's inputs. A call ends
   when its result has been released, since whoever calls in a loop pays for that as well. The
   garbage collector is off meanwhile. A turn's time is the median of its calls.
3. Compare. A ratio is a peer's turn over ours in the same round, so that whatever slows the machine
   for a while slows both sides; its p20, p50 and p80 are taken over the rounds. The best peer is
   the one with the lowest median among those whose result belongs to the caller.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import LEARNING_RATE, Batch, Case
from benchmarks.peers import PEERS, Forward, Peer, eager

OURS = "cnnlstm_fast"
#: Relative error allowed to a peer: any float32 order of summation and Winograd pass, TF32 and
#: bfloat16 do not.
PEER_ERROR = 1e-4

#: Lets the last contestant's threads stop spinning.
PAUSE_S = 0.02


class WrongResult(Exception):
    """The fast model's result is not what the rule allows, so there is nothing to time."""


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(*(float(v) for v in np.quantile(values, (0.2, 0.5, 0.8))))


@dataclass(frozen=True)
class Standing:
    """How one contestant did.

    Attributes:
        name: the peer's name, or :data:`OURS`.
        ms: of one call, over all counted calls.
        ratio: its time over ours, paired within rounds.
        error: the largest error against float64, as a share of the true norm.
        lent: whether its result is overwritten by its next call.
    """

    name: str
    ms: Spread
    ratio: Spread
    error: float
    lent: bool = False


@dataclass(frozen=True)
class Result:
    """One case's race.

    Attributes:
        case: its name.
        standings: ours first, then the peers as raced.
        best: name of the fastest peer whose result belongs to the caller.
        left_out: peers that did not race, and why.
        gflops: our arithmetic rate, where the case gives its operations.
        others_cpu: share of the machine that other processes used meanwhile.
        seed, rounds: to run the same inputs again.
        targets: as the case has them.
        bytes: what a call must move at least: input, parameters that it uses and result, each once.
        parameter_bytes: those of the parameters.
    """

    case: str
    standings: list[Standing]
    best: str
    left_out: dict[str, str]
    gflops: float | None
    others_cpu: float
    seed: int
    rounds: int
    targets: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    parameter_bytes: int | None = None

    def standing(self, name: str) -> Standing:
        """The standing of a peer, of :data:`OURS`, or of the ``"best"`` peer."""
        name = self.best if name == "best" else name
        return next(s for s in self.standings if s.name == name)


class Contestant:
    """A prepared peer, or the fast model: ``run(batch)`` is what is timed."""

    def __init__(self, name: str, case: Case, model: nn.Module, prepare, x: Tensor, lent: bool = False):
        self.name, self.case, self.lent = name, case, lent
        self.model = model.train(case.training)
        with torch.set_grad_enabled(case.training):
            self.forward: Forward = prepare(case, self.model, x)
        self.optimizer = None
        if case.training and case.head is not None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)

    def run(self, batch: Batch) -> Tensor:
        """One call: inference, or forward and backward (and the optimizer's step for a whole model)."""
        if not self.case.training:
            with torch.inference_mode():
                return self.forward(batch.x)
        self.model.zero_grad(set_to_none=True)
        batch.x.grad = None
        y = self.forward(batch.x)
        if self.optimizer is None:
            y.backward(batch.target)
        else:
            F.cross_entropy(y, batch.target).backward()
            self.optimizer.step()
        return y

    def results(self, batch: Batch) -> dict[str, Tensor]:
        """What one call computes, by name: the output and, in training, the parameter gradients."""
        found = {"output": self.run(batch).detach().clone()}
        if self.case.training:
            grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            if batch.x.grad is not None:
                grads["the input"] = batch.x.grad
            found |= {f"gradient of {n}": g.detach().clone() for n, g in grads.items()}
        return found


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error over the norm of the truth, by tensor; infinite where a tensor is missing.

    A truth that is zero but for float64's own rounding, as the gradient of a bias before a batch norm,
    gives the norm of the error itself.
    """
    out = {}
    norms = {name: float(torch.linalg.vector_norm(t)) for name, t in true.items()}
    zero = 1e-12 * max(norms.values())
    for name, t in true.items():
        if name not in found or found[name].shape != t.shape:
            out[name] = float("inf")
            continue
        error = float(torch.linalg.vector_norm(found[name].double() - t))
        out[name] = error / norms[name] if norms[name] > zero else error
    return out


def limits_as_torch(ways: list[dict[str, float]]) -> dict[str, float]:
    """What the rule allows, by tensor: twice PyTorch's worst way plus 16 eps of the true norm."""
    floor = 16 * torch.finfo(torch.float32).eps
    return {name: 2 * max(way[name] for way in ways) + floor for name in ways[0]}


def exceeding(found: dict[str, float], limits: dict[str, float]) -> str | None:
    """The first tensor whose error is over its limit (or not a number), in words."""
    for name, limit in limits.items():
        if not found[name] <= limit:
            return f"the {name} is off by {found[name]:.2e} of its norm, allowed are {limit:.2e}"
    return None


def _truth(case: Case, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    target = batch.target
    if target is not None and target.is_floating_point():
        target = target.double()
    x = batch.x.detach().double().requires_grad_(batch.x.requires_grad)
    twin = Contestant("float64", case, copy.deepcopy(model).double(), eager, x)
    return twin.results(Batch(x, target))


def _leaves(y: Tensor) -> set[Tensor]:
    """The parameters that ``y`` was computed with."""
    found, seen, nodes = set(), set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(node.variable)
    return found


class Verified:
    """A case whose contestants are ready and right.

    Attributes:
        contestants: ours first.
        errors: the largest of each contestant.
        left_out: peers that are not ready or not right, and why.
        bytes: of input, parameters that are used and result together.
        parameter_bytes: of those parameters.

    Raises:
        WrongResult: the fast model breaks the rule.
    """

    def __init__(self, case: Case, seed: int, tell: Callable[[str], None] = lambda what: None):
        reference, fast = (model.train(case.training) for model in case.build())
        generator = torch.Generator().manual_seed(seed)
        shape_of = case.forward(reference, torch.zeros(case.shape))
        self.parameter_bytes = sum(p.nbytes for p in _leaves(shape_of))
        shape_of = shape_of.detach()
        batch = case.draw(generator, like=shape_of)
        tell("float64")
        true = _truth(case, reference, batch)
        self.like = shape_of
        self.bytes = batch.x.nbytes + shape_of.nbytes + self.parameter_bytes
        self.contestants: list[Contestant] = []
        self.errors: dict[str, float] = {}
        self.left_out: dict[str, str] = {}

        def ready(peer: Peer) -> tuple[Contestant, dict[str, float]]:
            tell(peer.name)
            model = copy.deepcopy(reference)
            contestant = Contestant(peer.name, case, model, peer.prepare, batch.x, peer.lent)
            return contestant, errors(contestant.results(batch), true)

        names = ("eager", "channels_last") if case.has_images or case.has_clips else ("eager",)
        ways = {name: ready(PEERS[name]) for name in names}
        tell(OURS)
        ours = Contestant(OURS, case, fast, eager, batch.x)
        found = errors(ours.results(batch), true)
        limits = limits_as_torch([way[1] for way in ways.values()])
        wrong = exceeding(found, limits)
        if wrong:
            raise WrongResult(f"{case.name} (seed {seed}): {wrong}; not timed")
        self._add(ours, found)
        for name in case.peers:
            why_not = PEERS[name].why_not(case)
            if why_not is None:
                try:
                    contestant, found = ways.get(name) or ready(PEERS[name])
                    why_not = exceeding(found, {n: max(PEER_ERROR, limit) for n, limit in limits.items()})
                except Exception as error:  # a peer's compiler or exporter may raise anything
                    said = str(error).strip().splitlines() or ["no message"]
                    why_not = f"{type(error).__name__}: {said[0][:200]}"
            if why_not is None:
                self._add(contestant, found)
            else:
                self.left_out[name] = why_not

    def _add(self, contestant: Contestant, found: dict[str, float]) -> None:
        self.contestants.append(contestant)
        self.errors[contestant.name] = max(found.values())


def race(
    case: Case,
    *,
    rounds: int,
    turn_s: float,
    seed: int = 0,
    inputs: int = 3,
    tell: Callable[[str], None] = lambda what: None,
    advance: Callable[[], None] = lambda: None,
) -> Result:
    """Verify a case, race it, and compare.

    Args:
        case: what to race.
        rounds: turns of each contestant.
        turn_s: seconds of counted calls that a turn aims at; it has at least one call, at most 20.
        seed: of the inputs.
        inputs: how many fresh inputs a round draws.
        tell: is told what is going on.
        advance: is called after each round.

    Raises:
        WrongResult: the fast model's result is wrong; nothing was timed.
    """
    verified = Verified(case, seed, tell)
    contestants = verified.contestants
    generator = torch.Generator().manual_seed(seed + 1)
    calls: dict[str, list[float]] = {c.name: [] for c in contestants}
    turns: dict[str, list[float]] = {c.name: [] for c in contestants}
    with cpu_of_others() as others:
        for r in range(rounds):
            batches = [case.draw(generator, like=verified.like) for _ in range(inputs)]
            gc.collect()
            at = r % len(contestants)
            for contestant in contestants[at:] + contestants[:at]:
                tell(contestant.name)
                time.sleep(PAUSE_S)
                times = turn(contestant.run, batches, turn_s)
                calls[contestant.name] += times
                turns[contestant.name].append(median(times))
            advance()
    ours = Spread.of(calls[OURS])
    return Result(
        case=case.name,
        standings=[
            Standing(
                c.name,
                Spread.of(calls[c.name]),
                paired_ratio(turns[c.name], turns[OURS]),
                verified.errors[c.name],
                c.lent,
            )
            for c in contestants
        ],
        best=best_peer({c.name: calls[c.name] for c in contestants if not c.lent and c.name != OURS}),
        left_out=verified.left_out,
        gflops=case.flops / ours.p50 / 1e6 if case.flops else None,
        others_cpu=others(),
        seed=seed,
        rounds=rounds,
        targets=case.targets,
        bytes=verified.bytes,
        parameter_bytes=verified.parameter_bytes,
    )


def turn(run: Callable, batches: list, seconds: float, *, most: int = 20) -> list[float]:
    """Milliseconds of each counted call of one turn, after one that is not counted."""
    gc.disable()
    try:
        first = _timed(run, batches[-1])
        count = min(most, max(1, round(seconds * 1e3 / first)))
        return [_timed(run, batches[i % len(batches)]) for i in range(count)]
    finally:
        gc.enable()


def _timed(run: Callable, batch) -> float:
    begin = time.perf_counter()
    run(batch)  # the result is released at once, inside the measured time
    return (time.perf_counter() - begin) * 1e3


def paired_ratio(theirs: list[float], ours: list[float]) -> Spread:
    """Their turns over ours, paired by round.

    Raises:
        ValueError: not the same number of rounds.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"got {len(theirs)} and {len(ours)} turns, expected one of each per round")
    return Spread.of([t / o for t, o in zip(theirs, ours, strict=True)])


def best_peer(times: dict[str, list[float]]) -> str:
    """The name with the lowest median time."""
    return min(times, key=lambda name: median(times[name]))


@contextmanager
def cpu_of_others() -> Iterator[Callable[[], float]]:
    """Yields a function: the share of all cores that other processes have used since."""
    me = psutil.Process()

    def busy() -> tuple[float, float]:
        t = psutil.cpu_times()
        own = me.cpu_times()
        return sum(t) - t.idle - getattr(t, "iowait", 0.0), own.user + own.system

    begin, (all_before, own_before) = time.perf_counter(), busy()

    def share() -> float:
        all_now, own_now = busy()
        spent = (time.perf_counter() - begin) * psutil.cpu_count()
        return max(0.0, (all_now - all_before) - (own_now - own_before)) / spent

    yield share
