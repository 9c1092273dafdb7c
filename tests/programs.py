"""A fuzzer of programs: ``python tests/programs.py --programs 20000 --seed S --seconds T --output FILE``.

Random Python programs are written from the tables below: a module with a forward as people write them, what
may happen between a convolution and the end of its block, and a driver that calls the model several times.
Each runs plain, accelerated and, one in :data:`COMPILED`, compiled with our backend; everything that can be
seen must be the same: results, strides, gradients, buffers, inputs, what hooks saw, kept values, answers to
questions of identity, exceptions. What fails is shrunk and printed as a script of its own.

Numbers follow the rule of helpers.py: twice PyTorch's own error against float64 plus 16 eps. A program fails
only if it does so with two drawings of its data, since a rounding that moves a pool's winner would not.
A crash is a finding too: programs run in a child process, which writes to a journal what it begins.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import inspect
import json
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("CNNLSTM_FAST_LEAST", "1")

import torch
import torch.nn.functional as F
from torch import nn

import cnnlstm_fast as cf

ROOT = Path(__file__).resolve().parents[1]
#: Of how many programs one is compiled: dynamo takes seconds.
COMPILED = 20
#: Seconds after which a program counts as hanging.
PATIENCE = 120


def begin_at_any_size() -> None:
    """Let models be fused however small they are; the environment's CNNLSTM_FAST_LEAST says the same."""
    capture, resting = (sys.modules.get(f"cnnlstm_fast.{name}") for name in ("capture", "resting"))
    if hasattr(capture, "OVERHEAD_US"):
        capture.OVERHEAD_US = 0
        why_not = capture.Recipe._why_not_deferred
        capture.Recipe._why_not_deferred = lambda *args: why_not(*args[:-1], handed=True)
    if hasattr(resting, "LEAST"):
        resting.LEAST = 1


# ---------------------------------------------------------------- what every program begins with

PRELUDE = '''\
import contextlib, copy, ctypes, functools, io, pickle, weakref
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SEED, DTYPE, NUDGE = 0, torch.float32, 0.0
NOISE = torch.Generator()
seen, keep = [], {}


def see(name, value):
    """Note a value as it is now."""
    if isinstance(value, torch.Tensor):
        value = value.requires_grad, value.stride(), value.detach().clone()
    elif isinstance(value, (tuple, list)):
        for part in value:
            see(name, part)
        return
    elif isinstance(value, dict):
        return see(name, [*value.values()])
    seen.append((name, value))


def look(model):
    """Note all parameters, gradients and buffers."""
    for name, p in model.named_parameters():
        see(f"parameter {name}", p)
        see(f"gradient of {name}", p.grad)
    for name, b in model.named_buffers():
        see(f"buffer {name}", b)


@contextlib.contextmanager
def caught():
    try:
        yield
    except Exception as error:
        see("raised", type(error))


def nudged(t):
    return t * (1 + NUDGE * torch.randn(t.shape, generator=NOISE)) if NUDGE else t


def rand(*shape):
    torch.manual_seed(SEED + len(seen))
    return nudged(torch.randn(shape)).to(DTYPE)


def total(out):
    """A loss over all that a model returns."""
    if isinstance(out, torch.Tensor):
        return (out * torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype)).sum()
    return sum(total(part) for part in (out.values() if isinstance(out, dict) else out))


def raw(y):
    """A copy of a tensor's memory, read through its address."""
    buffer = (ctypes.c_uint8 * (y.numel() * y.element_size())).from_address(y.data_ptr())
    return torch.frombuffer(bytearray(buffer), dtype=y.dtype)


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.mark_dirty(y)
        return y.neg_()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Hook:
    def __init__(self, name):
        self.name, self.calls = name, 0

    def __call__(self, module, *args):
        self.calls += 1
        see(f"{self.name} {self.calls}", args[-1])


def build():
    torch.manual_seed(SEED)
    model = Net()
    for name, t in model.state_dict().items():
        if name.endswith("running_var"):
            t.uniform_(0.5, 1.5)
        elif t.is_floating_point():
            if t.dim() == 1:
                t.uniform_(-0.8, 0.8)
            t.copy_(nudged(t))
    return model.to(DTYPE)

'''

FOOTER = '''
import os, sys
os.environ["CNNLSTM_FAST_LEAST"] = "1"
import cnnlstm_fast as cf

{begin}

def compiled(model):
    model.compile(backend="cnnlstm_fast")
    return model


begin_at_any_size()
runs = []
for wrap in (lambda model: model, {wrap}):
    seen.clear()
    drive(wrap)
    runs.append(list(seen))
print(len(runs[0]), "and", len(runs[1]), "values seen; those that differ:")
for (name, plain), (other, fast) in zip(*runs):
    if isinstance(plain, tuple) and isinstance(fast, tuple):
        if plain[:2] != fast[:2] or not torch.allclose(plain[2], fast[2], 1e-4, 1e-5, equal_nan=True):
            print(name, *plain, "but", other, *fast)
    elif name != other or type(plain) is not type(fast) or plain != fast:
        print(name, plain, "but", other, fast)
'''

# ---------------------------------------------------------------- the grammar
# Statements are source text; {d} is 1 or 2, {c} the channels of y, {conv} and {norm} the block's modules,
# u the input of its convolution, and a value held before is a.

CONV = {
    "kernel_size": ("1", "2", "3", "3", "3", "5"), "stride": ("1", "1", "1", "2"),
    "padding": ("0", "1", "1", "2", "'same'", "'valid'"), "dilation": ("1", "1", "1", "2"),
    "groups": ("1", "1", "1", "2", "{c}"), "bias": ("True", "True", "False"),
    "padding_mode": ("'zeros'",) * 6 + ("'reflect'", "'circular'", "'replicate'"),
}  # fmt: skip
NORMS = (
    "nn.BatchNorm{d}d({c})", "nn.BatchNorm{d}d({c})", "nn.BatchNorm{d}d({c}, affine=False)",
    "nn.BatchNorm{d}d({c}, track_running_stats=False)", "nn.BatchNorm{d}d({c}, momentum=None)",
    "nn.BatchNorm{d}d({c}, momentum=0.5, eps=0.1)", "nn.BatchNorm{d}d({c}, momentum=1.0)",
    "nn.GroupNorm(1, {c})", "nn.InstanceNorm{d}d({c})",
)  # fmt: skip
BATCH_NORM = (
    "y = F.batch_norm(y, {norm}.running_mean, {norm}.running_var, {norm}.weight, {norm}.bias, self.training)",
    "y = F.batch_norm(y, None, None, training=True)",
    "y = F.batch_norm(y, {norm}.running_mean, {norm}.running_var, training=self.training, momentum=0.3)",
)
ACTIVATIONS = (
    *("nn.ReLU()",) * 3, "nn.ReLU(inplace=True)", "nn.ReLU(True)", "nn.LeakyReLU(0.2)", "nn.LeakyReLU(-0.5)",
    "nn.LeakyReLU(0.1, inplace=True)", "nn.ELU()", "nn.ELU(0.5, inplace=True)", "nn.Hardtanh(-0.5, 0.7)",
    "nn.ReLU6()", "nn.Tanh()", "nn.Sigmoid()", "nn.SiLU()", "nn.SiLU(inplace=True)", "nn.GELU()",
    "nn.GELU('tanh')", "nn.Identity()", "nn.Mish()", "nn.Softplus()", "nn.PReLU()", "nn.Hardswish()",
    "nn.SELU()", "nn.CELU()", "nn.Softsign()", "nn.GLU(1)", "nn.LogSigmoid()", "nn.Hardsigmoid()",
)  # fmt: skip
ACTIVATE = (
    *("y = F.relu(y)",) * 3, "y = torch.relu(y)", "y = y.relu()", "y = F.relu_(y)", "F.relu_(y)", "y.relu_()",
    "y = torch.relu_(y)", "y = F.relu(y, inplace=True)", "F.relu(y, inplace=True)", "y = F.relu(input=y)",
    "y = F.leaky_relu(y, 0.2)", "F.leaky_relu_(y)", "y = F.leaky_relu(y, -1.0)", "y = F.elu(y)", "F.elu_(y)",
    "y = F.hardtanh(y)", "F.hardtanh_(y)", "y = F.relu6(y)", "y = torch.tanh(y)", "y.tanh_()",
    "y = y.sigmoid()", "torch.sigmoid_(y)", "y = F.silu(y)", "F.silu(y, inplace=True)", "y = F.gelu(y)",
    "y = F.gelu(y, approximate='tanh')", "y = y.clamp(min=0)", "y.clamp_(min=0)", "y = y * torch.sigmoid(y)",
    "y = y.abs()", "y = F.softplus(y)", "y = F.threshold(y, 0.1, 0.0)", "y = torch.where(y > 0, y, 0.1 * y)",
    "y = torch.maximum(y, torch.zeros_like(y))", "y = F.glu(y, 1)", "y = F.mish(y)", "y = -F.relu(-y)",
)  # fmt: skip
POOLS = (
    *("nn.MaxPool{d}d(2)",) * 3, "nn.MaxPool{d}d(3, 2, 1)", "nn.MaxPool{d}d(2, ceil_mode=True)",
    "nn.MaxPool{d}d(2, 1)", "nn.AvgPool{d}d(2)", "nn.AvgPool{d}d(3, 1, 1, count_include_pad=False)",
    "nn.AdaptiveAvgPool{d}d(1)", "nn.AdaptiveMaxPool{d}d(2)", "nn.MaxPool2d((2, 1))", "nn.LPPool{d}d(2, 2)",
    "nn.AdaptiveAvgPool2d((None, 2))", "nn.MaxPool{d}d(3, 2, dilation=2, padding=1)",
)  # fmt: skip
POOL = (
    *("y = F.max_pool{d}d(y, 2)",) * 3, "y = F.max_pool{d}d(y, 3, stride=2, padding=1)",
    "y = torch.max_pool{d}d(y, 2)", "y, at = F.max_pool{d}d(y, 2, return_indices=True)",
    "y = F.avg_pool{d}d(y, 2)", "y = F.adaptive_avg_pool{d}d(y, 1)", "y = F.adaptive_max_pool{d}d(y, 2)",
    "y = y.amax(-1, keepdim=True)", "y = y.mean(2, keepdim=True)", "y = y[..., ::2]",
)  # fmt: skip
DROPS = (
    "nn.Dropout(0.3)", "nn.Dropout{d}d(0.2)", "nn.Dropout(0.0)", "nn.AlphaDropout(0.2)",
    "nn.Dropout(0.4, inplace=True)",
)  # fmt: skip
MOVES = (  # the same numbers, or nearly: other objects, memory, shapes
    "y = y.clone()", "y = y.view(y.shape)", "y = y.view_as(y)", "y = y[:]", "y = y[:, :, 1:]",
    "y = y[:, 1:]", "y = y[1:]", "y = y.transpose(-1, -2)", "y = y.contiguous()", "y = y.to(y.dtype)",
    "y = y.cpu()", "y = y.flip(2)", "y = y + 1", "y = y * 2", "y = 0.5 - y", "y = y.detach()",
    "y = y.expand_as(y)", "y = y.contiguous(memory_format=torch.channels_last)", "y = y.unsqueeze(0)[0]",
    "y = torch.stack([y, y]).mean(0)", "y = F.pad(y, (1, 1))", "y = y.reshape(y.shape)", "y = y.alias()",
    "y = y.mul_(1.5)", "y += 0.5", "y.neg_()", "y.add_(1)", "y[:1].mul_(-1)", "y[:, :1] = 0.5",
    "y.view(-1)[::3].neg_()", "y = F.dropout(y, 0.3, self.training)", "y = F.dropout(y, 0.5, False)",
    "y = F.layer_norm(y, y.shape[1:])", "y = y * y.mean((-1, -2), keepdim=True).sigmoid()",
)  # fmt: skip
JOINS = (
    "y = y + a", "y += a", "y = y * a", "y = torch.cat((y, a), 1)", "y = torch.cat((a, y))", "y = a - y",
    "y = torch.maximum(y, a)", "y = torch.add(a, y, alpha=0.5)", "y = torch.lerp(y, a, 0.3)", "a += y",
)  # fmt: skip
BRANCHES = (  # two blocks side by side: n and m are norms, possibly the same one
    "a = {n}({conv}(u))\nb = {m}({other}(u))\nb = F.relu(b)\na = F.relu(a)\ny = a + b",
    "a = {n}({conv}(u))\nb = {m}({other}(u))\ny = F.relu(a) - F.relu(b)",
    "a, b = {conv}(u), {other}(u)\nb = {m}(b)\na = {n}(a)\ny = torch.cat((F.relu(a), torch.tanh(b)), 1)",
    "a, b = {conv}(u), {other}(u)\ny = F.max_pool{d}d(F.relu(b), 2) + F.max_pool{d}d(F.relu(a), 2)",
    "y = F.relu({n}({conv}(u))) * torch.sigmoid({m}({conv}(u)))",
    "y = F.relu({n}({conv}(u)) + {m}({other}(u)))",
)
BRIDGES = (
    "y = y.flatten(2).transpose(1, 2)", "y = y.permute(0, *range(2, y.dim()), 1).flatten(1, -2)",
    "y = y.flatten(2).mean(2)", "y = y.flatten(1)", "y = torch.flatten(y, 1)", "y = y.reshape(y.shape[0], -1)",
    "y = y.flatten(2).permute(2, 0, 1)", "y = nn.Flatten()(y)", "y = y.transpose(1, 2).flatten(2)",
)  # fmt: skip
HEADS = (
    "nn.LSTM({f}, 4, batch_first=True)", "nn.GRU({f}, 4, batch_first=True)", "nn.LSTM({f}, 3)",
    "nn.GRU({f}, 3, num_layers=2, bidirectional=True)", "nn.Linear({f}, 3)", "nn.LSTM({f}, 4, proj_size=2)",
)  # fmt: skip

#: What may happen anywhere, above all between a convolution and the end of its block, by what that is.
EVENTS: dict[str, tuple[str, ...]] = {
    "changes the weight": (
        "with torch.no_grad():\n    {conv}.weight.neg_()", "{conv}.weight.data.neg_()",
        "{conv}.weight.data = -{conv}.weight.data", "{conv}.weight.detach().numpy()[:] *= -1",
        "with torch.inference_mode():\n    {conv}.weight.neg_()", "{conv}.weight.data[:1].zero_()",
        "{conv}.weight.data.numpy()[0] = 0.25", "{conv}.weight = nn.Parameter(-{conv}.weight.detach())",
        "{conv}.weight.detach().view(-1)[::2].neg_()", "{conv}.weight.data.copy_(-{conv}.weight.data)",
    ),
    "changes the bias": (
        "with torch.no_grad():\n    {conv}.bias.add_(1)", "{conv}.bias.data.neg_()",
        "{conv}.bias.detach().numpy()[:] += 0.5", "{conv}.bias = None",
    ),
    "changes the input": (
        "with torch.no_grad():\n    u.mul_(-0.5)", "u.data.neg_()", "u.detach().numpy()[:] *= -1",
        "u.data = -u.data", "with torch.inference_mode():\n    u.neg_()", "u.data.view(-1)[::2].zero_()",
        "u.detach()[:1].neg_()", "x.data.neg_()", "x.data.numpy()[..., 0] = 1.5", "x.detach().fill_(0.5)",
        "u.mul_(-0.5)", "torch.neg(u.detach(), out=u.detach())", "u.data.copy_(u.data.flip(0))",
    ),
    "changes the norm": (
        "with torch.no_grad():\n    {norm}.weight.neg_()", "{norm}.weight.data.neg_()",
        "{norm}.bias.data.add_(0.5)", "{norm}.running_mean.add_(0.5)", "{norm}.running_var.fill_(2.0)",
        "{norm}.running_mean.numpy()[:] = 0.5", "{norm}.reset_running_stats()", "{norm}.eps = 0.5",
        "{norm}.momentum = 0.7", "{norm}.num_batches_tracked.add_(3)", "{norm}.eval()", "{norm}.train()",
        "{norm}.running_mean = -{norm}.running_mean", "{norm}.running_var.data.mul_(1.5)",
    ),
    "reads the norm": (
        'see("mean", {norm}.running_mean)', 'see("var", {norm}.running_var)',
        'see("tracked", {norm}.num_batches_tracked)', "y = y + {norm}.running_mean.mean()",
        'see("state", {norm}.state_dict())', "self.kept = {norm}.running_var.clone()",
    ),
    "keeps a value": (
        *("self.kept = y",) * 4, "self.held.append(y)", "self.kept = y.detach()", "self.kept = y[:1]",
        "a = y", "self.kept = (y, u)", "self.kept = y.data", "keep['y'] = y", "self.kept = lambda: y",
    ),
    "asks for identity": (
        'b = y\ny = F.relu_(y)\nsee("same", y is b)', 'see("same", F.relu(y, inplace=True) is y)',
        "y.tag = 7", 'see("tag", getattr(y, "tag", None))', 'b = y\ny = y.relu_()\nsee("same", id(y) == id(b))',
        'see("same", y in [1, y] if y.numel() == 1 else any(y is b for b in [y]))',
        'b = weakref.ref(y)\nsee("same", b() is y)', 'keep[id(y)] = y\nsee("same", keep.pop(id(y)) is y)',
    ),
    "asks for more": (
        'see("shape", [*y.shape, y.dim(), y.numel()])', 'see("stride", [*y.stride(), y.is_contiguous()])',
        'see("grad", [y.requires_grad, y.is_leaf, y.grad_fn is None])', 'see("type", type(y) is torch.Tensor)',
        'see("dtype", str(y.dtype) if DTYPE is torch.float32 else None)', 'see("version", y._version)',
        'see("type", isinstance(y, nn.Parameter))', 'see("offset", y.storage_offset())',
        'see("length", len(y))', 'see("base", y._is_view())', 'see("hash", hash(y) == hash(y))',
    ),
    "reads the value": (
        'see("y", y)', 'see("sum", y.sum())', 'see("any", bool((y > 1e4).any()))', 'see("max", y.max())',
        'see("copy", copy.copy(y.detach()))', 'see("copy", copy.deepcopy(y.detach()))', 'repr(y)',
        'see("slice", y[0])', 'see("saved", saved(y.detach()))', 'see("late", a)',
        'see("norm", torch.linalg.vector_norm(y))', 'b = torch.empty_like(y).copy_(y)\nsee("b", b)',
    ),
    "reads its memory": (
        'see("dlpack", torch.from_dlpack(torch.utils.dlpack.to_dlpack(y.detach())))',
        'see("dlpack", torch.from_dlpack(y.detach()))', 'see("array", float(np.asarray(y.detach()).sum()) > 1e9)',
        'see("array", torch.from_numpy(y.detach().numpy()))', 'see("raw", raw(y))', 'see("list", len(y.tolist()))',
        'see("storage", y.untyped_storage().nbytes() // y.element_size())', 'see("raw", raw(y.detach()))',
        'see("pointer", y.data_ptr() == y.detach().data_ptr())', 'see("array", torch.tensor(y.detach().numpy()))',
        'see("storage", torch.tensor(y.detach().untyped_storage().tolist()))',
    ),
    "writes its memory": (
        "y.data.neg_()", "y.detach().numpy()[:] *= -1", "y.data = -y.data", "with torch.no_grad():\n    y.neg_()",
        "np.asarray(y.detach())[:1] = 0.5", "y.detach()[:, :1].zero_()", "torch.from_dlpack(y.detach()).neg_()",
        "y.detach().resize_(0)", "y.set_(y.detach().clone())", "torch.neg(y.detach(), out=y.detach())",
    ),
    "hooks a value": (
        'if y.requires_grad:\n    y.register_hook(lambda grad: see("gradient of y", grad))',
        "if y.requires_grad:\n    y.register_hook(lambda grad: grad * 2)",
        "if y.requires_grad:\n    y.retain_grad()\n    self.kept = y",
        'if y.requires_grad:\n    y.register_post_accumulate_grad_hook(lambda t: None)',
        'if y.requires_grad:\n    see("inner", torch.autograd.grad(y.sum(), u, retain_graph=True))',
        'if y.requires_grad:\n    see("inner", torch.autograd.grad(y.sum(), y, retain_graph=True))',
        'if y.requires_grad:\n    y.grad_fn.register_hook(lambda given, grads: see("given", grads[0]))',
    ),
    "breaks off": (
        'if self.calls == 4:\n    raise ValueError("stop")', 'if self.calls > 3 and self.training:\n    raise KeyError',
        "if self.calls == 5:\n    return y", "if self.calls == 3:\n    return y, u", "if self.calls > 4:\n    return a",
    ),
    "a function of its own": (
        "y = Twice.apply(y)", "y = Negated.apply(y)", "y = Negated.apply(y.clone())",
        "y = checkpoint(F.relu, y, use_reentrant=False)", "y = checkpoint(F.relu, y, use_reentrant=True)",
        "y = torch.func.vmap(torch.tanh)(y)", "y = checkpoint({conv}, u, use_reentrant=False)",
    ),
    "calls it again": (
        "y = y + {conv}(u)", 'see("again", {conv}(u))', "y = F.relu({conv}(u))", "b = {norm}(y)", "y = {norm}(y)",
        "y = {conv}(u) + F.relu({conv}(u))",
    ),
}  # fmt: skip
CONDITIONS = ("self.calls == 4", "self.calls > 3", "self.calls % 3 == 2", "self.training", "not self.training")

#: (what it is, its first line, what follows its body, what follows each statement)
REGIONS = (
    ("region", "with torch.no_grad():", "", ""), ("region", "with torch.enable_grad():", "", ""),
    ("region", "with torch.inference_mode():", "", ""), ("region", "with torch.set_grad_enabled(False):", "", ""),
    ("autocast", 'with torch.autocast("cpu", dtype=torch.bfloat16):', "y = y.to(DTYPE)", ""),
    ("region", "with torch.autograd.graph.save_on_cpu():", "", ""),
    ("region", "with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):", "", ""),
    ("region", "with torch.autograd.forward_ad.dual_level():", "", ""),
    ("checkpoint", "def part(y):", "    return y\ny = checkpoint(part, y, use_reentrant=False)", ""),
    ("checkpoint", "def part(y):", "    return y\ny = checkpoint(part, y, use_reentrant=True)", ""),
    ("generator", "def part(y):", "y = [*part(y)][-1]", "yield y"),
    ("generator", "def part(y):", "for y in part(y):\n    pass", "yield y"),
    ("generator", "def part(y):", "self.running = part(y)\nfor y in self.running:\n    pass", "yield y"),
    ("loop", "for _ in range(2):", "", ""), ("exception", "try:", "finally:\n    self.done = True", ""),
    ("exception", "try:", "except ValueError:\n    y = -y", ""),
)  # fmt: skip
HOOKS = (
    '{conv}.register_forward_hook(lambda m, i, o: see("hook", o))', "{conv}.register_forward_hook(lambda m, i, o: -o)",
    "{conv}.register_forward_pre_hook(lambda m, i: (-i[0],))", '{norm}.register_forward_hook(Hook("norm"))',
    '{norm}.register_forward_pre_hook(lambda m, i: see("mean", m.running_mean))',
    '{norm}.register_forward_hook(lambda m, i, o: see("mean", m.running_mean))',
    '{norm}.register_forward_hook(lambda m, i, o: see("tracked", m.num_batches_tracked))',
    '{norm}.register_forward_hook(lambda m, i, o: [o, m.running_mean.neg_()][0])',
    '{conv}.register_forward_hook(functools.partial(self.saw, "partial"))', "{conv}.register_forward_hook(self.see)",
    '{norm}.register_forward_hook(functools.partial(self.saw, "partial"))', "{norm}.register_forward_hook(self.see)",
    '{conv}.register_full_backward_hook(lambda m, i, o: see("backward", o))', '{norm}.register_forward_pre_hook(Hook("pre"))',
    '{norm}.register_full_backward_hook(lambda m, i, o: see("backward", o))',
    '{conv}.register_full_backward_pre_hook(lambda m, o: see("backward", o))',
    '{conv}.weight.register_hook(lambda grad: grad * 2)', '{conv}.weight.register_hook(lambda grad: see("weight", grad))',
    "self.register_forward_hook(lambda m, i, o: None)", "self.register_forward_pre_hook(lambda m, i: (i[0] * 2,))",
    '{conv}.register_forward_hook(lambda m, i, o: see("hook", o), always_call=True)',
    "torch.nn.utils.parametrizations.weight_norm({conv})", "torch.nn.utils.prune.l1_unstructured({conv}, 'weight', 0.3)",
)  # fmt: skip
RETURNS = (
    *("return y",) * 5, "return y, a", "return {'y': y, 'a': a}", "return (y, a) if self.calls % 3 == 0 else y",
    "return y if self.calls != 4 else u", "return [y.sum(), y]", "return (y, self.kept) if self.calls > 3 else y",
)  # fmt: skip

#: How the driver calls the model; what it does between.
CALLS = {
    "train": "out = model(x)\nsee('out', out)\ntotal(out).backward()\nsee('gradient of x', x.grad)",
    "step": "out = model(x)\nsee('out', out)\ntotal(out).backward()\noptimizer.step()\noptimizer.zero_grad()",
    "eval": "with torch.no_grad():\n    see('out', model(x))",
    "inference": "with torch.inference_mode():\n    see('out', model(x))",
    "forward": "see('out', model(x))",
    "autocast": "with torch.autocast('cpu', dtype=torch.bfloat16):\n    out = model(x)\nsee('out', out)",
    "grads": "out = model(x)\nsee('gradients', torch.autograd.grad(total(out), [*model.parameters()], allow_unused=True))",
    "kept": "out = model(x)\nsee('gradient of kept', torch.autograd.grad(total(out), model.kept, allow_unused=True))",
    "retain": "out = model(x)\nmodel.kept.retain_grad()\ntotal(out).backward()\nsee('gradient of kept', model.kept.grad)",
    "hooked": "out = model(x)\nmodel.kept.register_hook(lambda g: see('gradient of kept', g))\ntotal(out).backward()",
    "loss": "out = model(x)\n(total(out) + total(model.kept)).backward()",
    "two": "out = model(x)\nlater = model(-x.detach())\n(total(out) + total(later)).backward()",
    "double": "out = model(x)\ntorch.autograd.grad(total(out), x, create_graph=True)[0].square().sum().backward()",
    "twice": "out = model(x)\ntotal(out).backward(retain_graph=True)\ntotal(out).backward()",
    "refilled": "out = model(x)\nx.data.zero_()\nsee('out', out)\nsee('kept', model.kept)\ntotal(out).backward()",
}
USUAL = ("train", "train", "train", "step", "step", "eval", "eval", "inference", "forward", "grads", "kept", "loss")
BETWEEN = (
    "model.eval()", "model.train()", "model = copy.deepcopy(model)", "model = pickle.loads(pickle.dumps(model))",
    "model = saved(model)", "model.load_state_dict(state)", "state = copy.deepcopy(model.state_dict())",
    "model.zero_grad()", "optimizer.step()", "{conv}.weight.data.neg_()", "{norm}.eval()", "{norm}.running_mean.zero_()",
    "{conv}.requires_grad_(False)", "model.requires_grad_(False)", "model.to(memory_format=torch.channels_last)",
    'see("part", {conv}({u}))', 'see("part", F.relu({conv}({u})))', 'see("part", {norm}({conv}({u})))',
    'see("report", str(model) == str(build()))', "model.held.clear()", "model.kept = None", 'see("held", model.held)',
    "handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: see('global', o))",
    "handle.remove()", "handle = nn.modules.module.register_module_forward_pre_hook(lambda m, i: None)",
    'handle = {norm}.register_forward_hook(lambda m, i, o: see("mean", m.running_mean))',
    'handle = {conv}.register_forward_hook(lambda m, i, o: o * 2)', "model.calls = 0", "{conv}.bias = None",
    'see("kept", model.kept)', 'see("kept", model.kept)', "model.kept.data.neg_()", "{conv}.weight.grad = None",
    "torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(model.parameters()) * 0.9, model.parameters())",
    "{conv}.weight = nn.Parameter({conv}.weight.detach() * 2)", "torch.nn.init.normal_({conv}.weight)",
)  # fmt: skip
INPUTS = (
    "x = rand({size})", "x = rand({size})", "x = rand({size}).requires_grad_()", "x = rand({size}).requires_grad_()",
    "x = rand({size}).flip(0)", "x = rand(4, {size})[1]", "x = rand({size}, 2)[..., 1]", "x = rand({other})",
    "x = rand({size})[:1].expand({size})", "x = rand({size}).transpose(-1, -2).contiguous().transpose(-1, -2)",
    "x = rand({size}).movedim(1, -1).contiguous().movedim(-1, 1)",
)  # fmt: skip

# ---------------------------------------------------------------- programs


@dataclass(frozen=True)
class Node:
    """A statement, or several, with what stands under it.

    Attributes:
        label: what it may disturb.
        body: statements under the first line, if it has such.
        after: what follows them.
        each: what follows each of them.
    """

    text: str
    label: str = ""
    body: tuple[Node, ...] | None = None
    after: str = ""
    each: str = ""


def lines(nodes: tuple[Node, ...], indent: int, each: str = "") -> Iterator[str]:
    def put(text):
        return ["    " * indent + line for line in text.splitlines()]

    for node in nodes:
        yield from put(node.text)
        if node.body is not None:
            yield from lines(node.body, indent + 1, node.each) if node.body else put("    pass")
            yield from put(node.after)
        yield from put(each)


def labels(nodes: tuple[Node, ...]) -> set[str]:
    return {label for n in nodes for label in ({n.label} | labels(n.body or ()))} - {""}


@dataclass(frozen=True)
class Program:
    """A program: its modules by name, and the statements of ``__init__``, ``forward`` and the driver."""

    seed: int
    modules: dict[str, str] = field(hash=False)
    init: tuple[Node, ...] = ()
    forward: tuple[Node, ...] = ()
    drive: tuple[Node, ...] = ()

    def source(self) -> str:
        """The class and the driver."""
        init, forward, drive = ("\n".join(lines(part, 2)) for part in (self.init, self.forward, self.drive))
        drive = "\n".join(lines(self.drive, 1))
        used = [
            f"        self.{name} = {made}"
            for name, made in self.modules.items()
            if re.search(rf"\b(self|model)\.{name}\b", init + forward + drive)
        ]
        return "\n".join((
            "", "class Net(nn.Module):", "    def __init__(self):", "        super().__init__()",
            "        self.calls, self.kept, self.held = 0, None, []", *used, *([init] if init else []), "",
            "    def see(self, module, inputs, output):", '        see("method", output)', "",
            "    def saw(self, name, module, *args):", "        see(name, args[-1])",
            "        self.held.append(args[-1])", "", "    def forward(self, x):", "        self.calls += 1",
            "        y = u = a = x", *([forward] if forward else []), "", "", "def drive(wrap):",
            "    keep.clear()", "    model = wrap(build())",
            "    optimizer = torch.optim.SGD(model.parameters(), 0.01)",
            "    state = copy.deepcopy(model.state_dict())", *([drive] if drive else []), "",
        ))  # fmt: skip

    def script(self, mode: str) -> str:
        """All of it, to be run as it is."""
        wrap = {"accelerate": "cf.accelerate", "compile": "compiled"}[mode]
        footer = FOOTER.format(begin=inspect.getsource(begin_at_any_size), wrap=wrap)
        return PRELUDE.replace("SEED, DTYPE, NUDGE = 0", f"SEED, DTYPE, NUDGE = {self.seed}") + self.source() + footer

    def smaller(self) -> Iterator[Program]:
        """Programs with a little less, large pieces first."""
        for part in ("drive", "forward", "init"):
            for nodes in fewer(getattr(self, part)):
                yield replace(self, **{part: nodes})
        for name, made in self.modules.items():
            for argument in re.finditer(r", \w+=('\w+'|\([^()]*\)|[^,()]+)", made):
                shorter = made[: argument.start()] + made[argument.end() :]
                yield replace(self, modules=self.modules | {name: shorter})


def fewer(nodes: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
    size = len(nodes)
    while size:
        for at in range(0, len(nodes), size):
            yield nodes[:at] + nodes[at + size :]
        size //= 2
    for at, node in enumerate(nodes):
        if node.body is not None:
            yield nodes[:at] + node.body + nodes[at + 1 :]
            for body in fewer(node.body):
                yield (*nodes[:at], replace(node, body=body), *nodes[at + 1 :])


# ---------------------------------------------------------------- writing them

PRELUDE_CODE = compile(PRELUDE, "<program>", "exec")


class Writer:
    """Writes one program; each statement is tried at once, so that shapes fit as a rule."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.seed = seed
        self.modules: dict[str, str] = {}
        self.space: dict[str, Any] = {"__name__": "program"}
        exec(PRELUDE_CODE, self.space)
        self.model = nn.Module()
        self.model.__dict__.update(calls=1, kept=None, held=[])
        self.words = {"conv": "self.none", "norm": "self.none", "other": "self.none", "u": "rand(1)"}
        self.often = rng.choice((0.0, 0.08, 0.2, 0.4))

    def fill(self, text: str, **words: str) -> str:
        words = self.words | words
        return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)

    def works(self, text: str) -> bool:
        """Whether a statement can be run here; if so it has been."""
        before = dict(self.space)
        try:
            exec(text, self.space)
            y = self.space["y"]
            if y.numel() and y.numel() < 20000:
                return True
        except Exception:
            pass
        self.space.clear()
        self.space.update(before)
        return False

    def add(self, nodes: list[Node], texts, label: str = "", tries: int = 6) -> bool:
        """Add one of ``texts`` that can be run."""
        for _ in range(tries):
            y = self.space["y"]
            text = self.fill(self.rng.choice(texts), d=str(y.dim() - 2), c=str(y.shape[1] if y.dim() > 1 else 1))
            if self.works(text):
                nodes.append(Node(text, label))
                return True
        return False

    def module(self, prefix: str, made: str) -> str | None:
        """A new module of the model, by name."""
        y = self.space["y"]
        made = self.fill(made, d=str(y.dim() - 2), c=str(y.shape[1]), f=str(y.shape[-1]))
        name = f"{prefix}{sum(n.startswith(prefix) for n in self.modules) + 1}"
        try:
            self.model.add_module(name, eval(made, self.space))
            self.model.get_submodule(name)(y.clone())
        except Exception:
            return None
        self.modules[name] = made
        return name

    def one_of(self, prefix: str, choices, tries: int = 6) -> str | None:
        found = (self.module(prefix, self.rng.choice(choices)) for _ in range(tries))
        return next((name for name in found if name), None)

    def event(self, nodes: list[Node]) -> None:
        """Perhaps something else happens here."""
        rng = self.rng
        if rng.random() < self.often:
            label = rng.choice(list(EVENTS))
            if self.add(nodes, EVENTS[label], label) and rng.random() < 0.4:
                nodes.append(Node(f"if {rng.choice(CONDITIONS)}:", label, (nodes.pop(),)))
        if rng.random() < 0.12:
            self.add(nodes, MOVES, "moves")

    def conv(self) -> str:
        rng, y = self.rng, self.space["y"]
        for _ in range(12):
            made = f"nn.Conv{{d}}d({{c}}, {rng.choice((2, 3, 4, 6))}"
            for name, choices in CONV.items():
                choice = rng.choice(choices)
                if name == "kernel_size":
                    made += f", {choice}"
                elif choice != choices[0] and rng.random() < 0.7:
                    made += f", {name}={choice}"
            if name := self.module("c", made + ")"):
                return name
        return self.module("c", f"nn.Conv{{d}}d({{c}}, {y.shape[1]}, 1)") or "none"

    def block(self, nodes: list[Node]) -> None:
        """A convolution, and what people put behind it."""
        rng = self.rng
        if rng.random() < 0.25:
            self.add(nodes, ("a = y",))
        self.add(nodes, ("u = y",))
        self.words["u"] = f"rand({', '.join(map(str, self.space['y'].shape))})"
        self.words["conv"] = f"self.{self.conv()}"
        if rng.random() < 0.12:
            return self.branches(nodes)
        self.event(nodes)
        if rng.random() < 0.12:
            self.add(nodes, ("y = F.conv{d}d(u, {conv}.weight, {conv}.bias)", "y = torch.conv{d}d(y, {conv}.weight)"))
        else:
            self.add(nodes, ("y = {conv}(u)", "y = {conv}(y)", "y = {conv}(u)"))
        self.event(nodes)
        if rng.random() < 0.55 and (norm := self.one_of("n", NORMS)):
            self.words["norm"] = f"self.{norm}"
            self.add(nodes, ("y = {norm}(y)",) if rng.random() < 0.8 else BATCH_NORM)
            self.event(nodes)
        for prefix, share, modules, functions in (
            ("p", 0.1, POOLS, POOL), ("f", 0.9, ACTIVATIONS, ACTIVATE), ("d", 0.15, DROPS, MOVES),
            ("p", 0.5, POOLS, POOL),
        ):  # fmt: skip
            if rng.random() < share:
                name = self.one_of(prefix, modules) if rng.random() < 0.5 else None
                self.add(nodes, (f"y = self.{name}(y)",) if name else functions)
                self.event(nodes)
        if rng.random() < 0.3:
            self.add(nodes, JOINS)

    def branches(self, nodes: list[Node]) -> None:
        conv = self.words["conv"]
        self.modules["c_other"] = self.modules[conv[5:]]
        self.model.c_other = eval(self.modules["c_other"], self.space)
        self.space["y"] = getattr(self.model, conv[5:])(self.space["y"])
        first, second = self.module("n", NORMS[0]), self.one_of("n", NORMS)
        n, m = f"self.{first}", f"self.{self.rng.choice((first, second))}"
        self.words |= {"norm": n, "other": "self.c_other"}
        self.add(nodes, [self.fill(text, n=n, m=m) for text in BRANCHES])
        self.event(nodes)

    def region(self, nodes: list[Node]) -> list[Node]:
        """Some of the statements in a region."""
        begin = self.rng.randrange(len(nodes) + 1)
        end = self.rng.randint(begin, len(nodes))
        label, first, after, each = self.rng.choice(REGIONS)
        return [*nodes[:begin], Node(first, label, tuple(nodes[begin:end]), after, each), *nodes[end:]]

    def write(self) -> Program:
        rng = self.rng
        d, channels = rng.choice((2, 2, 1)), rng.choice((1, 2, 3, 4))
        size = [rng.choice((1, 2, 3)), channels, *(rng.randint(6, 11) for _ in range(d))]
        clip = rng.random() < 0.15
        self.space.update(self=self.model, x=torch.ones(size), keep={})
        self.space |= {"y": self.space["x"], "u": self.space["x"], "a": self.space["x"]}
        nodes: list[Node] = []
        if rng.random() < 0.15:
            self.add(nodes, MOVES, "moves")
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            if self.space["y"].dim() in (3, 4):
                self.block(nodes)
        while rng.random() < 0.3:
            nodes = self.region(nodes)
        if clip:
            after = "    ys.append(y)\ny = torch.stack(ys, 1)"
            nodes = [Node("ys = []"), Node("for u in x.unbind(1):\n    y = u", "", tuple(nodes), after)]
            self.space["y"] = torch.stack([self.space["y"]] * 2, 1)
            size = [size[0], 2, *size[1:]]
        if rng.random() < 0.6:
            self.add(nodes, BRIDGES)
            if rng.random() < 0.6 and (name := self.one_of("l", HEADS)):
                self.add(nodes, (f"y = self.{name}(y)", f"y = self.{name}(y)[0]"))
                self.add(nodes, ("y = y[0]", "pass"))
        nodes.append(Node(rng.choice(RETURNS)))
        init: list[Node] = []
        if rng.random() < 0.3:
            self.add(init, HOOKS, "hooks")
        if rng.random() < 0.05 and "c2" in self.modules:
            init.append(Node("self.c2.weight = self.c1.weight", "tied weights"))
        return Program(self.seed, self.modules, tuple(init), tuple(nodes), tuple(self.driver(size, nodes)))

    def driver(self, size: list[int], forward: list[Node]) -> list[Node]:
        """Five to eight calls, most of one kind, and what happens between them."""
        rng, nodes = self.rng, []
        keeps = any("self.kept" in line for line in lines(tuple(forward), 0))
        calls = {name: call for name, call in CALLS.items() if keeps or "model.kept" not in call}
        habit = rng.choice([name for name in USUAL if name in calls])
        usual, between = rng.choice(INPUTS[:4]), rng.choice((0.1, 0.3, 0.5))
        if rng.random() < 0.3 or habit in ("eval", "inference"):
            nodes.append(Node("model.eval()"))
        words = {"size": str(size)[1:-1], "other": str([size[0] + 1, *size[1:-1], size[-1] + 2])[1:-1]}
        words |= {name: self.words[name].replace("self.", "model.") for name in ("conv", "norm")}
        for _ in range(rng.randint(5, 8)):
            nodes.append(Node(self.fill(usual if rng.random() < 0.8 else rng.choice(INPUTS), **words)))
            call = calls[habit if rng.random() < 0.75 else rng.choice(list(calls))]
            body = tuple(map(Node, ("model.zero_grad()", *call.splitlines())))
            if call.startswith("with"):
                body = (Node(call),)
            nodes.append(Node("with caught():", "", body))
            if rng.random() < between:
                text = self.fill(rng.choice(BETWEEN), **words)
                nodes.append(Node("with caught():", "between calls", (Node(text),)))
            nodes.append(Node("look(model)" if rng.random() < 0.8 else 'see("x", x)'))
        return [*nodes, Node('see("held", model.held)'), Node("look(model)")]


# ---------------------------------------------------------------- running them

GLOBAL_HOOKS = [
    value for name, value in vars(nn.modules.module).items() if name.startswith("_global_") and "hooks" in name
]  # fmt: skip


def plain(model: nn.Module) -> nn.Module:
    return model


def compiled(backend: str) -> Callable[[nn.Module], nn.Module]:
    def wrap(model):
        torch._dynamo.reset()
        model.compile(backend=backend)
        return model

    return wrap


def execute(code, wrap, seed: int, dtype: torch.dtype = torch.float32, nudge: float = 0.0) -> list[tuple]:
    """What is seen when a program runs with a model that ``wrap`` has made of its own."""
    space = sys.modules["program"] = types.ModuleType("program")
    exec(PRELUDE_CODE, space.__dict__)
    space.__dict__.update(SEED=seed, DTYPE=dtype, NUDGE=nudge)
    exec(code, space.__dict__)
    space.NOISE.manual_seed(seed + int(nudge * 1e12))
    try:
        space.drive(wrap)
    except Exception as error:
        space.see("raised", type(error))
    finally:
        for hooks in GLOBAL_HOOKS:
            if isinstance(hooks, dict):
                hooks.clear()
        torch.set_grad_enabled(True)
    return space.seen


def far(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of a difference; infinite where NaN or infinities stand elsewhere."""
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return float("inf")
    return (mine[finite].double() - theirs[finite].double()).norm().item()


def kind_of(name: str) -> str:
    return name.split()[0]


class Judge:
    """Compares what was seen with what a plain run sees."""

    def __init__(self, code, seed: int, low: bool):
        self.code, self.seed = code, seed
        self.eps = torch.finfo(torch.bfloat16 if low else torch.float32).eps
        self.plain = execute(code, plain, seed)
        self.ways: list[list[tuple]] = []
        self.floors: collections.Counter[str] = collections.Counter()
        for name, value in self.plain:
            if isinstance(value, tuple) and value[2].is_floating_point() and kind_of(name) == "gradient":
                norm = value[2][value[2].isfinite()].double().norm().item()
                self.floors["gradient"] = max(self.floors["gradient"], norm)

    def difference(self, seen: list[tuple]) -> tuple[str, str] | None:
        """What differs first, as its kind and in words."""
        for (name, value), (other, found) in zip(self.plain, seen, strict=False):
            if name != other:
                what = f"{found.__name__} is raised" if other == "raised" else f"{other!r} is seen"
                return "raises" if "raised" in (name, other) else "other answers", f"{what} where {name!r} was"
            if name == "raised" and not issubclass(found, value):
                return "raises", f"{found.__name__} is raised where {value.__name__} was"
            if name == "raised":
                continue
            if not (isinstance(value, tuple) and isinstance(found, tuple)):
                if type(value) is not type(found) or value != found:
                    return "other answers", f"{name}: {found!r} where {value!r} was"
            elif (why := self.unlike(value, found)) is not None:
                return "other answers", f"{name}: {why}"
        if len(self.plain) != len(seen):
            return "other answers", f"{len(seen)} values are seen where {len(self.plain)} were"
        for at, ((name, value), (_, found)) in enumerate(zip(self.plain, seen, strict=True)):
            if isinstance(value, tuple) and (why := self.wrong(at, name, found[2])):
                return "other values", f"{name}: {why}"
        return None

    @staticmethod
    def unlike(value: tuple, found: tuple) -> str | None:
        for what, one, two in (
            ("needs a gradient", value[0], found[0]), ("dtype", value[2].dtype, found[2].dtype),
            ("shape", value[2].shape, found[2].shape), ("strides", value[1], found[1]),
        ):  # fmt: skip
            if one != two:
                return f"{what}: {two} where {one} was"
        return None

    def wrong(self, at: int, name: str, mine: torch.Tensor) -> str | None:
        value = self.plain[at][1][2]
        if not value.is_floating_point():
            return None if torch.equal(mine, value) else f"{mine.tolist()} where {value.tolist()} was"
        floor = self.floors[kind_of(name)]
        slack = 16 * self.eps * max(value.double().norm().nan_to_num(0, 0, 0).item(), floor)
        if far(mine, value) <= slack:  # so it is within the rule too
            return None
        if not self.ways:
            self.ways = [execute(self.code, plain, self.seed, torch.float64)]
            self.ways += [execute(self.code, plain, self.seed, nudge=self.eps * k) for k in (0.3, 0.5, 0.7, 1, 2, 4)]
            self.ways = [way for way in self.ways if [n for n, _ in way] == [n for n, _ in self.plain]]
        ways = [value, *(v[2] for way in self.ways if isinstance(v := way[at][1], tuple))]
        ways = [way for way in ways if way.shape == value.shape]
        true = next((way for way in ways if way.dtype == torch.float64), value)
        error, own = far(mine, true), max(far(way, true) for way in ways)
        if error <= 2 * own + slack:
            return None
        return f"off by {error:.3g} where PyTorch's own error is {own:.3g}, of {value.double().norm():.3g}"


class Runner:
    """Runs programs in all modes, and counts."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def fails(self, program: Program, mode: str, seeds: int = 2) -> tuple[str, str] | None:
        """How a program differs under a mode, if it does so with every drawing of its data."""
        source = program.source()
        try:
            code = compile(source, "<program>", "exec")
        except SyntaxError:  # of something shrunk
            return None
        models: list[nn.Module] = []

        def accelerated(model):
            models.append(cf.accelerate(model))
            return models[-1]

        wrap = accelerated if mode == "accelerate" else compiled("cnnlstm_fast")
        difference = None
        for seed in range(program.seed, program.seed + seeds):
            judge = Judge(code, seed, "bfloat16" in source)
            difference = judge.difference(execute(code, wrap, seed))
            if mode == "accelerate" and any(
                site.block.startswith("Conv") and site.plan != "PyTorch" for site in models[-1].report().sites
            ):
                self.counts["fused"] += seed == program.seed
            if difference is None:
                return None
            if mode == "compile" and judge.difference(execute(code, compiled("eager"), seed)):
                self.counts["dynamo differs"] += seed == program.seed
                return None
        return difference

    def shrink(self, program: Program, mode: str, kind: str, patience: int = 400) -> Program:
        """The smallest program found that fails in the same manner."""
        tried, smaller = 0, True
        while smaller and tried < patience:
            smaller = False
            for candidate in program.smaller():
                tried += 1
                dies = kind in ("crashes", "hangs")
                found = isolated(self.fails, candidate, mode) if dies else self.fails(candidate, mode)
                if (found[0] if found else None) == kind:
                    program, smaller = candidate, True
                    break
                if tried >= patience:
                    break
        return program


def isolated(function, *args):
    """The result of a call in a child process; how that died, if it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)
        os.write(writing, pickle.dumps(function(*args)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        sent = file.read()
    status = os.waitpid(child, 0)[1]
    if status or not sent:
        return ("hangs" if status == signal.SIGALRM else "crashes"), f"status {status}"
    return pickle.loads(sent)


# ---------------------------------------------------------------- the loop

#: Programs of one child process.
BATCH = 500


def work(asked, first: int, last: int, end: float, file, journal: Path) -> None:
    """Run programs in this process, a line of JSON for each."""
    warnings.simplefilter("ignore")
    runner = Runner()
    for at in range(first, last):
        if time.monotonic() > end:
            return
        runner.counts.clear()
        program = Writer(asked.seed * 10**6 + at).write()
        findings = []
        for mode in ("accelerate", "compile"):
            if mode == "compile" and at % COMPILED:
                continue
            journal.write_text(json.dumps({"at": at, "mode": mode}) + "\n" + program.script(mode))
            signal.alarm(PATIENCE)
            difference = runner.fails(program, mode)
            signal.alarm(0)
            runner.counts[mode] += 1
            if difference:
                kind = difference[0]
                counts = runner.counts.copy()
                findings.append(finding(at, mode, kind, program if asked.whole else runner.shrink(program, mode, kind)))
                runner.counts = counts
        print(json.dumps({"at": at, "counts": runner.counts, "findings": findings}), file=file, flush=True)


def finding(at: int, mode: str, kind: str, program: Program) -> dict:
    """What is told of a program that fails."""
    difference = isolated(Runner().fails, program, mode)
    parts = labels(program.init) | labels(program.forward) | labels(program.drive)
    return {
        "program": at, "mode": mode, "kind": kind, "with": sorted(parts),
        "difference": difference and difference[1], "script": program.script(mode),
    }  # fmt: skip


def loop(asked) -> Iterator[dict]:
    """A record for each program; a child that dies leaves one too."""
    end, at, journal = time.monotonic() + asked.seconds, asked.first, asked.journal
    records = journal.with_suffix(".jsonl")
    while at < asked.first + asked.programs and time.monotonic() < end:
        last = min(at + BATCH, asked.first + asked.programs)
        journal.unlink(missing_ok=True)
        child = os.fork()
        if not child:
            try:
                with open(records, "w") as file:
                    work(asked, at, last, end, file, journal)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        for line in records.read_text().splitlines():
            yield (record := json.loads(line))
            at = record["at"] + 1
        if os.WIFSIGNALED(status):
            at, mode = json.loads(journal.read_text().splitlines()[0]).values()
            program, kind = Writer(asked.seed * 10**6 + at).write(), "crashes"
            if os.WTERMSIG(status) == signal.SIGALRM:
                kind = "hangs"
            elif not asked.whole:
                program = Runner().shrink(program, mode, kind, 100)
            yield {"at": at, "counts": {mode: 1}, "findings": [finding(at, mode, kind, program)]}
            at += 1
        elif status:
            raise SystemExit(f"the fuzzer itself failed; {journal} has the program")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CNNLSTM_FAST_SEED", "0")))
    parser.add_argument("--first", type=int, default=0, help="the program to begin with")
    parser.add_argument("--most", type=int, default=10, help="stop after so many that fail")
    parser.add_argument("--whole", action="store_true", help="do not shrink")
    parser.add_argument("--journal", type=Path, default=ROOT / "build" / "program.py")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "programs.json")
    asked = parser.parse_args()
    for path in (asked.journal, asked.output):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    begin_at_any_size()
    start, counts, findings, ran = time.monotonic(), collections.Counter(), [], 0
    for record in loop(asked):
        ran += 1
        counts.update(record["counts"])
        for found in record["findings"]:
            findings.append(found)
            print(f"program {found['program']}, {found['mode']}: {found['kind']}, with {found['with']}: "
                  f"{found['difference']}\n" + found["script"].split("class Net")[1].split("\nimport os")[0], flush=True)  # fmt: skip
        if len(findings) >= asked.most:
            break
    seconds = time.monotonic() - start
    classes: dict[str, dict] = {}
    for found in findings:
        key = f"{found['mode']}: {found['kind']}, {' and '.join(found['with']) or 'nothing'}"
        if key not in classes:
            classes[key] = {"programs": 0, "first": found["program"]} | found
        classes[key]["programs"] += 1
        if len(found["script"]) < len(classes[key]["script"]):
            classes[key] |= found
    result = {
        "date": str(datetime.date.today()), "seed": asked.seed, "programs": ran, "seconds": round(seconds),
        "programs a second": round(ran / seconds, 1), "failed": len({f["program"] for f in findings}),
        "counts": dict(sorted(counts.items())), "torch": torch.__version__, "python": platform.python_version(),
        "processor": platform.machine(), "instruction set": torch.ops.cnnlstm_fast.isa(), 
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "classes": dict(sorted(classes.items())),
    }  # fmt: skip
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "classes"}))
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
