"""Running a chain of modules in turn, with each block as one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlstm_fast.functional.epilogue import NORMS, program_of, run_program, why_not_epilogue
from cnnlstm_fast.fusion.calls import Conv
from cnnlstm_fast.fusion.layout import eager_layout, layout_behind, like_channels_last
from cnnlstm_fast.fusion.match import Block, part_of
from cnnlstm_fast.fusion.run import run_block
from cnnlstm_fast.limits import limit
from cnnlstm_fast.ops.epilogue import is_dense
from cnnlstm_fast.planning import costs, observer, rates
from cnnlstm_fast.planning.support import of_batch, records_gradients


def run_modules(block: Block, x: Any, layout: str | None = None) -> Tensor:
    """Run the modules of a block as one call.

    Args:
        x: ``(N, C, H, W)``, ``(C, H, W)``, ``(N, C, L)`` or ``(C, L)``, as the convolution takes it.
        layout: a name of :data:`cnnlstm_fast.spec.LAYOUTS`; the block must have no flatten then.
            None gives the result of calling the modules in turn, strides included.
    """
    conv, norm, activation, pool, flatten = block
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.is_nested:
        for module in block:
            x = x if module is None else module(x)
        return x
    weight = _parameter(conv, "weight")
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    if layout is None and flatten is not None and x.dim() == weight.dim():
        plain = type(flatten) is nn.Flatten
        layout, split = ("features", None) if plain else (flatten.layout, flatten.split_clips)
        flatten = None
    else:
        split = None
    arguments = Conv(weight, _parameter(conv, "bias"), conv.stride, padding, conv.dilation, conv.groups)
    y = run_block(x, arguments, norm, activation, pool, layout)
    if split is not None:
        y = split(y)
    return y if flatten is None else flatten(y)


#: Kernel taps up to which the library's convolution is faster on channels-last maps.
_CHANNELS_LAST_TAPS = 25


def run_chain(chain: Sequence[Block | nn.Module], x: Any) -> Any:
    """Run the steps of a chain.

    The result and its strides are those of calling the modules in turn. In inference a map between two blocks
    lies channels-last where that is faster for the second block. As measured, that saves 5 to 20 % of the
    inference of CRNNs and video CNNs. It saves nothing in training, and costs 12 % before kernels as large as
    those of speech models.
    """
    eager = None  # the layout that x would have by PyTorch, where ours has another one
    done = 0  # steps that an epilogue has run
    for i, step in enumerate(chain):
        if i < done:
            continue
        behind = _behind(chain, i)
        if behind:
            done = i + len(behind) if step is behind[0] else i + 1 + len(behind)
            if isinstance(step, Block):
                x = run_modules(step._replace(activation=None), x)
                behind = [step.activation, *behind]
            x, eager = _run_behind(behind, x), None
            continue
        if not isinstance(step, Block):
            x = step(x)
            continue
        layout = None
        if eager is not None and step.flatten is None:
            weight = _parameter(step.conv, "weight")
            last = eager == "channels_last" or like_channels_last(weight)
            layout = layout_behind(last, weight, step.norm, step.activation)
        eager = None
        if i + 1 < len(chain) and _hands_on(step, chain[i + 1], x):
            weight = _parameter(step.conv, "weight")
            eager = layout or eager_layout(x, weight, step.pool is not None, step.norm, step.activation)
            layout = "channels_last"
        x = run_modules(step, x, layout)
    return x


def _behind(chain: Sequence[Block | nn.Module], at: int) -> list[Any]:
    """The modules of an epilogue that begins with a step of a chain or, in training, with its activation.

    It begins with a norm, whose input PyTorch keeps too, or with the activation behind a block's convolution
    and a norm. One module alone is none.
    """
    step = chain[at]
    block = isinstance(step, Block)
    if torch.compiler.is_compiling() or observer.current is not None:
        return []
    if block:
        bare = step.activation is not None and step.norm is step.pool is step.flatten is None
        if not bare or not records_gradients():
            return []
    found: list[Any] = []
    for module in chain[at + 1 if block else at :]:
        if isinstance(module, Block):
            break
        part = part_of(module)
        kind = "norm" if type(module) in NORMS else "" if isinstance(part, str) else part.kind
        if kind not in ("norm", "activation", "monotone") or (not found and kind != "norm"):
            break
        found.append(module)
    return found if len(found) + block > 1 else []


#: Dimensions of the inputs that a norm takes.
_RANKS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
#: Microseconds that an epilogue must save, beside what it costs itself; one that saves less runs as PyTorch's
#: operators.
_EPILOGUE_US = limit("EPILOGUE_US", 20, 0)


def _run_behind(modules: list[Any], x: Any) -> Any:
    """Norms and activations as one pass, or in turn where that does not pay."""
    if not isinstance(x, Tensor) or not _fits(modules, x):
        for module in modules:
            x = module(x)
        return x
    program = program_of(modules)
    assert not isinstance(program, str)
    return run_program(x, program)


def _fits(modules: list[Any], x: Tensor) -> bool:
    """Whether one pass runs the modules behind ``x``, and is faster."""
    for module in modules:
        ranks = _RANKS.get(type(module))
        if ranks is not None and (x.dim() not in ranks or x.shape[1] != module.num_features):
            return False
    trained, program = records_gradients(), program_of(modules)
    if isinstance(program, str) or why_not_epilogue(x, program, trained) is not None or not is_dense(x):
        return False
    by_batch = any(type(module) in NORMS and of_batch(module) for module in modules)
    threads = torch.get_num_threads()
    saved = costs.epilogue_saves(x.numel(), x.dtype, program.kinds, by_batch, trained, rates.here(), threads)
    return saved >= _EPILOGUE_US


def _hands_on(step: Block, following: Block | nn.Module, x: Any) -> bool:
    """Whether a block should write channels-last maps for the block behind it."""
    return (
        isinstance(following, Block)
        and step.flatten is None
        and type(step.conv) is type(following.conv) is nn.Conv2d
        and following.conv.padding_mode == "zeros"
        and math.prod(following.conv.kernel_size) <= _CHANNELS_LAST_TAPS
        and not torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and x.dim() == 4
        and x.is_cpu
    )


def _parameter(module: nn.Module, name: str) -> Any:
    """A parameter, or another attribute, of a module; ``nn.Module.__getattr__`` takes ten times as long."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)
