"""cf.LSTM and cf.GRU over sequences of different lengths: packed, and with ``lengths``."""

from __future__ import annotations

import pytest
import torch
from forked import run_forked
from helpers import assert_close_as_torch, needs_extension
from layers import assert_same, layers, pair, r
from sequences import Case, kinds, pack, random_cases
from torch import nn
from torch.nn.utils import rnn

import cnnlstm_fast as cf


@random_cases(14, reset=False, lengths=True, time=6)
@pytest.mark.parametrize("sorted_already", [True, False])
def test_packed_sequences(case, sorted_already):
    """In and out, with every gradient, against the plain module in float64."""
    if case.batch is None:
        return
    drawn = case.draw()
    drawn.lengths.clamp_(min=1)
    if sorted_already:
        drawn.lengths.copy_(drawn.lengths.sort(descending=True).values)
    module = case.module(cf)
    twin = case.module(nn)
    results = []
    grads = None
    for layer, dtype in ((module, torch.float32), (twin, torch.float32), (twin, torch.float64)):
        leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in drawn.leaves.items()}
        packed = rnn.pack_padded_sequence(
            drawn.laid_out(leaves["x"]), drawn.lengths, case.batch_first, enforce_sorted=sorted_already
        )
        state = [leaves[n] for n in ("h_0", "c_0") if n in leaves]
        hx = None if not state else state[0] if case.kind == "GRU" else tuple(state)
        params = {n: leaves[n] for n in drawn.params}
        out, last = torch.func.functional_call(layer.to(dtype), params, (packed, hx))
        tensors = [out.data, *((last,) if case.kind == "GRU" else last)]
        grads = grads or [torch.randn(t.shape) for t in tensors]
        found = torch.autograd.grad(tensors, list(leaves.values()), [g.to(dtype) for g in grads])
        results.append((out, [t.detach() for t in tensors] + list(found)))
    (mine, ours), (theirs, way), (_, true) = results
    assert_same(mine, theirs, 1e-4)
    for at, (o, w, t) in enumerate(zip(ours, way, true, strict=True)):
        assert_close_as_torch(o, w, t, f"{at} of {case}")


@layers
def test_packed_without_kernels_is_torch(kind, more):
    ours, twin = pair(kind, **more, dtype=torch.float64)
    packed = rnn.pack_sequence([r(2, 5).double(), r(6, 5).double(), r(3, 5).double()], enforce_sorted=False)
    assert_same(ours(packed), twin(packed), 0)
    assert_same(ours(packed)[0].data.sum(), twin(packed)[0].data.sum(), 0)


@layers
def test_packed_equals_lengths(kind, more):
    ours, _ = pair(kind, **more)
    drawn = Case(kind, 5, 7, 6, 4, lengths=True, state=False).draw()
    drawn.lengths.clamp_(min=1)
    out, last = ours(pack(drawn, enforce_sorted=False))
    padded, _ = rnn.pad_packed_sequence(out, total_length=6)
    assert_same((padded, last), ours(drawn.data["x"], lengths=drawn.lengths), 1e-6)


EXTREME = """
import torch, cnnlstm_fast as cf
from torch.nn.utils.rnn import pack_sequence
def high():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
layer = cf.{kind}(64, 128, bidirectional=True, num_layers=2)
def step(sequences):
    with torch.set_grad_enabled({train}):
        out, _ = layer(pack_sequence(sequences))
        if {train}:
            out.data.sum().backward()
step([torch.randn(9, 64)] * 3)
before = high()
step([torch.randn(3000, 64)] + [torch.randn(8, 64)] * 255)
print(high() - before)
"""


@kinds
@pytest.mark.parametrize("train", [False, True])
@needs_extension
def test_packed_sequences_take_no_more_than_their_steps(kind, train):
    """5,040 steps, which padded would be 768,000: a result of 750 MiB and gates of many times that."""
    run = run_forked(EXTREME.format(kind=kind, train=train))
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200


@kinds
@needs_extension
def test_lengths_keep_no_more_than_their_steps(kind):
    layer = getattr(cf, kind)(16, 32, bidirectional=True)
    lengths = torch.tensor([300] + [4] * 63)
    kept = {}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(300, 64, 16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out, _ = layer(x, lengths=lengths)
    params = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    gates = 2 * int(lengths.sum()) * 6 * 32 * 4
    assert (
        sum(kept.values())
        <= x.untyped_storage().nbytes() + params + gates + lengths.untyped_storage().nbytes()
    )
    out.sum().backward()


@kinds
def test_packed_is_differentiable_twice(kind):
    ours, twin = pair(kind, bidirectional=True)
    found = []
    for module in (ours, twin):
        torch.manual_seed(3)
        sequences = [r(n, 5).requires_grad_() for n in (2, 6, 1)]
        out, _ = module(rnn.pack_sequence([s * 1 for s in sequences], enforce_sorted=False))
        grads = torch.autograd.grad(out.data.pow(2).sum(), sequences, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in grads)
        found.append(torch.autograd.grad(penalty, [*sequences, *module.parameters()], allow_unused=True))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-4, atol=1e-4
        )


def test_packed_and_lengths_do_not_go_together():
    ours, _ = pair("LSTM")
    packed = rnn.pack_sequence([r(6, 5), r(2, 5)])
    with pytest.raises(ValueError, match="pad_packed_sequence"):
        ours(packed, lengths=torch.tensor([6, 2]))
    with pytest.raises(ValueError, match="pad_packed_sequence"):
        ours(packed, reset=torch.zeros(6, 2, dtype=torch.bool))


@kinds
def test_packed_under_autocast(kind):
    ours, twin = pair(kind)
    packed = rnn.pack_sequence([r(6, 5), r(2, 5)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ours(packed), twin(packed), 0.03)
