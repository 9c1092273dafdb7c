"""cf.Sequential and cf.TimeDistributed under torch.compile, export, TorchScript and FX."""

import copy

import pytest
import torch
from chains import CHAINS, pair
from torch import nn
from twins import assert_compiles, grid, on_grid

import cnnlstm_fast as cf


def compiled_cases():
    yield "norm", cf.Sequential(*CHAINS["norm_between"][0]()), (2, 3, 7, 9)
    yield "flatten", cf.Sequential(*CHAINS["flatten"][0]()), (3, 1, 8, 8)
    yield "signal", cf.Sequential(*CHAINS["signal"][0]()), (3, 6, 21)
    yield "distributed", cf.TimeDistributed(nn.Sequential(*CHAINS["tutorial"][0]())), (2, 4, 3, 8, 8)
    yield "maps", cf.TimeDistributed(nn.Sequential(*CHAINS["tutorial"][0]()), False, False), (2, 4, 3, 8, 8)


@pytest.mark.some(4)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", compiled_cases(), ids=lambda case: case[0])
def test_compile_without_graph_breaks(case, backend):
    _, module, shape = case
    module = on_grid(copy.deepcopy(module)).eval()
    assert_compiles(module, module, grid(*shape), backend)


def test_compile_with_inductor():
    children = [*CHAINS["two_blocks"][0](), nn.Flatten(), nn.Linear(24 * 2 * 7, 3)]
    module = on_grid(cf.TimeDistributed(nn.Sequential(*children)))
    assert_compiles(module, module, grid(2, 3, 1, 8, 13), "inductor")


def test_compile_any_length_at_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    module = cf.TimeDistributed(on_grid(nn.Sequential(*CHAINS["tutorial"][0]())))
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for t in (9, 8, 13, 20):  # PyTorch's own convolution compiles batches below 16 apart
        x = grid(2, t, 3, 8, 8)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 1


def test_export():
    module = cf.TimeDistributed(on_grid(nn.Sequential(*CHAINS["flatten"][0]())))
    x = grid(2, 5, 1, 8, 8)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: length},))
    x = grid(2, 9, 1, 8, 8)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_script_trace_and_fx():
    ours, twin = pair(CHAINS["flatten"][0]())
    x = grid(3, 1, 8, 8)
    torch.testing.assert_close(torch.jit.script(ours)(x), twin(x))
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), twin(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), twin(x))
