"""A fuzzer of programs: ``python tests/programs.py --programs 20000 --seed S --seconds T --output FILE``.

Random Python programs are written by program_writer.py: a module with a forward as people write them, what
may happen between a convolution and the end of its block, and a driver that calls the model several times.
Each runs plain, accelerated and, one in :data:`COMPILED`, compiled with our backend. Of as many the model
runs frozen in inference, without what else happens: in float32, in bfloat16, where the plain one is cast to
that, or in int8, where PyTorch quantizes it. All that can be seen must be the same: results, strides,
gradients, buffers, inputs, what hooks saw, kept values, answers to questions of identity, exceptions.
What fails is shrunk and printed as a script of its own.

Numbers follow the rule of helpers.py: twice PyTorch's own error against float64 plus 16 eps. A program fails
only if it does so with two drawings of its data, since a rounding that moves a pool's winner would not.
A crash is a finding too: programs run in a child process, which writes to a journal what it begins.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import itertools
import json
import logging
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # who imports this for its judge keeps the usual sizes
    os.environ.setdefault("CNNLSTM_FAST_LEAST", "1")

import torch
import torch._dynamo  # here, so that no child has to
from program_writer import (
    EVAL,
    LOWER,
    PRELUDE_CODE,
    Frozen,
    Lowered,
    Program,
    Writer,
    begin_at_any_size,
    labels,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cnnlstm_fast as cf
from benchmarks.results import Device

ROOT = Path(__file__).resolve().parents[1]
#: Of how many programs one is compiled, the first half of its calls, and one frozen: both take seconds.
COMPILED = 20
#: Seconds after which a program counts as hanging.
PATIENCE = 120


# ---------------------------------------------------------------- running them

GLOBAL_HOOKS = [v for name, v in vars(nn.modules.module).items() if re.match("_global_.*ward.*hooks", name)]


def plain(model: nn.Module) -> nn.Module:
    return model


def compiled(backend: str) -> Callable[[nn.Module], nn.Module]:
    def wrap(model):
        torch._dynamo.reset()
        model.compile(backend=backend)
        return model

    return wrap


class Seen(list[tuple[str, Any]]):
    """What a program lets see, by name; ``places`` are the lines of the program that raised, in order."""

    places: list[list[int]]


@contextlib.contextmanager
def nudged_convolutions(nudged: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let convolutions round otherwise."""
    own = {cls: cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d)}
    for cls, forward in own.items():
        cls._conv_forward = lambda *args, forward=forward: nudged(forward(*args))
    try:
        yield
    finally:
        for cls, forward in own.items():
            cls._conv_forward = forward


def execute(code, wrap, seed: int, dtype: torch.dtype = torch.float32, nudge: float = 0.0) -> Seen:
    """What is seen when a program runs with a model that ``wrap`` has made of its own.

    Args:
        code: of the program.
        wrap: what makes the model that runs of a plain one.
        seed: of its data.
        dtype: of its data and weights.
        nudge: the relative size of noise on its data, its weights and what its convolutions give.
    """
    space = sys.modules["program"] = types.ModuleType("program")
    exec(PRELUDE_CODE, space.__dict__)
    space.__dict__.update(SEED=seed, DTYPE=dtype, NUDGE=nudge)
    exec(code, space.__dict__)
    space.NOISE.manual_seed(seed + int(nudge * 1e12))
    with nudged_convolutions(space.nudged) if nudge else contextlib.nullcontext(), space.caught():
        space.drive(wrap)
    for hooks in GLOBAL_HOOKS:
        hooks.clear()
    torch.set_grad_enabled(True)
    found = Seen(space.seen)
    found.places = space.places
    return found


def far(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of a difference; infinite where NaN or infinities stand elsewhere."""
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return float("inf")
    return (mine[finite].double() - theirs[finite].double()).norm().item()


#: What writes past the version counter: a backward after that, PyTorch's own too, reads what was not meant.
UNSEEN_WRITES = re.compile(r"\.data\b|numpy\(\)|asarray|from_dlpack|inference_mode|raw\(|_storage\(\)")
#: What writes past PyTorch's operators may be refused, where its values are used as in no call before.
UNSEEN_BY_OPERATORS = re.compile(r"numpy\(\)\[|\.data = ")


class MisreadNorms(TorchDispatchMode):
    """Notes whether PyTorch's own backward of a norm is wrong.

    It is for gradients of some other strides, and where running statistics have changed since the forward
    that read them: counting a batch moves no version.
    """

    def __init__(self):
        super().__init__()
        self.happened = False
        self.given: dict[int, torch.Tensor] = {}  # statistics by where they lie, as a forward first read them

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.native_batch_norm.default and not args[5]:
            for t in args[3:5]:
                self.given.setdefault(t.data_ptr(), t.clone())
        if function is torch.ops.aten.native_batch_norm_backward.default:
            grad, x, *rest = args
            if not rest[5]:
                self.happened |= any(not torch.equal(self.given.get(t.data_ptr(), t), t) for t in rest[1:3])
            right = function(torch.empty_like(x).copy_(grad), x, *rest)
            pairs = [(a, b) for a, b in zip(found, right, strict=True) if a is not None]
            self.happened |= any(far(a, b) > 0.01 * b.double().norm() for a, b in pairs)
        return found


def _is_nothing(gradient: Any) -> bool:
    """Whether it is no gradient or zeros, between which second derivatives may choose."""
    return gradient is None or (isinstance(gradient, tuple) and not gradient[2].any())


#: Names of values whose size says how large the terms of a gradient are.
_TERMS = ("gradient", "parameter")


class Judge:
    """Compares what was seen with what a plain run sees.

    Args:
        code, source: of the program.
        seed: of its data.
        low: it computes in low precision.
        frozen: results may require no gradient where the model's do, as those of frozen models.
        usual: what makes of the program's model the one to compare with.
    """

    def __init__(self, code, seed: int, low: bool, source: str = "", frozen: bool = False, usual=plain):
        self.code, self.seed, self.frozen, self.usual = code, seed, frozen, usual
        self.steps = "optimizer.step" in source.partition("def drive")[2]
        # Who reads a map that is handed on in its own layout without asking gets results that lie as it does.
        self.compares_strides = "vmap(" not in source
        # Without gradients what an optimizer's step leads to is no more to be compared.
        self.compares_gradients = UNSEEN_WRITES.search(source) is None
        self.may_refuse = UNSEEN_BY_OPERATORS.search(source) is not None
        self.eps = torch.finfo(torch.bfloat16 if low else torch.float32).eps
        # Where every value is rounded to this, 16 eps would hide anything.
        self.slack = (16 if usual is plain else 1) * self.eps
        self.plain = execute(code, usual, seed)
        self.ways: list[Seen] = []
        self.largest = 0.0  # of what gradients are sums of: one that cancels is as exact as its terms
        for name, value in self.plain:
            if isinstance(value, tuple) and value[2].is_floating_point() and name.startswith(_TERMS):
                norm = value[2][value[2].isfinite()].double().norm().item()
                self.largest = max(self.largest, norm)

    def difference(self, seen: Seen) -> tuple[str, str] | None:
        """What differs first, as its kind and in words; not gradients that PyTorch itself has wrong."""
        found = self.differs(seen)
        if found and found[0] == "other values" and self.compares_gradients:
            with MisreadNorms() as misread:
                execute(self.code, plain, self.seed)
            if misread.happened:
                self.compares_gradients = False
                found = self.differs(seen)
        return found

    def differs(self, seen: Seen) -> tuple[str, str] | None:
        """What differs first."""
        if not self.compares_gradients and self.steps:
            return None
        end, places = len(self.plain), zip(self.plain.places, seen.places, strict=False)
        pairs = itertools.zip_longest(self.plain, seen, fillvalue=("the end", None))
        for at, ((name, value), (other, found)) in enumerate(pairs):
            if name == "raised in backward" or (name == "raised" != other and value is RuntimeError):
                end = at  # what PyTorch refuses may work; and it leaves gradients half done
                break
            if self.may_refuse and name != other == "raised" and found is RuntimeError:
                end = at
                break
            if name != other:
                what = f"{found.__name__} is raised" if "raised" in other else f"{other!r} is seen"
                return "raises" if "raised" in other + name else "other answers", f"{what} where {name!r} was"
            if name == "raised":
                place, other_place = next(places)
                if value is RuntimeError and place != other_place:
                    end = at  # what PyTorch refuses worked, and the program went on to another error
                    break
                if not issubclass(found, value):
                    return "raises", f"{found.__name__} is raised where {value.__name__} was"
            elif not (isinstance(value, tuple) and isinstance(found, tuple)):
                if name.startswith("gradient") and _is_nothing(value) and _is_nothing(found):
                    continue
                if type(value) is not type(found) or value != found:
                    return "other answers", f"{name}: {found!r} where {value!r} was"
            elif why := self.unlike(name, value, found):
                return "other answers", f"{name}: {why}"
        for at, ((name, value), (_, found)) in enumerate(zip(self.plain[:end], seen, strict=False)):
            if name.startswith("gradient") and not self.compares_gradients:
                continue
            if (
                isinstance(value, tuple)
                and isinstance(found, tuple)
                and (why := self.wrong(at, name, found[2]))
            ):
                return "other values", f"{name}: {why}"
        return None

    def unlike(self, name: str, value: tuple, found: tuple) -> str | None:
        required = found[0] or (self.frozen and value[0])
        for what, one, two in (
            ("needs a gradient", value[0], required), ("dtype", value[2].dtype, found[2].dtype),
            ("shape", value[2].shape, found[2].shape), ("strides", value[1], found[1]),
        ):  # fmt: skip
            # C code may see a map that is handed on in its own layout, which nobody can notice.
            free = name.startswith(("gradient", "dlpack", "raw")) or not self.compares_strides
            if one != two and not (what == "strides" and free):
                return f"{what}: {two} where {one} was"
        return None

    def wrong(self, at: int, name: str, mine: torch.Tensor) -> str | None:
        value = self.plain[at][1][2]
        if not value.is_floating_point():
            return None if torch.equal(mine, value) else f"{mine.tolist()} where {value.tolist()} was"
        floor = self.largest if name.startswith("gradient") else 0.0
        slack = self.slack * max(value.double().norm().nan_to_num(0, 0, 0).item(), floor)
        if far(mine, value) <= slack:  # so it is within the rule too
            return None
        if not self.ways:
            self.ways = [execute(self.code, plain, self.seed, torch.float64)]
            for steps in (0.3, 0.5, 0.7, 1, 2, 4):
                self.ways.append(execute(self.code, self.usual, self.seed, nudge=steps * self.eps))
            self.ways = [way for way in self.ways if [n for n, _ in way] == [n for n, _ in self.plain]]
        ways = [value, *(v[2] for way in self.ways if isinstance(v := way[at][1], tuple))]
        ways = [way for way in ways if way.shape == value.shape]
        true = next((way for way in ways if way.dtype == torch.float64), value)
        error, own = far(mine, true), max(far(way, true) for way in ways)
        if error <= 2 * own + slack:
            return None
        return f"off by {error:.3g} where PyTorch's own error is {own:.3g}, of {value.double().norm():.3g}"


def fused(model: nn.Module) -> bool:
    """Whether a block of a convolution ran as one."""
    sites = model.report().sites if hasattr(model, "report") else ()
    return any(site.block.startswith("Conv") and site.plan != "PyTorch" for site in sites)


class Runner:
    """Runs programs in all modes, and counts."""

    def __init__(self, accelerate: Callable[[nn.Module], nn.Module] = cf.accelerate) -> None:
        self.accelerate = accelerate
        self.counts: collections.Counter[str] = collections.Counter()

    def fails(self, program: Program, mode: str, seeds: int = 2) -> tuple[str, str] | None:
        """How a program differs under a mode, if it does so with every drawing of its data."""
        source = program.source()
        lower = LOWER.get(mode)
        if mode in LOWER and EVAL not in source:  # a frozen model is always in eval mode
            return None
        try:
            code = compile(source, "<program>", "exec")
        except SyntaxError:  # of something shrunk
            return None
        models: list[nn.Module] = []

        def accelerated(model):
            models.append(self.accelerate(model))
            return models[-1]

        def frozen(model):
            models.append(Frozen(model, lower))
            return models[-1]

        def lowered(model):
            return Lowered(model, lower)

        wrap = {"accelerate": accelerated, "compile": compiled("cnnlstm_fast")}.get(mode, frozen)
        usual, low = (plain, "bfloat16" in source) if lower is None else (lowered, True)
        difference = None
        for seed in range(program.seed, program.seed + seeds):
            judge = Judge(code, seed, low, source, mode in LOWER, usual)
            difference = judge.difference(execute(code, wrap, seed))
            if models and seed == program.seed:
                frozen = isinstance(models[0], Frozen)
                self.counts["one program"] += frozen and models[0].whole
                self.counts["fused"] += not frozen and fused(models[0])
            if difference is None:
                return None
            if mode == "compile" and judge.difference(execute(code, compiled("eager"), seed)):
                self.counts["dynamo differs"] += seed == program.seed
                return None
        return difference

    def shrink(self, program: Program, mode: str, kind: str, patience: int = 300) -> Program:
        """The smallest program found that fails in the same manner."""
        tried, smaller = 0, True
        while smaller and tried < patience:
            smaller = False
            for candidate in program.smaller():
                tried += 1
                dies = kind in ("crashes", "hangs")
                found = isolated(self.fails, candidate, mode) if dies else self.fails(candidate, mode)
                if (found[0] if found else None) == kind:
                    program, smaller = candidate, True
                    break
                if tried >= patience:
                    break
        return program


def isolated(function, *args):
    """The result of a call in a child process; how that died, if it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        os.write(writing, pickle.dumps(function(*args)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        sent = file.read()
    status = os.waitpid(child, 0)[1]
    if status or not sent:
        return ("hangs" if status == signal.SIGALRM else "crashes"), f"status {status}"
    return pickle.loads(sent)


def run_plain(program: Program) -> None:
    """The program without anything of ours."""
    execute(compile(program.source(), "<program>", "exec"), plain, program.seed)


# ---------------------------------------------------------------- the loop

#: Programs of one child process.
BATCH = 200


def work(asked, first: int, last: int, end: float, file, journal: Path) -> None:
    """Run programs in this process, a line of JSON for each; up to ``asked.most`` that fail."""
    warnings.simplefilter("ignore")
    torch._logging.set_logs(all=logging.CRITICAL)
    runner, failed = Runner(), 0
    for at in range(first, last):
        if time.monotonic() > end or failed >= asked.most:
            return
        runner.counts.clear()
        findings: list[dict] = []
        for mode, program in programs_of(Writer(asked.seed * 10**6 + at).write(), at, asked):
            journal.write_text(json.dumps({"at": at, "mode": mode}) + "\n" + program.script(mode))
            signal.alarm(PATIENCE)
            difference = runner.fails(program, mode)
            signal.alarm(0)
            runner.counts[mode] += 1
            if difference:
                kind = difference[0]
                counts = runner.counts.copy()
                findings.append(
                    finding(at, mode, kind, program if asked.whole else runner.shrink(program, mode, kind))
                )
                runner.counts = counts
        failed += len(findings)
        print(json.dumps({"at": at, "counts": runner.counts, "findings": findings}), file=file, flush=True)


def programs_of(program: Program, at: int, asked) -> Iterator[tuple[str, Program]]:
    """The modes in which the program of a number runs, and as what."""
    if not asked.frozen_only:
        yield "accelerate", program
        if at % asked.compiled == 0:
            yield "compile", replace(program, drive=program.drive[: len(program.drive) // 2])
    if asked.frozen_only or at % asked.compiled == asked.compiled // 2:
        plain_model = program.frozen()
        if plain_model is not None:
            modes = [*LOWER]
            for mode in modes if asked.frozen_only else (modes[at // asked.compiled % len(modes)],):
                yield mode, plain_model


def finding(at: int, mode: str, kind: str, program: Program) -> dict:
    """What is told of a program that fails."""
    difference = isolated(Runner().fails, program, mode)
    parts = labels(program.init) | labels(program.forward) | labels(program.drive)
    return {
        "program": at, "mode": mode, "kind": kind, "with": sorted(parts),
        "difference": difference and difference[1], "script": program.script(mode),
    }  # fmt: skip


def loop(asked) -> Iterator[dict]:
    """A record for each program; a child that dies leaves one too."""
    end, at, journal = time.monotonic() + asked.seconds, asked.first, asked.journal
    records = journal.with_suffix(".jsonl")
    while at < asked.first + asked.programs and time.monotonic() < end:
        last = min(at + BATCH, asked.first + asked.programs)
        journal.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            try:
                with open(records, "w") as file:
                    work(asked, at, last, end, file, journal)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        for line in records.read_text().splitlines():
            yield (record := json.loads(line))
            at = record["at"] + 1
        if os.WIFSIGNALED(status):
            at, mode = json.loads(journal.read_text().splitlines()[0]).values()
            program, kind = Writer(asked.seed * 10**6 + at).write(), "crashes"
            if isolated(run_plain, program):
                yield {"at": at, "counts": {"PyTorch itself crashes or hangs": 1}, "findings": []}
                at += 1
                continue
            if os.WTERMSIG(status) == signal.SIGALRM:
                kind = "hangs"
            elif not asked.whole:
                program = Runner().shrink(program, mode, kind, 100)
            yield {"at": at, "counts": {mode: 1}, "findings": [finding(at, mode, kind, program)]}
            at += 1
        elif status:
            raise SystemExit(f"the fuzzer itself failed; {journal} has the program")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=20000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CNNLSTM_FAST_SEED", "0")))
    parser.add_argument("--first", type=int, default=0, help="the program to begin with")
    parser.add_argument("--compiled", type=int, default=COMPILED, help="compile and freeze one of so many")
    parser.add_argument("--frozen-only", action="store_true", help="freeze all models, and nothing else")
    parser.add_argument("--most", type=int, default=10, help="stop after so many that fail")
    parser.add_argument("--whole", action="store_true", help="do not shrink")
    parser.add_argument("--journal", type=Path, default=ROOT / "build" / "program.py")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "programs.json", help="is added to")
    asked = parser.parse_args()
    for path in (asked.journal, asked.output):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN, as in all tests
    begin_at_any_size()
    start, ran, findings = time.monotonic(), 0, []
    counts: collections.Counter[str] = collections.Counter()
    for record in loop(asked):
        ran += 1
        counts.update(record["counts"])
        for found in record["findings"]:
            findings.append(found)
            print(
                f"# program {found['program']}, {found['mode']}: {found['difference']}\n{found['script']}",
                flush=True,
            )
        if len(findings) >= asked.most:
            break
    seconds = time.monotonic() - start
    classes: dict[str, dict] = {}
    for found in findings:
        key = f"{found['mode']}: {found['kind']}, {' and '.join(found['with']) or 'nothing'}"
        if key not in classes:
            classes[key] = {"programs": 0, "first": found["program"]} | found
        classes[key]["programs"] += 1
        if len(found["script"]) < len(classes[key]["script"]):
            classes[key] |= found
    git = ["git", "log", "-1", "--format=%h", "--", "cnnlstm_fast", "csrc", "kernels"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    result = {
        "date": str(datetime.date.today()), "package of": commit.stdout.strip(),
        "device": vars(Device.here()), "torch": torch.__version__,
        "python": platform.python_version(), "seed": asked.seed, "programs": ran, "seconds": round(seconds),
        "programs a second": round(ran / seconds, 1), "failed": len({f["program"] for f in findings}),
        "counts": dict(sorted(counts.items())), "classes": dict(sorted(classes.items())),
    }  # fmt: skip
    runs = json.loads(asked.output.read_text()) if asked.output.exists() else []
    asked.output.write_text(json.dumps([*runs, result], indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "classes"}))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
