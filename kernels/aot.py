"""Compile every kernel ahead of time, for every architecture we support, on a machine without a GPU.

The variants are not written down twice: each case below is a block, its launches are recorded from
the real host functions on tensors without data, and compiled as the launcher would specialise them.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cnnlstm_fast.kernels import conv_block, conv_norm, epilogue, recurrent
from cnnlstm_fast.kernels.conv_block import CHUNKED, DIRECT
from cnnlstm_fast.kernels.recurrent import GRU, LSTM
from cnnlstm_fast.spec import ADD_STAGE, CURVED

ARCHITECTURES = (80, 90, 100)

#: PyTorch's own for a batch norm.
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A block whose kernels are compiled: the op's arguments, in its own terms."""

    name: str
    x: tuple[int, int, int, int]
    c_out: int
    kernel: tuple[int, int]
    conv: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 1)
    activation: int = 1
    act: tuple[float, ...] = ()
    pool: tuple[int, ...] = ()
    order: tuple[int, ...] = (0, 1, 2, 3)
    bias: bool = True
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    plans: tuple[int, ...] = (DIRECT,)
    #: a batch norm by the batch's statistics, by those and the map kept, or by given ones; or none
    norm: Literal["batch", "batch, map kept", "given"] | None = None


@dataclass(frozen=True)
class EpilogueCase:
    """A program behind a convolution whose kernels are compiled; ``z`` is its map."""

    name: str
    z: tuple[int, ...]
    stages: tuple[int, ...]
    numbers: tuple[float, ...]
    channels_last: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class LayerCase:
    """A recurrent layer whose kernels are compiled; ``x`` is (T, B, features)."""

    name: str
    mode: int
    x: tuple[int, int, int]
    hidden: int
    directions: int = 1
    batch_first: bool = False
    state: bool = True
    reset: bool = True
    lengths: bool = False
    dtypes: tuple[str, ...] = ("float32", "tf32", "bfloat16")


_POOL2 = (2, 2, 2, 2, 0, 0, 1, 1, 0)

CASES = (
    Case(
        "tutorial",
        (1280, 3, 28, 28),
        64,
        (3, 3),
        pool=_POOL2,
        dtypes=("float32", "tf32", "bfloat16"),
        plans=(DIRECT, CHUNKED),
    ),
    Case(
        "signal",
        (128, 64, 1, 196),
        64,
        (1, 3),
        (1, 1, 0, 1, 1, 1, 1),
        order=(0, 2, 3, 1),
        dtypes=("float32", "float16"),
    ),
    Case("ocr", (64, 256, 8, 25), 512, (3, 3), pool=(2, 2, 2, 1, 0, 1, 1, 1, 0), order=(3, 0, 1, 2)),
    Case(
        "depthwise", (32, 48, 16, 16), 48, (3, 3), (1, 1, 1, 1, 1, 1, 48), pool=_POOL2, dtypes=("bfloat16",)
    ),
    Case("groups", (32, 64, 16, 16), 64, (3, 3), (2, 2, 1, 1, 1, 1, 4), pool=(2, 3, 2, 2, 0, 0, 2, 2, 1)),
    Case(
        "large window",
        (32, 16, 40, 40),
        32,
        (5, 5),
        (1, 1, 2, 2, 1, 1, 1),
        activation=2,
        act=(0.0, 6.0),
        pool=(4, 4, 4, 4, 0, 0, 1, 1, 0),
        dtypes=("float32",),
    ),
    Case("64-bit offsets", (60000, 3, 128, 128), 64, (3, 3), pool=_POOL2, dtypes=("bfloat16",)),
    Case("SiLU", (64, 32, 1, 128), 64, (1, 3), activation=7, dtypes=("bfloat16",), plans=(DIRECT, CHUNKED)),
    Case(
        "Softplus",
        (64, 32, 1, 128),
        64,
        (1, 3),
        activation=10,
        act=(0.7, 20.0),
        dtypes=("bfloat16",),
        plans=(DIRECT, CHUNKED),
    ),
    Case("bare", (32, 3, 32, 32), 64, (3, 3), activation=0, bias=False, dtypes=("bfloat16",)),
    Case(
        "video norm",
        (240, 3, 112, 112),
        64,
        (7, 7),
        (2, 2, 3, 3, 1, 1, 1),
        pool=(3, 3, 2, 2, 1, 1, 1, 1, 0),
        bias=False,
        plans=(DIRECT, CHUNKED),
        norm="batch",
    ),
    Case(
        "CRNN norm",
        (64, 256, 8, 25),
        512,
        (3, 3),
        pool=(2, 2, 2, 1, 0, 1, 1, 1, 0),
        order=(3, 0, 1, 2),
        dtypes=("tf32", "bfloat16"),
        plans=(DIRECT, CHUNKED),
        norm="batch, map kept",
    ),
    Case(
        "norm of a signal",
        (128, 64, 1, 196),
        64,
        (1, 3),
        (1, 1, 0, 1, 1, 1, 1),
        activation=7,
        order=(0, 2, 3, 1),
        dtypes=("float32", "float16"),
        plans=(DIRECT, CHUNKED),
        norm="batch",
    ),
    Case(
        "frozen norm",
        (64, 64, 16, 50),
        128,
        (3, 3),
        activation=8,
        pool=_POOL2,
        plans=(DIRECT, CHUNKED),
        norm="given",
    ),
    Case(
        "64-bit offsets norm",
        (60000, 3, 128, 128),
        64,
        (3, 3),
        pool=_POOL2,
        dtypes=("bfloat16",),
        plans=(DIRECT, CHUNKED),
        norm="batch",
    ),
    LayerCase("tutorial LSTM", LSTM, (196, 128, 64), 64),
    LayerCase("policy LSTM", LSTM, (128, 2, 512), 128, batch_first=True, dtypes=("bfloat16",)),
    LayerCase("everything", LSTM, (100, 32, 128), 128, 2, lengths=True, dtypes=("float16",)),
    LayerCase("odd LSTM", LSTM, (81, 8, 519), 519, lengths=True, dtypes=("float32", "bfloat16")),
    LayerCase("small GRU", GRU, (100, 32, 128), 24, dtypes=("float32", "bfloat16")),
    LayerCase(
        "sentences GRU",
        GRU,
        (100, 32, 128),
        128,
        2,
        state=False,
        reset=False,
        lengths=True,
        dtypes=("tf32", "bfloat16"),
    ),
    # norm, sum, ReLU; LeakyReLU, norm, Softplus; norm, SiLU, sum, LeakyReLU
    EpilogueCase(
        "residual", (64, 256, 16, 16), (0, 1, 3), (0.0, 0.0, 1.0, 0.0, 0.0, 0.0), channels_last=True
    ),
    EpilogueCase("late norm", (32, 24, 100, 20), (5, 0, 12), (0.01, 0.0, 0.0, 0.0, 1.0, 20.0)),
    EpilogueCase(
        "curved and summed",
        (128, 512),
        (0, 9, 1, 5),
        (0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.2, 0.0),
        dtypes=("float16",),
    ),
)


@dataclass(frozen=True)
class Launch:
    """A kernel as the host functions start it."""

    kernel: triton.runtime.JITFunction
    args: dict
    options: dict


@dataclass(frozen=True)
class Record:
    """What one compiled kernel needs of its architecture; ``shared`` and ``spills`` are in bytes."""

    kernel: str
    case: str
    dtype: str
    arch: str
    registers: int
    shared: int
    spills: int
    seconds: float = field(compare=False)


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


def launches(case: Case | EpilogueCase | LayerCase, dtype: str) -> list[Launch]:
    """Every launch of a forward and backward, as the host functions ask for them.

    ``dtype`` is a torch dtype's name, or "tf32" for float32 with TF32 products.
    """
    found: list[Launch] = []

    def record(kernel, programs, args, options, others=()):
        found.append(Launch(kernel, args, options))
        found.extend(Launch(kernel, args | other.tiles, other.options) for other in others)

    def data(*shape):
        return torch.empty(shape, dtype=getattr(torch, dtype.replace("tf32", "float32")), device="meta")

    with _float32_products("tf32" if dtype == "tf32" else "ieee"):
        if isinstance(case, Case):
            (_run_block if case.norm is None else _run_normed_block)(case, data, record)
        elif isinstance(case, EpilogueCase):
            _run_epilogue(case, data, record)
        else:
            _run_layer(case, data, record)
    return found


def _run_block(case: Case, data, record) -> None:
    x = data(*case.x)
    weight = data(case.c_out, case.x[1] // case.conv[6], *case.kernel)
    bias = data(case.c_out) if case.bias else None
    block = (list(case.conv), case.activation, list(case.act), list(case.pool), list(case.order))
    for plan in case.plans:
        out, codes, _ = conv_block.forward(x, weight, bias, *block, plan, True, run=record)
        grad = torch.empty_like(out)
        if case.activation >= CURVED:  # its gradient comes multiplied by the slopes
            block = (block[0], 0, [], *block[3:])
        conv_block.backward(grad, x, weight, codes, *block, plan, True, True, True, run=record)


def _run_normed_block(case: Case, data, record) -> None:
    x = data(*case.x)
    weight = data(case.c_out, case.x[1] // case.conv[6], *case.kernel)
    bias = data(case.c_out) if case.bias else None
    gamma = beta = mean = var = data(case.c_out)
    conv_norm.fold(weight, bias, gamma, beta, mean, var, EPS, run=record)
    given, keep_map = case.norm == "given", case.norm == "batch, map kept"
    statistics = (mean, var) if given else (None, None)
    block = (list(case.conv), case.activation, list(case.act), list(case.pool), list(case.order))
    for plan in case.plans:
        out, codes, kept, kept_map, stats = conv_norm.forward(
            x,
            weight,
            bias,
            gamma,
            beta,
            *statistics,
            EPS,
            *block,
            plan,
            True,
            keep_map,
            run=record,
        )
        of_forward = torch.empty_like(out), x, weight, stats, codes, kept, kept_map
        conv_norm.backward(*of_forward, EPS, *block, plan, given, True, True, run=record)


def _run_epilogue(case: EpilogueCase, data, record) -> None:
    z = data(*case.z)
    if case.channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    gamma = data(z.shape[1])
    program = list(case.stages), list(case.numbers)
    added = z if ADD_STAGE in case.stages else None
    for mean in (None, gamma):  # the statistics of the batch, and given ones
        _, passed, stats = epilogue.forward(
            z, gamma, gamma, mean, mean, None, added, *program, EPS, True, run=record
        )
        epilogue.backward(z, z, passed, stats, *program, EPS, mean is not None, True, True, run=record)


def _run_layer(case: LayerCase, data, record) -> None:
    steps, batch, width = case.x
    leading = (batch, steps) if case.batch_first else (steps, batch)
    state = data(case.directions, batch, case.hidden)
    c = state if case.mode == LSTM else None
    rows = (4 if case.mode == LSTM else 3) * case.hidden
    weights = [data(rows, width), data(rows, case.hidden), data(rows), data(rows), None]
    given = (
        *((state, c) if case.state else (None, None)),
        *(weights * case.directions + [None] * 5)[:10],
        state.new_empty(leading, dtype=torch.bool) if case.reset else None,
        state.new_empty(batch, dtype=torch.int64) if case.lengths else None,
    )
    x = data(*leading, width)
    for keep in (False, True):
        out, *_, saved = recurrent.forward(x, *given, case.mode, case.batch_first, keep, run=record)
    grads = out, state, c
    recurrent.backward(
        *grads, x, *given, out, saved, case.mode, case.batch_first, True, True, True, run=record
    )


@contextlib.contextmanager
def _float32_products(precision: str):
    cudnn: Any = torch.backends.cudnn
    kinds = cudnn.conv, cudnn.rnn
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = precision
    try:
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


def source(launch: Launch) -> ASTSource:
    """What the launcher would compile: ones become constants, multiples of 16 are promised as such."""
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.args[param.name]
        special = isinstance(value, int) and not param.do_not_specialize
        if param.is_constexpr or (special and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        signature[param.name] = (
            _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32" if value < 2**31 else "i64"
        )
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, arch: int) -> tuple[str, int, int, int]:
    """Compile for sm_``arch``: (the architecture's full name, registers, shared bytes, spilled bytes)."""
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # a cached kernel comes without the assembler's log
        knobs.nvidia.dump_ptxas_log = True
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source(launch), target=target, options=launch.options)
    return (
        re.findall(r"for '(sm_\w+)'", log.getvalue())[0],
        int(re.findall(r"Used (\d+) registers", log.getvalue())[0]),
        compiled.metadata.shared,
        sum(int(n) for n in re.findall(r"(\d+) bytes spill", log.getvalue())),
    )


def compile_all(
    cases: Iterable[Case | EpilogueCase | LayerCase] = CASES, archs: Iterable[int] = ARCHITECTURES
) -> list[Record]:
    """Compile every kernel in all its representative variants, each variant once, on all cores.

    Raises:
        Exception: what Triton raises where a variant does not compile.
    """
    jobs, seen = [], set()
    for case in cases:
        for dtype in case.dtypes:
            new = []
            for at, launch in enumerate(launches(case, dtype)):
                variant = source(launch).hash(), *sorted(launch.options.items())
                if variant not in seen:
                    seen.add(variant)
                    new.append(at)
            jobs.append((case, dtype, new, tuple(archs)))
    if len(jobs) == 1:
        return _compile_some(*jobs[0])
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return [record for found in pool.map(_compile_some, *zip(*jobs, strict=True)) for record in found]


def _compile_some(
    case: Case | EpilogueCase | LayerCase, dtype: str, which: list[int], archs: Iterable[int]
) -> list[Record]:
    """Those of a case's launches whose indices are ``which``."""
    records = []
    recorded = launches(case, dtype)
    for launch in (recorded[at] for at in which):
        for arch in archs:
            start = time.perf_counter()
            needs = compile_launch(launch, arch)
            seconds = time.perf_counter() - start
            records.append(Record(launch.kernel.__name__, case.name, dtype, *needs, seconds))
    return records
