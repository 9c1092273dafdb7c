"""Large outputs: recycled once nobody holds them, and never before."""

import threading

import pytest
import torch
from torch import nn

from cnnlstm_fast import _ext
from cnnlstm_fast.functional import conv_block

pytestmark = pytest.mark.skipif(not _ext.loaded, reason=f"the compiled kernels are missing: {_ext.error}")

POOL = nn.MaxPool2d(2)


#: Images whose outputs are 48 and 6 MiB: more than the C library keeps mapped, and more than it keeps at all.
sizes = pytest.mark.parametrize("images", [1024, 128])


def large(x, w):
    return conv_block(x, w, padding=1, pool=POOL, layout="features", plan="direct")


def inputs(images=1024):
    return torch.randn(images, 1, 28, 28), torch.randn(64, 1, 3, 3)


@sizes
def test_what_somebody_holds_is_never_overwritten(images):
    x, w = inputs(images)
    first = large(x, w)
    copy, view = first.clone(), first[100:, 5:].detach()
    del first
    others = [large(-x, w) for _ in range(2)]
    assert all(o.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() for o in others)
    assert torch.equal(view, copy[100:, 5:])


@sizes
def test_what_nobody_holds_is_used_again(images):
    x, w = inputs(images)
    first = large(x, w)
    at, expected = first.data_ptr(), first.clone()
    del first
    again = large(x, w)
    assert again.data_ptr() == at
    assert torch.equal(again, expected)


def test_idle_memory_is_bounded():
    x, w = inputs()
    held = [large(x, w) for _ in range(12)]
    del held
    with open("/proc/self/smaps_rollup") as smaps:
        before = int(next(line for line in smaps if line.startswith("Rss")).split()[1])
    held = [large(x, w) for _ in range(12)]
    del held
    with open("/proc/self/smaps_rollup") as smaps:
        after = int(next(line for line in smaps if line.startswith("Rss")).split()[1])
    assert after - before < 64 * 1024  # KiB: twelve outputs are 588 MiB


def test_threads_get_memory_of_their_own():
    x, w = inputs()
    expected, wrong = large(x, w), []

    def work():
        for _ in range(5):
            if not torch.equal(large(x, w), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
