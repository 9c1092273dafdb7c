"""Threads, forks and loaders: many callers at once, with the numbers of one."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import needs_extension, run_python
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cnnlstm_fast as cf
from cnnlstm_fast.functional import conv_block


def model() -> nn.Module:
    return cf.CNN_LSTM_TimeDistributed(3, 16, 1, 5, image_size=(12, 14))


def clips(batch=3) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 12, 14)


def chain() -> nn.Module:
    return cf.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 33, 3),
        nn.ReLU(),
        nn.Flatten(),
    )


def together(functions) -> list:
    """Call each in a thread of its own, all at once; their results."""
    barrier = threading.Barrier(len(functions))

    def call(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.result(timeout=100) for f in [pool.submit(call, function) for function in functions]]


def test_many_threads_share_one_model():
    """In inference, each with inputs of its own size."""
    shared, images = model().eval(), chain().eval()
    inputs = [clips(1 + i % 4) for i in range(8)]
    with torch.inference_mode():
        expected = [(shared(x), images(x.flatten(0, 1))) for x in inputs]

    def work(i):
        wrong = 0
        for _ in range(6):
            with torch.inference_mode():
                got = shared(inputs[i]), images(inputs[i].flatten(0, 1))
            wrong += not all(map(torch.allclose, got, expected[i]))
        return wrong

    assert together([lambda i=i: work(i) for i in range(8)]) == [0] * 8


def training(seed: int, steps: int = 6) -> torch.Tensor:
    """The last parameters of a short training of two models in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = model()
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    optimizer = torch.optim.SGD(made.parameters(), 0.05)
    for _ in range(steps):
        x = torch.randn(3, 4, 3, 12, 14, generator=generator)
        optimizer.zero_grad()
        made(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def test_models_trained_on_threads():
    """Each as if it were alone: gradients and winner codes go to their own model."""
    alone = [training(seed) for seed in range(3)]
    at_once = together([lambda seed=seed: training(seed) for seed in range(3)])
    for got, expected in zip(at_once, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_torch_threads(threads):
    """More than the machine has cores too, and changed while the model lives."""
    made, x = chain(), torch.randn(2, 3, 12, 14)
    expected = nn.Sequential(*made)(x)
    torch.set_num_threads(threads)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    made(x).sum().backward()
    h = cf.LSTM(7, 9)
    torch.testing.assert_close(h(x.flatten(1).view(2, -1, 7))[0].isfinite().all(), torch.tensor(True))


_STEP = """
import torch, cnnlstm_fast as cf
model = cf.CNN_LSTM_TimeDistributed(3, 16, 1, 5, image_size=(12, 14))
for batch in (1, 3, 64):
    model(torch.randn(batch, 4, 3, 12, 14)).sum().backward()
print("done", torch.get_num_threads())
"""


@pytest.mark.some(3)
@pytest.mark.parametrize(
    "env",
    [
        {"OMP_NUM_THREADS": "7"},
        {"OMP_NUM_THREADS": "0"},
        {"OMP_NUM_THREADS": "many"},
        {"OMP_NUM_THREADS": "2,3", "OMP_NESTED": "true"},
        {"OMP_THREAD_LIMIT": "1", "OMP_NUM_THREADS": "4"},
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "{0}", "OMP_NUM_THREADS": "4"},
    ],
    ids=lambda env: " ".join(f"{k}={v}" for k, v in env.items()),
)
def test_no_deadlock_with_odd_settings(env):
    ran = run_python(_STEP, **env)
    assert ran.returncode == 0 and ran.stdout.startswith("done"), ran.stderr[-2000:]


# ------------------------------------------------------------- processes


class Features(Dataset):
    """Runs the fast model in the worker."""

    def __init__(self):
        self.net, self.x = chain().eval(), torch.randn(12, 3, 12, 14)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.net(self.x[i : i + 1])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers(start):
    """After kernels have run here, so that a fork inherits threads' scratch memory but not the threads."""
    data = Features()
    with torch.no_grad():
        expected = data.net(data.x)
    loader = DataLoader(data, 4, num_workers=2, multiprocessing_context=start, timeout=100)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-5, atol=1e-5)


def _train_in_child(queue, x, net):
    loss = net(x).square().sum()
    loss.backward()
    queue.put((loss.item(), sum(p.grad.sum().item() for p in net.parameters())))


def test_fork_after_use():
    """The child trains with what it inherited, on one thread: OpenMP's own do not survive a fork."""
    net, x = chain(), torch.randn(2, 3, 12, 14)
    net(x).square().sum().backward()
    expected = sum(p.grad.sum().item() for p in net.parameters())
    net.zero_grad()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_train_in_child, args=(queue, x, net))
    child.start()
    try:
        _, got = queue.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0 and got == pytest.approx(expected, rel=1e-4, abs=1e-3)
    finally:
        child.kill()


# ------------------------------------------------------------- the interpreter's lock


def _progress_during(work) -> tuple[int, float]:
    """How often another Python thread gets to run while ``work`` does, and how long that took."""
    ticks, running = [0], [True]

    def tick():
        while running[0]:
            ticks[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        time.sleep(0.01)
        before, start = ticks[0], time.perf_counter()
        work()
        return ticks[0] - before, time.perf_counter() - start
    finally:
        running[0] = False
        thread.join()


@needs_extension
@pytest.mark.parametrize("plan", ["direct", "chunked", "recurrent", "backward"])
def test_the_interpreter_is_free_during_a_kernel(plan):
    """One call that takes long: a second Python thread goes on meanwhile."""
    torch.set_num_threads(1)
    x, w = torch.randn(64, 16, 64, 64), torch.randn(64, 16, 3, 3)
    if plan == "recurrent":
        params = list(nn.LSTM(128, 256).parameters())
        sequence = torch.randn(400, 32, 128)

        def work():
            with torch.no_grad():
                cf.functional.lstm(sequence, None, params, plan="fused")
    elif plan == "backward":
        w = torch.randn(64, 16, 7, 7, requires_grad=True)
        out = conv_block(x, w, pool=nn.MaxPool2d(2), plan="direct")
        grad = torch.ones_like(out)

        def work():
            torch.autograd.grad(out, w, grad, retain_graph=True)
    else:

        def work():
            conv_block(x, w, plan=plan, pool=nn.MaxPool2d(2))

    work()
    ticks, seconds = _progress_during(work)
    assert seconds > 0.02, f"the call took {seconds * 1e3:.1f} ms only: nothing is shown"
    assert ticks >= 3, f"{ticks} steps of another thread in {seconds * 1e3:.0f} ms"


def test_nothing_is_left_behind():
    """Threads that came and went leave no scratch memory: it belongs to them."""

    def rss() -> int:
        with open(f"/proc/{os.getpid()}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    net, x = chain().eval(), torch.randn(8, 3, 12, 14)

    def run():
        with torch.no_grad():
            net(x)

    for _ in range(3):
        together([run] * 4)
    before = rss()
    for _ in range(20):
        together([run] * 4)
    assert rss() - before < 32 * 2**20
