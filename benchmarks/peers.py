"""Who races: every way in which a person could run the same model, each at its best.

A peer's ``prepare(case, model, x)`` gets the plain PyTorch model (a copy of its own), does what is
done once per model (compiling, exporting) and returns ``x -> y``. Inputs and results are torch
tensors; where a runtime wants NumPy arrays they share memory. A result belongs to the caller, as
with PyTorch, and stays as it is when the next call comes; the two peers named "lent output" break
this rule (their next call overwrites it), so they are shown but never counted.

Threads. ONNX Runtime brings a thread pool of its own and OpenVINO brings TBB; neither wheel brings a
second OpenMP runtime (looked up with ``ldd``), so the only libgomp in the process is torch's. What
idle pools do is spin: a peer that runs while another's threads still spin loses a core to them. The
race therefore lets every turn begin with a pause and an uncounted call.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Case

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    Attributes:
        name: in tables and result files.
        prepare: ``(case, model, x) -> forward``.
        trains: whether gradients flow through it.
        lent: whether a result is overwritten by the next call.
        package: what must be installed beside torch, or None.
    """

    name: str
    prepare: Callable[[Case, nn.Module, Tensor], Forward]
    trains: bool = True
    lent: bool = False
    package: str | None = None

    def why_not(self, case: Case) -> str | None:
        """Why this peer cannot run the case, as a sentence, or None if it can."""
        if case.training and not self.trains:
            return f"{self.name} does not train"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed: pip install {self.package}"
        return None


def eager(case: Case, model: nn.Module, x: Tensor) -> Forward:
    return partial(case.forward, model)


def channels_last(case: Case, model: nn.Module, x: Tensor) -> Forward:
    """The model and its images in ``torch.channels_last``; sequences and signals stay as they are."""
    model.to(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        if not case.has_clips:
            return case.forward(model, x.to(memory_format=torch.channels_last) if case.has_images else x)
        frames = x.flatten(0, 1).to(memory_format=torch.channels_last)
        return case.forward(model, frames.unflatten(0, x.shape[:2]))

    return forward


def chunked(size: int, case: Case, model: nn.Module, x: Tensor) -> Forward:
    """The five-line loop: channels_last, ``size`` images at a time, so that maps stay in cache.

    Without gradients the parts go straight into their places, which is a third faster than ``cat``.
    """
    model.to(memory_format=torch.channels_last)

    def one(images: Tensor) -> Tensor:
        images = images.to(memory_format=torch.channels_last)
        y = case.features(model, images.unsqueeze(0) if case.has_clips else images)
        return y.squeeze(0) if case.has_clips else y

    def features(x: Tensor) -> Tensor:
        parts = (x.flatten(0, 1) if case.has_clips else x).split(size)
        if torch.is_grad_enabled():
            out = torch.cat([one(part) for part in parts])
        else:
            first = one(parts[0])
            out = first.new_empty(sum(map(len, parts)), *first.shape[1:])
            out[: len(first)] = first
            for i, part in enumerate(parts[1:], 1):
                out[i * size : i * size + len(part)] = one(part)
        return out.unflatten(0, x.shape[:2]) if case.has_clips else out

    if case.head is None:
        return features
    return lambda x: case.head(model, features(x))


def compiled(case: Case, model: nn.Module, x: Tensor) -> Forward:
    """``torch.compile`` with inductor, default mode."""
    torch._dynamo.reset()
    forward = torch.compile(partial(case.forward, model), dynamic=False)
    forward(x)
    return forward


class _Module(nn.Module):
    """What a case measures, as a module: exporters want one."""

    def __init__(self, case: Case, model: nn.Module):
        super().__init__()
        self.case, self.model = case, model

    def forward(self, x: Tensor) -> Tensor:
        return self.case.forward(self.model, x)


_exported: dict[bytes, bytes] = {}


def onnx_bytes(case: Case, model: nn.Module, x: Tensor) -> bytes:
    """The measured stage as an ONNX model, by ``torch.onnx``.

    Several peers want the same export, seconds apart: the last one is kept, under its weights' digest.
    """
    digest = hashlib.blake2b(case.name.encode())
    for p in model.parameters():
        digest.update(p.detach().numpy())
    key = digest.digest()
    if key not in _exported:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(_Module(case, model).eval(), (x,), dynamo=True, verbose=False)
        _exported.clear()
        _exported[key] = program.model_proto.SerializeToString()
    return _exported[key]


def onnx_runtime(case: Case, model: nn.Module, x: Tensor, *, lent: bool = False) -> Forward:
    """ONNX Runtime with as many threads as torch and all graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(onnx_bytes(case, model, x), options, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()

    def forward(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])

    if not lent:
        return forward
    out = torch.empty_like(forward(x))

    def forward_into(x: Tensor) -> Tensor:
        binding = session.io_binding()
        binding.bind_cpu_input(given.name, x.numpy())
        binding.bind_output(made.name, "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())
        session.run_with_iobinding(binding)
        return out

    return forward_into


def openvino(
    case: Case, model: nn.Module, x: Tensor, *, lent: bool = False, precision: str = "f32"
) -> Forward:
    """OpenVINO with as many threads as torch and the latency hint.

    Left to itself it would compute in bfloat16 where the processor can, as it does with ``precision="bf16"``.
    """
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model_ov = core.compile_model(core.read_model(model=onnx_bytes(case, model, x)), "CPU", settings)
    request = model_ov.create_infer_request()

    def forward(x: Tensor) -> Tensor:
        result = request.infer([x.numpy()], share_inputs=True, share_outputs=lent)
        return torch.from_numpy(result[0])

    return forward


#: By name, in the order of the tables.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("eager", eager),
        Peer("channels_last", channels_last),
        Peer("chunked 16", partial(chunked, 16)),
        Peer("chunked 8", partial(chunked, 8)),
        Peer("torch.compile", compiled),
        Peer("ONNX Runtime", onnx_runtime, trains=False, package="onnxruntime"),
        Peer("OpenVINO", openvino, trains=False, package="openvino"),
        Peer(
            "ONNX Runtime, lent output",
            partial(onnx_runtime, lent=True),
            trains=False,
            lent=True,
            package="onnxruntime",
        ),
        Peer(
            "OpenVINO, lent output",
            partial(openvino, lent=True),
            trains=False,
            lent=True,
            package="openvino",
        ),
    )
}
