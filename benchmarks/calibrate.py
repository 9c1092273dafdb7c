"""How long one of each thing takes on this machine: races of every plan, and the rates that explain them.

Random blocks, half of them like the field's (:mod:`benchmarks.blocks`) and half of sizes that nobody listed,
run by every plan in turn. The rates of a plan are those that make the logarithm of predicted over measured
time small (a robust least-squares fit, :func:`scipy.optimize.least_squares`); none can be negative.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from math import exp, log, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cnnlstm_fast as cf
from benchmarks.blocks import IMAGE_CHANNELS, Block, Side, batch_for, draw_block, plan_of
from benchmarks.calibrate_epilogue import Row, fit_epilogues
from benchmarks.calibrate_fit import Clock, fit
from cnnlstm_fast.functional.conv_block import CallPlan, plan_call
from cnnlstm_fast.ops import conv_fft
from cnnlstm_fast.planning import costs, rates
from cnnlstm_fast.planning.choose import PLANS, least
from cnnlstm_fast.planning.problem import ConvProblem, Sizes, conv_problem
from cnnlstm_fast.planning.rates import Rates
from cnnlstm_fast.spec import BlockSpec, Pool, map_size

#: Milliseconds that a block takes by PyTorch, about: between these.
_LEAST_MS, _MOST_MS = 0.1, 6.0
#: Elements of a map at most.
_MOST_ELEMENTS = 4e7
#: Rounds, and seconds of a plan's turn in one.
_ROUNDS, _TURN_S = 4, 0.003
#: Kernels up to this side are never worth a Fourier transform, and racing one takes long.
_LEAST_FFT_KERNEL = 7


@dataclass(frozen=True)
class Race:
    """Every plan on one block.

    Attributes:
        block: what ran.
        mode: ``"inference"`` or ``"training"``.
        channels_last: whether the input lay channels-last.
        needs_x: whether the gradient of the input was asked for.
        dtype: name of the dtype.
        forward, backward: milliseconds by plan, the least of all calls, to which others' work can only add.
            Plans that cannot run it are missing.
        tuned: what ``cnnlstm_fast.tune`` chose, where it was asked.
        threads: how many ran; None stands for those of the process that asks.
    """

    block: Block
    mode: str
    channels_last: bool
    needs_x: bool
    dtype: str
    forward: dict[str, float]
    backward: dict[str, float]
    tuned: str | None = None
    threads: int | None = None

    def total(self, plan: str) -> float:
        """Milliseconds of both ways."""
        return self.forward[plan] + self.backward[plan]

    def problem(self) -> ConvProblem:
        """What the planner is asked."""
        block, training = self.block, self.mode == "training"
        pool, layout = None, block.layout
        if block.pool is not None and block.pool[0] == "Max":
            pool = Pool(*(_two(sizes, fill) for sizes, fill in zip(block.pool[1:], (1, 1, 0), strict=True)))
        elif block.pool is not None:  # PyTorch's own, behind the block
            layout = "channels_last" if len(block.size) == 2 else "channels_first"
        spec = BlockSpec(
            _two(block.stride, 1),
            _two(block.padding, 0),
            (1, 1),
            block.groups,
            block.activation,
            pool,
            layout,
        )
        norm = None if not block.norm else "batch" if training else "folded"
        shape = torch.Size((block.batch, block.channels, *_two(block.size, 1)))
        weight = torch.Size((block.out_channels, block.channels // block.groups, *_two(block.kernel, 1)))
        sizes = Sizes(spec, shape, weight, getattr(torch, self.dtype), "cpu", norm)
        threads = self.threads or torch.get_num_threads()
        return conv_problem(sizes, training, self.needs_x, self.channels_last, threads)


def _two(sizes: tuple[int, ...], fill: int) -> tuple[int, int]:
    """Of a signal as of an image of one row."""
    return (fill, *sizes)[-2:]  # type: ignore[return-value]


def _draw_unlisted(rng: random.Random) -> dict:
    """Sizes from wide ranges, of every kind of convolution."""

    def between(low: int, high: int) -> int:
        return round(exp(rng.uniform(log(low), log(high))))

    kind = rng.choice(("dense",) * 4 + ("pointwise", "depthwise", "grouped", "strided", "image", "long"))
    channels = rng.choice((8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512))
    out_channels = rng.choice((8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512))
    k, stride, groups = rng.choice((2, 3, 3, 3, 3, 4, 5, 7)), 1, 1
    if kind == "image":
        channels, stride, k = (
            rng.choice((1, 1, 2, 3, 3, 4, 6, 9)),
            rng.choice((1, 1, 2)),
            rng.choice((3, 5, 7, 8, 11)),
        )
    elif kind == "pointwise":
        k = 1
    elif kind == "strided":
        stride, k = 2, rng.choice((1, 3, 3, 4, 5))
    elif kind == "depthwise":
        groups, out_channels = channels, channels * rng.choice((1, 1, 2))
        stride, k = rng.choice((1, 1, 2)), rng.choice((3, 3, 5, 7))
    elif kind == "grouped":
        groups = rng.choice((2, 4, 8))
        channels, out_channels = (-(-c // groups) * groups for c in (channels, out_channels))
    kernel: tuple[int, ...]
    if rng.random() < 0.28:
        size: tuple[int, ...] = (between(16, 4000),)
        kernel = (rng.choice((9, 15, 25, 31, 51, 64, 101)) if kind == "long" else k,)
        window = rng.choice((None, None, ((2,), (2,), (0,)), ((3,), (2,), (1,)), ((4,), (4,), (0,))))
        layout = rng.choice(
            ("channels_first", "channels_first", "locations", "locations", "locations_time_major")
        )
    else:
        size, kernel = (between(4, 112), between(4, 160)), (k, k)
        if kind == "long":
            long = rng.choice((9, 11, 15, 21, 31))
            kernel = rng.choice(((1, long), (long, 1), (5, long)))
        elif rng.random() < 0.15:
            kernel = rng.choice(((1, k), (k, 1)))
        window = rng.choice((
            None, None, ((2, 2), (2, 2), (0, 0)), ((2, 2), (2, 2), (0, 0)), ((2, 1), (2, 1), (0, 0)),
            ((1, 2), (1, 2), (0, 0)), ((1, 4), (1, 4), (0, 0)), ((3, 3), (2, 2), (1, 1)),
            ((4, 4), (4, 4), (0, 0)), ((2, 2), (2, 1), (0, 1)),
        ))  # fmt: skip
        layouts = ("features", "rows", "columns", "locations", "columns_time_major")
        layout = rng.choice(("channels_first",) * 3 + ("channels_last",) * 2 + layouts)
    return dict(
        channels=channels, size=size, out_channels=out_channels, kernel=kernel,
        stride=(stride,) * len(size) if rng.random() < 0.8 else (1, stride)[-len(size) :],
        padding=tuple(side // 2 for side in kernel) if rng.random() < 0.8 else (0,) * len(size),
        groups=groups, norm=rng.random() < 0.4, pool=window and ("Max", *window), layout=layout,
        activation=rng.choice(
            ("relu",) * 4 + (None, "leaky_relu", "hardtanh", "elu", "tanh", "silu", "gelu", "sigmoid")
        ),
    )  # fmt: skip


def draw(
    count: int, seed: int, unlisted: float = 0.5, ms: tuple[float, float] = (_LEAST_MS, _MOST_MS)
) -> list[tuple[Block, bool]]:
    """``count`` random blocks, and whether their input lies channels-last; the same for a seed everywhere.

    Args:
        count: how many.
        seed: of the draws.
        unlisted: share of blocks that are like no model's.
        ms: milliseconds that a block takes by PyTorch, about: between these.
    """
    rng = random.Random(seed)
    found: list[tuple[Block, bool]] = []
    while len(found) < count:
        if rng.random() < unlisted:
            block = Block("unlisted", 1, **_draw_unlisted(rng))
        else:
            block = draw_block(rng)
        if min(block.conv_size) < 1 or (block.pool is not None and not _pools(block)):
            continue
        batch = max(batch_for(block, exp(rng.uniform(log(ms[0]), log(ms[1])))), 1)
        if batch <= 2048 and batch * block.out_channels * prod(block.conv_size) <= _MOST_ELEMENTS:
            last = len(block.size) == 2 and rng.random() < 0.4
            if last and rng.random() < 0.7:  # as maps that are carried
                block = replace(block, layout="channels_last")
            found.append((replace(block, batch=batch), last))
    return found


def _pools(block: Block) -> bool:
    """Whether the pool's window fits the map."""
    assert block.pool is not None
    _, kernel, _, padding = block.pool
    return all(s + 2 * p >= k for s, k, p in zip(block.conv_size, kernel, padding, strict=True))


def race(
    block: Block,
    mode: str,
    channels_last: bool,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    tune: bool = False,
    clock: Clock = time.perf_counter,
) -> Race:
    """Run every plan of a block in turn.

    Args:
        block: what runs.
        mode: ``"inference"`` or ``"training"``.
        channels_last: how the input lies.
        seed: of weights and inputs.
        dtype: of both.
        tune: also let ``cnnlstm_fast.tune`` choose, anew.
        clock: seconds, of the wall or of this process's own work.
    """
    training = mode == "training"
    generator = torch.Generator().manual_seed(seed)
    weights = {name: w.to(dtype) for name, w in block.weights(generator).items()}
    x = torch.randn(block.shape, generator=generator).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    needs_x = training and block.channels > IMAGE_CHANNELS
    grad: Tensor | None = None
    sides, grads = {}, {}
    for plan in PLANS:
        if plan == "fft" and max(block.kernel) < _LEAST_FFT_KERNEL:
            continue
        side = Side(block, _by_plan(plan), weights, training)
        try:
            with torch.inference_mode(not training):
                y = side.call(x.detach().requires_grad_(needs_x), **side.weights)
        except ValueError:  # cannot run here
            continue
        if training:
            if grad is None:
                grad = torch.randn(y.shape, generator=generator).to(dtype)
            grads[plan] = torch.empty_like(y).copy_(grad)  # as the next layer's backward would lay it out
        sides[plan] = side
    forward: dict[str, list[float]] = {plan: [] for plan in sides}
    backward: dict[str, list[float]] = {plan: [] for plan in sides}
    plans = list(sides)
    for turn in range(_ROUNDS):
        first = turn % len(plans)
        for plan in plans[first:] + plans[:first]:
            times = list(_turn(sides[plan], x, grads.get(plan), needs_x, clock))[1:]
            forward[plan] += [f for f, _ in times]
            backward[plan] += [b for _, b in times]

    def ms(times: dict[str, list[float]]) -> dict[str, float]:
        return {plan: round(1e3 * min(found), 5) for plan, found in times.items()}

    tuned = None
    if tune:
        with cf.tune(), torch.set_grad_enabled(training):
            side = Side(block, cf.functional.conv_block, weights, training)
            tuned, *_ = plan_of(side.call, x.detach().requires_grad_(needs_x), side.weights)
    kinds = channels_last, needs_x, str(dtype)[6:]
    return Race(block, mode, *kinds, ms(forward), ms(backward), tuned, torch.get_num_threads())


def _by_plan(plan: str) -> Callable[..., Tensor]:
    """``conv_block`` by one plan, which is looked up once: a later call costs what a known one does."""
    known: list[CallPlan] = []

    def run(x, weight, bias=None, *, stride, padding, groups, norm, activation, pool, layout):
        if plan == "reference":
            return cf.reference.conv_block(
                x, weight, bias, stride=stride, padding=padding, groups=groups, norm=norm,
                activation=activation, pool=pool, layout=layout,
            )  # fmt: skip
        if not known:
            args = stride, padding, 1, groups, norm, activation, pool, layout
            known.append(plan_call(x, weight, bias, *args, plan))
        return known[0].run(x, weight, bias, norm, pool)

    return run


def _turn(
    side: Side, x: Tensor, grad: Tensor | None, needs_x: bool, clock: Clock
) -> Iterator[tuple[float, float]]:
    """Seconds forward and backward of two calls and more."""
    end = clock() + _TURN_S
    count = 0
    while count < 2 or clock() < end:
        count += 1
        if grad is None:
            with torch.inference_mode():
                start = clock()
                y = side.call(x, **side.weights)
                del y
                yield clock() - start, 0.0
            continue
        for weight in side.weights.values():
            weight.grad = None
        given = x.detach().requires_grad_(needs_x)
        start = clock()
        y = side.call(given, **side.weights)
        between = clock()
        y.backward(grad)
        del y
        yield between - start, clock() - between


#: Milliseconds of the blocks that show which terms there are.
_SHOWN_MS = 300.0


def _complete(plans: dict[str, dict[str, dict[str, float]]], dtype: str) -> None:
    """Give a rate to terms that no race had: of larger tensors no more, of other kinds the slowest."""
    for block, channels_last in draw(2000, seed=0, ms=(_LEAST_MS, _SHOWN_MS)):
        for mode, needs_x in (("inference", False), ("training", False), ("training", True)):
            problem = Race(block, mode, channels_last, needs_x, dtype, {}, {}).problem()
            for plan, ways in plans.items():
                for way, count in zip(ways.values(), costs.COUNTS[plan], strict=True):
                    for term in count(problem).keys() - way.keys():
                        begin, products, _ = term.partition("products")
                        alike = [rate for other, rate in way.items() if other.startswith(begin + products)]
                        way[term] = max(alike, default=0.0) if products else 0.0


#: What a plan does in a call.
Count = Callable[[ConvProblem], dict[str, float]]


def fit_plans(
    races: list[Race],
    prior: Mapping[str, Any],
    threads: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Rates by plan and way.

    Args:
        races: of one dtype.
        prior: rates likewise, or empty.
        threads: for which the rates are.
    """
    problems = [race.problem() for race in races]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for plan, (forward, backward) in costs.COUNTS.items():
        ran = [(race, p) for race, p in zip(races, problems, strict=True) if plan in race.forward]
        if not ran:
            continue

        def counted(count: Count, p: ConvProblem) -> dict[str, float]:
            return costs.shared(count(p), threads / p.threads)

        rows = {
            "forward": [(counted(forward, p), 1e6 * race.forward[plan]) for race, p in ran],
            "backward": [(counted(backward, p), 1e6 * race.backward[plan]) for race, p in ran if p.training],
        }
        found[plan] = {way: fit(row, prior.get(plan, {}).get(way, {})) for way, row in rows.items()}
    _complete(found, races[0].dtype)
    return {
        plan: {way: dict(sorted(rates.items())) for way, rates in ways.items()}
        for plan, ways in found.items()
    }


#: How far (of a logarithm) the rates of tilings are disturbed; how many disturbed ones cut each convolution;
#: how many are compared, and of how many of the best the middle is taken.
_DISTURBED, _CUT_BY, _COMPARED, _BEST = 1.0, 8, 400, 20

#: One way to cut a convolution: what it does (:func:`cnnlstm_fast.ops.conv_fft.counts`), and its seconds.
Cut = tuple[dict[str, float], float]


def race_tilings(count: int, seed: int, clock: Clock = time.perf_counter) -> list[list[Cut]]:
    """Random convolutions with large kernels by ``conv_fft``, each cut in several ways."""
    rng, usual = random.Random(seed), conv_fft.rates
    found = []
    for _ in range(count):
        if rng.random() < 0.4:
            kernel, size = (1, rng.choice((15, 25, 31, 51, 64, 101))), (1, rng.randrange(200, 2500))
            stride = (1, rng.choice((1, 1, 2)))
        else:
            kernel = rng.choice(((11, 11), (15, 15), (7, 21), (9, 31), (21, 11), (41, 11)))
            size = rng.randrange(40, 120), rng.randrange(60, 200)
            stride = rng.choice(((1, 1), (2, 1), (2, 2)))
        batch, channels, c_out = rng.choice((1, 2, 4)), rng.choice((1, 16, 32, 64)), rng.choice((16, 32, 64))
        conv = (*stride, kernel[0] // 2, kernel[1] // 2, 1, 1, 1)
        x, weight = torch.randn(batch, channels, *size), torch.randn(c_out, channels, *kernel)
        out = torch.empty(batch, *map_size(size, kernel, conv), c_out)
        call = partial(conv_fft.forward_op, x, weight, None, conv, out)
        cuts: dict[conv_fft.Tiling, Cut] = {}
        try:
            for given in disturbed(usual(), rng, _CUT_BY):
                conv_fft.rates = partial(dict, given)
                conv_fft.tiling_of.cache_clear()
                cut = conv_fft.tiling(size, kernel, batch, channels, c_out, conv)
                if cut not in cuts:
                    cuts[cut] = conv_fft.counts(cut, batch, channels, c_out), min(_seconds(call, clock))
        finally:
            conv_fft.rates = usual
            conv_fft.tiling_of.cache_clear()
        found.append([*cuts.values()])
    return found


def disturbed(given: Mapping[str, float], rng: random.Random, count: int) -> Iterator[dict[str, float]]:
    """``given``, and then others around it, ``count`` in all."""
    yield dict(given)
    for _ in range(count - 1):
        yield {term: ns * exp(rng.gauss(0, _DISTURBED)) for term, ns in given.items()}


def fit_tilings(races: list[list[Cut]], given: Mapping[str, float], seed: int = 0) -> dict[str, float]:
    """Rates around ``given`` by which the cheapest cut takes least time over the fastest one's."""

    def loss(tried: Mapping[str, float]) -> float:
        chosen = [min(cuts, key=lambda cut: costs.nanoseconds(cut[0], tried)) for cuts in races]
        pairs = zip(chosen, races, strict=True)
        return sum(log(cut[1] / min(seconds for _, seconds in cuts)) for cut, cuts in pairs)

    best = sorted(disturbed(given, random.Random(seed), _COMPARED), key=loss)[:_BEST]
    first = next(iter(given))  # a cut depends on their ratios alone
    return {
        term: float(f"{given[first] * exp(sum(log(r[term] / r[first]) for r in best) / len(best)):.3g}")
        for term in given
    }


def _seconds(call: Callable[[], object], clock: Clock) -> Iterator[float]:
    for _ in range(_ROUNDS + 1):
        start = clock()
        call()
        yield clock() - start


def content(
    races: list[Race],
    tilings: list[list[Cut]],
    epilogues: dict[str, dict[str, list[Row]]],
    device: str,
    prior: Rates | None,
) -> dict[str, Any]:
    """What a file of rates holds.

    Args:
        races: of blocks.
        tilings: of :func:`race_tilings`; their rates are those in use where there are none.
        epilogues: by dtype, of :func:`benchmarks.calibrate_epilogue.race_epilogues`; likewise.
        device: in words.
        prior: other rates, where the races leave a term open.
    """
    threads = max(race.problem().threads for race in races)
    usual = rates.here()
    own = usual if usual.name == rates.name_here() else None
    kept = prior or own  # with rates of dtypes that were not raced
    plans = {} if kept is None else dict(kept.plans)
    for dtype in sorted({race.dtype for race in races}):
        kind = rates.kind(getattr(torch, dtype))
        begin = {} if prior is None else prior.plans.get(kind, {})
        plans[kind] = fit_plans([race for race in races if race.dtype == dtype], begin, threads)
    found = {
        "schema": rates.SCHEMA,
        "device": device,
        "threads": threads,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "races": len(races),
        "tilings": fit_tilings(tilings, usual.tilings) if tilings else usual.tilings,
        "epilogues": usual.epilogues,
        "plans": dict(sorted(plans.items())),
    }
    return with_epilogues(found, epilogues) if epilogues else found


def with_epilogues(content: dict[str, Any], epilogues: dict[str, dict[str, list[Row]]]) -> dict[str, Any]:
    """A file's content with the rates of other races of epilogues."""
    passes = {rates.kind(getattr(torch, dtype)): fit_epilogues(rows) for dtype, rows in epilogues.items()}
    return content | {
        "epilogues": content["epilogues"] | passes, "epilogues_date": date.today().isoformat()
    }  # fmt: skip


def write_races(path: Path, races: Iterable[Race]) -> None:
    """A line of JSON for each race, so that rates can be fitted again without racing."""
    path.write_text("".join(json.dumps(asdict(race)) + "\n" for race in races))


def read_races(path: Path) -> list[Race]:
    """What :func:`write_races` wrote."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    races = [json.loads(line) for line in path.read_text().splitlines()]
    for race in races:
        race["block"] = Block(**{name: tuples(value) for name, value in race["block"].items()})
    return [Race(**race) for race in races]


@dataclass(frozen=True)
class Regret:
    """What choosing by prediction costs over knowing, on some races.

    Attributes:
        mode, dtype: of the races.
        rates: name of those by which plans were chosen.
        races: how many.
        mean, worst: time of the chosen plan over the fastest one's, as a geometric mean and at most.
        over_pytorch: the most that the chosen plan takes over PyTorch's operators.
        pytorch: the same mean for PyTorch's operators alone.
        lines: the worst ones, in words.
    """

    mode: str
    dtype: str
    rates: str
    races: int
    mean: float
    worst: float
    over_pytorch: float
    pytorch: float
    lines: list[str]


def regret(races: list[Race], given: Rates, *, shown: int = 10) -> Regret:
    """How well ``given`` rates choose among plans that were all raced; races of one mode and dtype."""
    found = []
    for race in races:
        chosen = race.tuned or least(costs.predict(race.problem(), given, race.forward)).forward
        best = min(map(race.total, race.forward))
        taken = race.total(chosen)
        found.append((taken / best, taken / race.total("reference"), race, chosen))
    found.sort(key=lambda one: -one[0])
    lines = [
        f"{ratio:.2f} {race.mode}, {race.dtype}: {chosen}; "
        + ", ".join(f"{plan} {race.total(plan):.3g} ms" for plan in race.forward)
        + f": {race.block.describe()}{', channels-last input' if race.channels_last else ''}"
        for ratio, _, race, chosen in found[:shown]
    ]
    theirs = [race.total("reference") / min(map(race.total, race.forward)) for race in races]
    return Regret(
        mode=races[0].mode,
        dtype=races[0].dtype,
        rates=given.name,
        races=len(races),
        mean=exp(sum(log(ratio) for ratio, *_ in found) / len(found)),
        worst=found[0][0],
        over_pytorch=max(over for _, over, *_ in found),
        pytorch=exp(sum(map(log, theirs)) / len(theirs)),
        lines=lines,
    )


def run(
    count: int,
    seed: int,
    dtypes: Iterable[torch.dtype],
    tell: Callable[[int], None],
    unlisted: float = 0.5,
    tune: bool = False,
    clock: Clock = time.perf_counter,
) -> list[Race]:
    """Race every plan of ``count`` random blocks in both modes and each dtype; ``tell`` how many are done."""
    races: list[Race] = []
    for dtype in dtypes:
        for at, (block, channels_last) in enumerate(draw(count, seed, unlisted)):
            for mode in ("inference", "training"):
                races.append(
                    race(block, mode, channels_last, seed=seed + at, dtype=dtype, tune=tune, clock=clock)
                )
                tell(len(races))
    return races


def write(path: Path, found: dict[str, Any]) -> None:
    """The file of rates, as :func:`cnnlstm_fast.planning.rates.read` reads it."""
    path.write_text(json.dumps(found, indent=1) + "\n")
