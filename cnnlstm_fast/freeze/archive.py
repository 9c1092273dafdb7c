"""Frozen models in files: safetensors' format, whose metadata holds the programs as JSON. No pickle.

A file begins with the length of its header (8 bytes, little-endian) and the header, which is JSON: for each
tensor its dtype, shape and place in the bytes behind the header; and ``__metadata__``, texts, of which
``cnnlstm_fast`` is ours. Tensors are ``state/KEY`` and ``tensor/VERSION/NAME``. Whatever a file says is
checked: programs are made of operators without side effects only, sizes are arithmetic, and the bytes have a
check sum.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from cnnlstm_fast import __version__, _ext
from cnnlstm_fast.freeze.plans import choose_plans
from cnnlstm_fast.freeze.program import dtype_named, operator_named
from cnnlstm_fast.freeze.sizes import Sizes
from cnnlstm_fast.freeze.versions import Version
from cnnlstm_fast.ops import program as op
from cnnlstm_fast.planning import rates

__all__ = ["load", "save"]

#: Makes a frozen model without programs, of modules that have its state, and the dtype to compute in.
Make = Callable[[nn.Module, torch.dtype | None], Any]

#: Of what stands in the metadata.
FORMAT = 1
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_MOST_HEADER = 100 * 2**20


def save(frozen: Any, path: str | os.PathLike) -> None:
    """Write a frozen model to a file.

    Raises:
        ValueError: it has no program, or one with results or arguments that a file cannot hold.
    """
    if not frozen._versions:
        why = "; ".join(frozen.why_not) or "it has not been called on the CPU"
        raise ValueError(f"this frozen model has no program to save: {why}")
    state = frozen.state_dict()
    whole = frozen._state()
    tensors = {f"state/{key}": t for key, t in whole.items() if t is not None}
    versions = []
    for i, version in enumerate(frozen._versions):
        versions.append(_described(version))
        tensors.update({f"tensor/{i}/{name}": t for name, t in version.tensors.items()})
    metadata = {
        "format": FORMAT, "package": __version__, "torch": torch.__version__, "code": op.VERSION,
        "processor": rates.name_here(), "versions": versions, "persistent": sorted(state),
        "parameters": sorted(dict(frozen._model.named_parameters(remove_duplicate=False))),
        "dtype": None if frozen._dtype is None else str(frozen._dtype)[6:],
    }  # fmt: skip
    _write(Path(path), metadata, {name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _described(version: Version) -> dict[str, Any]:
    spec, *parts = version.signature
    leaves = []
    for part in parts:
        if len(part) == 3:
            leaves.append({"dtype": str(part[0])[6:], "dim": part[1]})
        elif part[1] is None or isinstance(part[1], (bool, int, float, str)):
            leaves.append({"value": part[1]})
        else:
            raise ValueError(f"a file cannot hold an argument that is a {part[0].__name__}")
    for result in version.results:
        if result is not None and not (result[1] is None or isinstance(result[1], (bool, int, float, str))):
            raise ValueError(f"a file cannot hold a result that is a {type(result[1]).__name__}")
    try:
        arguments, results = pytree.treespec_dumps(spec), pytree.treespec_dumps(version.out_spec)
    except Exception as error:
        raise ValueError(f"a file cannot hold arguments or results of this structure: {error}") from error
    return {
        "program": version.data, "sizes": version.sizes._asdict(), "results": version.results,
        "leaves": leaves, "arguments": arguments, "structure": results, "broken": sorted(version.broken),
    }  # fmt: skip


def _write(path: Path, metadata: dict, tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {}
    at, check, parts = 0, 0, []
    for name, t in tensors.items():
        if t.dtype not in _DTYPES:
            raise ValueError(f"a file cannot hold {name}, which is {t.dtype}")
        data = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        header[name] = {
            "dtype": _DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
        check = zlib.crc32(data, check)
        parts.append(data)
    metadata["check"] = check
    header["__metadata__"] = {"cnnlstm_fast": json.dumps(metadata)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.writelines(parts)
    os.replace(file.name, path)


def load(path: Path, make: Make) -> Any:
    """As :func:`cnnlstm_fast.load_frozen`."""
    if not _ext.loaded:
        raise RuntimeError(
            f"a saved frozen model runs by the compiled kernels, which are missing: {_ext.error}"
        )
    metadata, tensors = _read(path)
    try:
        return _built(metadata, tensors, make)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        AssertionError,
    ) as error:
        raise ValueError(f"{path} holds no frozen model that can run here: {_first_line(error)}") from error


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    data = path.read_bytes()
    damaged = ValueError(f"{path} is damaged, or no frozen model of cnnlstm_fast")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MOST_HEADER):
        raise damaged
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = json.loads(header.pop("__metadata__")["cnnlstm_fast"])
        found = metadata["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged from error
    if found != FORMAT or metadata.get("code") != op.VERSION:
        raise ValueError(
            f"{path} is of format {found}, written by cnnlstm_fast {metadata.get('package')}; this is "
            f"{__version__}, which reads format {FORMAT}: freeze and save the model again with this version"
        )
    bytes_ = memoryview(data)[8 + length :]
    if zlib.crc32(bytes_) != metadata.get("check"):
        raise damaged
    tensors = {}
    try:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
            size = torch.Size(shape)
            if not (0 <= begin <= end <= len(bytes_)) or min(shape, default=0) < 0:
                raise damaged
            if size.numel() * dtype.itemsize != end - begin:
                raise damaged
            flat = (
                torch.frombuffer(bytearray(bytes_[begin:end]), dtype=dtype) if end > begin else torch.empty(0)
            )
            tensors[name] = flat.to(dtype).reshape(size)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged from error
    return metadata, tensors


def _built(metadata: dict, tensors: dict[str, Tensor], make: Make) -> Any:
    state = {name[6:]: t for name, t in tensors.items() if name.startswith("state/")}
    model = _tree(state, set(metadata["parameters"]), set(metadata["persistent"]))
    dtype = None if metadata["dtype"] is None else dtype_named(metadata["dtype"])
    frozen = make(model, dtype)
    other_processor = metadata["processor"] != rates.name_here()
    for i, entry in enumerate(metadata["versions"]):
        prefix = f"tensor/{i}/"
        others = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        sizes = Sizes(**entry["sizes"])
        parts = [
            (dtype_named(leaf["dtype"]), leaf["dim"], torch.device("cpu")) if "dtype" in leaf
            else (type(leaf["value"]), leaf["value"]) for leaf in entry["leaves"]
        ]  # fmt: skip
        signature = (pytree.treespec_loads(entry["arguments"]), *parts)
        results = [None if r is None else tuple(r) for r in entry["results"]]
        program = entry["program"]
        for node in (*program["prelude"], *program["nodes"]):
            if node["op"] in ("call", "python"):
                operator_named(node["name"])
        if other_processor:
            values = {name: state[key] for name, key in program["state"].items()}
            choose_plans(program, {**values, **others}, None)
        version = Version(
            program,
            others,
            frozen._state(),
            sizes,
            signature,
            results,
            pytree.treespec_loads(entry["structure"]),
            dtype is torch.int8,
        )
        version.broken.update(entry["broken"])
        frozen._versions.append(version)
    return frozen


def _tree(state: dict[str, Tensor], parameters: set[str], persistent: set[str]) -> nn.Module:
    """Modules without a forward that have these parameters and buffers."""
    root = nn.Module()
    for key, value in state.items():
        *path, name = key.split(".")
        module: Any = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        if key in parameters:
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(name, value, persistent=key in persistent)
    return root


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line), type(error).__name__)
