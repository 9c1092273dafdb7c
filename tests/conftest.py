"""What every test gets: poisoned fresh memory, a seed of its own, two threads; and the report's header."""

from __future__ import annotations

import collections
import os
import random
import zlib

import pytest

# Idle OpenMP threads sleep instead of spinning: thousands of small calls on a busy machine would
# otherwise spend most of their time waiting for each other. Read when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

SEED = int(os.environ.setdefault("CNNLSTM_FAST_SEED", str(random.SystemRandom().randrange(10**9))))


def pytest_configure(config):
    config.addinivalue_line("markers", "no_cover: coverage is not measured")
    config.addinivalue_line("markers", "long: takes minutes; runs with CNNLSTM_FAST_LONG=1")
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
    _take_share(config, items)
    _measure_few(items)


def _take_share(config, items):
    """Of every test's cases one in CNNLSTM_FAST_SHARE: which ones, the seed decides."""
    share = int(os.environ.get("CNNLSTM_FAST_SHARE", "1"))
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.path, getattr(item, "originalname", item.name)].append(item)
    taken = {id(item) for cases in tests.values() for item in cases[SEED % min(share, len(cases)) :: share]}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in taken])
    items[:] = [item for item in items if id(item) in taken]


#: Of how many cases of every parametrized test coverage is measured.
MEASURED_CASES = 2


def _measure_few(items):
    """Turn coverage off for most cases: under it Python takes up to twice as long, and they add nothing."""
    tests = collections.defaultdict(list)
    for item in items:
        if not item.get_closest_marker("skip"):
            tests[item.path, item.originalname].append(item)
    for cases in tests.values():
        every = -(-len(cases) // MEASURED_CASES)
        for at, item in enumerate(cases):
            if at % every:
                item.add_marker("no_cover")


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
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def always_ours(monkeypatch):
    """Blocks run by the cheapest of our plans, however fast PyTorch's operators are."""
    from cnnlstm_fast import functional
    from cnnlstm_fast.planning import choose

    monkeypatch.setattr(choose, "GAIN_PERCENT", -(2**31))
    choose.cheapest.cache_clear()
    functional._left_to_pytorch.clear()
    yield
    choose.cheapest.cache_clear()
