"""What every test gets: poisoned memory, a seed of its own, two threads; which cases run; the header."""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import os
import random
import sys
import zlib

import pytest

# Idle OpenMP threads sleep instead of spinning: thousands of small calls on a busy machine would
# otherwise spend most of their time waiting for each other. Read when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

SEED = int(os.environ.setdefault("CNNLSTM_FAST_SEED", str(random.SystemRandom().randrange(10**9))))


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; runs with CNNLSTM_FAST_LONG=1")
    config.addinivalue_line(
        "markers", "first: takes long; begins early, so that nothing waits for it at the end"
    )
    config.addinivalue_line(
        "markers", "some(count): each case takes seconds; so many run, and the seed decides which"
    )
    config.addinivalue_line(
        "markers", "share(of): of each test's cases one in so many runs; the seed decides which"
    )
    config.addinivalue_line(
        "markers", "instruction_sets: repeated in a process of its own for every forced instruction set"
    )


def pytest_report_header(config):
    from cnnlstm_fast import _ext

    kernels = "compiled kernels loaded" if _ext.loaded else f"compiled kernels missing: {_ext.error}"
    forced = os.environ.get("CNNLSTM_FAST_ISA", "best")
    return f"CNNLSTM_FAST_SEED={SEED} (set it to repeat this run); {kernels}; instruction set: {forced}"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"CNNLSTM_FAST_SEED={SEED} repeats these inputs")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and os.environ.get("CNNLSTM_FAST_LONG") != "1":
            item.add_marker(pytest.mark.skip(reason="takes minutes: set CNNLSTM_FAST_LONG=1"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if os.environ.get("CNNLSTM_FAST_EVERY_CASE") != "1":
        _take_some(config, items)
        _take_combinations(config, items)
    _take_share(config, items)
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def _cases_of_tests(items):
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.path, getattr(item, "originalname", item.name)].append(item)
    return tests


def _keep(config, items, kept):
    kept = {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _take_combinations(config, items):
    """Of a test of three parameters or more, cases that together have every pair of values.

    Which of those that do, the seed decides. CNNLSTM_FAST_EVERY_CASE=1 takes the whole product; cases for a
    GPU, which run rarely, are always taken.
    """
    here = [item for item in items if hasattr(item, "callspec") and not item.get_closest_marker("gpu")]
    left_out = set()
    for (path, name), cases in _cases_of_tests(here).items():
        values = {c: [(of, id(value)) for of, value in c.callspec.params.items()] for c in cases}
        choices = collections.Counter(of for of, _ in {*itertools.chain(*values.values())})
        parameters = sum(count > 1 for count in choices.values())
        if parameters < 3:
            continue
        found = {
            c: {*itertools.combinations([v for v in of if choices[v[0]] > 1], 2)} for c, of in values.items()
        }
        missing = set().union(*found.values())
        random.Random(f"{SEED} {path.name} {name}").shuffle(cases)
        left_out.update(cases)
        for new in range(max(map(len, found.values())), 0, -1):  # first those that add most
            for case in cases:
                if len(found[case] & missing) >= new:
                    missing -= found[case]
                    left_out.discard(case)
    _keep(config, items, [item for item in items if item not in left_out])


def _take_some(config, items):
    """Of a test marked ``some`` as many cases as its marker says, of one marked ``share`` that share of them.

    Which ones, the seed decides. CNNLSTM_FAST_EVERY_CASE=1 takes all; cases for a GPU are always taken.
    """
    marked = [i for i in items if i.get_closest_marker("some") or i.get_closest_marker("share")]
    left_out = set()
    for (path, name), cases in _cases_of_tests(i for i in marked if not i.get_closest_marker("gpu")).items():
        some, share = (cases[0].get_closest_marker(of) for of in ("some", "share"))
        count = min(some.args[0], len(cases)) if some else len(cases)
        random.Random(f"{SEED} {path.name} {name}").shuffle(cases)
        left_out.update(cases[-(-count // share.args[0]) if share else count :])
    _keep(config, items, [item for item in items if item not in left_out])


def _take_share(config, items):
    """Of every test's cases one in CNNLSTM_FAST_SHARE: which ones, the seed decides."""
    share = int(os.environ.get("CNNLSTM_FAST_SHARE", "1"))
    tests = _cases_of_tests(items).values()
    _keep(config, items, [c for cases in tests for c in cases[SEED % min(share, len(cases)) :: share]])


#: How many modules there were when objects were last frozen.
FROZEN_MODULES = pytest.StashKey[int]()


def pytest_collection_finish(session):
    _freeze(session.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    try:
        return (yield)
    finally:
        _freeze(item.config)


def _freeze(config):
    """Let collections of garbage pass over what stays: all tests, and modules when many are new.

    They would take half a second each, and benchmarks ask for one in every round.
    """
    if len(sys.modules) > config.stash.get(FROZEN_MODULES, 0) + 100:
        gc.collect()
        gc.freeze()
        config.stash[FROZEN_MODULES] = len(sys.modules)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill fresh tensors, those that C++ allocates through the dispatcher too, with NaN or 255.

    ``warn_only``, because no test should start failing over an operator that is merely not
    deterministic on CUDA.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned_only)


@pytest.fixture(autouse=True)
def _fresh_state(request):
    """Seed each test by the run's seed and its own name; give each two threads."""
    seed = zlib.crc32(f"{SEED} {request.node.nodeid}".encode())
    random.seed(seed)
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:  # or it would keep a stack for every kind of device that may yet come: 3 ms
        torch.default_generator.manual_seed(seed)
    torch.set_num_threads(2)
    known = sys.modules.get("cnnlstm_fast.functional.conv_block")
    if known is not None:  # or a test that changes how plans are chosen would meet those of the test before
        known._known_calls.clear()
    yield
    torch.set_num_threads(2)


@pytest.fixture
def one_thread(_fresh_state):
    """For tests in which nothing is large enough for two."""
    torch.set_num_threads(1)


@pytest.fixture
def float32_means_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def constants_of_the_kernels(kernels, monkeypatch):
    """Sets a constant of `kernels/arguments.py`."""
    shared = kernels.module.over_positions.__globals__
    return lambda name, value: monkeypatch.setitem(shared, name, value)


@pytest.fixture
def always_worth_it(monkeypatch):
    """Small blocks too are speculated, also where no fused plan is the fastest, on maps that are carried."""
    from cnnlstm_fast.fusion import carry, plan

    carries = plan.FusionPlan._carries
    monkeypatch.setattr(plan.FusionPlan, "_why_unfused", lambda *args: None)
    monkeypatch.setattr(plan.FusionPlan, "_carries", lambda *args: carries(*args[:-1], float("inf")))
    monkeypatch.setattr(plan, "OVERHEAD_US", 0)
    monkeypatch.setattr(carry, "GAIN_PERCENT", -(10**6))


@pytest.fixture
def blocks(monkeypatch):
    """What ran as blocks: names of the norm, the activation and the pool of each."""
    from cnnlstm_fast.fusion import run

    seen = []
    run_block = run.run_block

    def noted(x, conv, *parts, **kwargs):
        seen.append(tuple(part and type(part).__name__ for part in parts))
        return run_block(x, conv, *parts, **kwargs)

    monkeypatch.setattr(run, "run_block", noted)
    return seen


@pytest.fixture
def always_ours(monkeypatch):
    """Blocks run by the cheapest of our plans, however fast PyTorch's operators are."""
    with _gain(monkeypatch, -(2**31)):
        yield


@pytest.fixture
def never_ours(monkeypatch):
    """Blocks are left to PyTorch's operators, however slow they are."""
    with _gain(monkeypatch, 100):
        yield


@contextlib.contextmanager
def _gain(monkeypatch, percent: int):
    from cnnlstm_fast.functional.conv_block import _known_calls
    from cnnlstm_fast.planning import choose

    monkeypatch.setattr(choose, "GAIN_PERCENT", percent)
    choose.cheapest.cache_clear()
    _known_calls.clear()
    yield
    choose.cheapest.cache_clear()
    _known_calls.clear()


@pytest.fixture
def known_rates(monkeypatch):
    """Choices as on one kind of processor and by the usual margin, whatever runs the tests, and how."""
    from cnnlstm_fast.functional.conv_block import _known_calls
    from cnnlstm_fast.planning import choose, rates

    given = rates.read("avx512-amd")
    monkeypatch.setattr(rates, "here", lambda: given)
    monkeypatch.setattr(choose, "GAIN_PERCENT", 10)
    choose.cheapest.cache_clear()
    _known_calls.clear()
    yield
    choose.cheapest.cache_clear()
    _known_calls.clear()


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """The folder of the tuner's files, still empty; nothing has been timed in this process."""
    from cnnlstm_fast.functional.conv_block import _known_calls
    from cnnlstm_fast.planning import choose, tuner

    monkeypatch.setenv("CNNLSTM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuner, "_known", {})
    monkeypatch.setattr(tuner, "enabled", False)
    _known_calls.clear()
    choose._likely.cache_clear()
    return tmp_path / "cache"
