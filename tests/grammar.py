"""The grammar of tests/programs.py: what every program begins with, and tables of what may stand in one.

Statements are source text. ``{d}`` is 1 or 2 and ``{c}`` the channels of ``y``, the value at hand; ``{conv}``
and ``{norm}`` are the block's modules, ``u`` the input of its convolution, ``a`` a value held before.
"""

from __future__ import annotations

# ---------------------------------------------------------------- what every program begins with

PRELUDE = '''\
import contextlib, copy, ctypes, functools, io, pickle, threading, traceback, types, weakref
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

SEED, DTYPE, NUDGE = 0, torch.float32, 0.0
NOISE = torch.Generator()
seen, keep, places = [], {}, []


def see(name, value):
    """Note a value as it is now."""
    if isinstance(value, torch.Tensor):
        strides = [s for s, size in zip(value.stride(), value.shape) if size > 1]
        value = value.requires_grad, strides, value.detach().clone()
    elif isinstance(value, (tuple, list)):
        for part in value:
            see(name, part)
        return
    elif isinstance(value, dict):
        return see(name, [*value.values()])
    elif isinstance(value, types.FunctionType):
        return see(name, value())
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
        frames = [*traceback.walk_tb(error.__traceback__)]
        functions = {frame.f_code.co_name for frame, _ in frames}
        own = [line for frame, line in frames if frame.f_code.co_filename == see.__code__.co_filename]
        places.append(own[1:])
        see("raised in backward" if {"backward", "grad"} & functions else "raised", type(error))


def nudged(t):
    return (t * (1 + NUDGE * torch.randn(t.shape, generator=NOISE))).to(t.dtype) if NUDGE else t


def rand(*shape):
    torch.default_generator.manual_seed(SEED + len(seen))
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


class Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        for value in args:
            if isinstance(value, torch.Tensor):
                value.shape, value.dtype, value.is_sparse
        return function(*args, **(kwargs or {}))


class Hook:
    def __init__(self, name):
        self.name, self.calls = name, 0

    def __call__(self, module, *args):
        self.calls += 1
        see(f"{self.name} {self.calls}", args[-1])


def build():
    torch.default_generator.manual_seed(SEED)
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

FOOTER = """
import os, sys
os.environ["CNNLSTM_FAST_LEAST"] = "1"
import cnnlstm_fast as cf
from torch.utils import _pytree as pytree

{begin}

def compiled(model):
    model.compile(backend="cnnlstm_fast")
    return model


torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
begin_at_any_size()
runs = []
for wrap in ({plain}, {wrap}):
    seen.clear()
    with caught():
        drive(wrap)
    runs.append(list(seen))
print(len(runs[0]), "and", len(runs[1]), "values seen; those that differ:")
for (name, plain), (other, fast) in zip(*runs):
    if isinstance(plain, tuple) and isinstance(fast, tuple):
        if plain[:2] != fast[:2] or not torch.allclose(plain[2], fast[2], 1e-4, 1e-5, equal_nan=True):
            print(name, *plain, "but", other, *fast)
    elif name != other or type(plain) is not type(fast) or plain != fast:
        print(name, plain, "but", other, fast)
"""

# ---------------------------------------------------------------- the grammar

CONV = {
    "kernel_size": ("1", "2", "3", "3", "3", "5"), "stride": ("1", "1", "1", "2"),
    "padding": ("0", "1", "1", "2", "'same'", "'valid'"), "dilation": ("1", "1", "1", "2"),
    "groups": ("1", "1", "1", "2", "{c}"), "bias": ("True", "True", "False"),
    "padding_mode": ("'zeros'",) * 6 + ("'reflect'", "'circular'", "'replicate'"),
}  # fmt: skip
CONVOLVE = ("y = F.conv{d}d(u, {conv}.weight, {conv}.bias)", "y = torch.conv{d}d(y, {conv}.weight)")
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
    "nn.GELU('tanh')", "nn.Identity()", "nn.Mish()", "nn.Mish(inplace=True)", "nn.Softplus()",
    "nn.Softplus(2.5)", "nn.Hardswish()", "nn.Hardswish(inplace=True)", "nn.Hardsigmoid()",
    "nn.Hardsigmoid(inplace=True)", "nn.PReLU()", "nn.SELU()", "nn.CELU()", "nn.Softsign()", "nn.GLU(1)",
    "nn.LogSigmoid()",
)  # fmt: skip
ACTIVATE = (
    *("y = F.relu(y)",) * 3, "y = torch.relu(y)", "y = y.relu()", "y = F.relu_(y)", "F.relu_(y)", "y.relu_()",
    "y = torch.relu_(y)", "y = F.relu(y, inplace=True)", "F.relu(y, inplace=True)", "y = F.relu(input=y)",
    "y = F.leaky_relu(y, 0.2)", "F.leaky_relu_(y)", "y = F.leaky_relu(y, -1.0)", "y = F.elu(y)", "F.elu_(y)",
    "y = F.hardtanh(y)", "F.hardtanh_(y)", "y = F.relu6(y)", "y = torch.tanh(y)", "y.tanh_()",
    "y = y.sigmoid()", "torch.sigmoid_(y)", "y = F.silu(y)", "F.silu(y, inplace=True)", "y = F.gelu(y)",
    "y = F.gelu(y, approximate='tanh')", "y = y.clamp(min=0)", "y.clamp_(min=0)", "y = y * torch.sigmoid(y)",
    "y = y.abs()", "y = F.softplus(y)", "y = F.softplus(y, beta=-0.5)", "y = F.threshold(y, 0.1, 0.0)",
    "y = torch.where(y > 0, y, 0.1 * y)",
    "y = torch.maximum(y, torch.zeros_like(y))", "y = F.glu(y, 1)", "y = -F.relu(-y)", "y = F.mish(y)",
    "F.mish(y, inplace=True)", "y = F.hardswish(y)", "F.hardswish(y, inplace=True)", "y = F.hardsigmoid(y)",
    "y = F.hardsigmoid(input=y, inplace=True)", "y = F.relu6(y + 3) / 6", "y = F.softsign(y)",
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
SUMS = (  # of a block and another value of its shape, before what follows: `other` is a convolution alike
    "y = y + u", "y += u", "y = u + y", "y = torch.add(y, u, alpha=0.5)", "y = y.add(u)",
    "y.add_(u, alpha=-1)",
    "y = torch.add(u, y)", "y += a", "y = a + y", "y = y + x", "u += y\ny = u", "y = torch.add(y, other=u)",
    "y = y + {other}(u)", "y += {other}(u)", "y = {other}(u) + y",
    "b = {other}(u)\ny = torch.add(y, b, alpha=2)",
    "y += {m}({other}(u))", "y = {m}({other}(u)) + y", "b = {m}({other}(u))\ny = y + b", "y.add_({other}(u))",
    "y = y + F.relu({other}(u))", "y = y + y", "y += y.detach()", "y = y + {other}(u)[:1]", "y += 1.0",
    "y = y + 0.5 * {other}(u)", "b = {other}(u)\ny = y + b + u",
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
    "y = y.flatten(2).mean(2)", "y = y.flatten(1)", "y = torch.flatten(y, 1)",
    "y = y.reshape(y.shape[0], -1)",
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
        "y.tag = 7", 'see("tag", getattr(y, "tag", None))',
        'b = y\ny = y.relu_()\nsee("same", id(y) == id(b))',
        'see("same", y in [1, y] if y.numel() == 1 else any(y is b for b in [y]))',
        'b = weakref.ref(y)\nsee("same", b() is y)', 'keep[id(y)] = y\nsee("same", keep.pop(id(y)) is y)',
    ),
    "asks for more": (
        'see("shape", [*y.shape, y.dim(), y.numel()])', 'see("stride", [*y.stride(), y.is_contiguous()])',
        'see("grad", [y.requires_grad, y.is_leaf, y.grad_fn is None])',
        'see("dtype", str(y.dtype) if DTYPE is torch.float32 else None)',
        'see("type", isinstance(y, nn.Parameter))', 'see("offset", y.storage_offset())',
        'see("length", len(y))', 'see("base", y.is_inference())', 'see("hash", hash(y) == hash(y))',
    ),
    "reads the value": (
        'see("y", y)', 'see("sum", y.sum())', 'see("any", bool((y > 1e4).any()))', 'see("max", y.max())',
        'see("copy", copy.copy(y.detach()))', 'see("copy", copy.deepcopy(y.detach()))', 'repr(y)',
        'see("slice", y[0])', 'see("saved", saved(y.detach()))', 'see("late", a)',
        'see("norm", torch.linalg.vector_norm(y))', 'b = torch.empty_like(y).copy_(y)\nsee("b", b)',
    ),
    "reads its memory": (
        "if not y.requires_grad:\n    see('dlpack', torch.from_dlpack(torch.utils.dlpack.to_dlpack(y)))",
        "if not y.requires_grad:\n    see('array', torch.tensor(np.asarray(y)))",
        "if not y.requires_grad:\n    see('dlpack', np.from_dlpack(y).shape)",
        'see("dlpack", torch.from_dlpack(torch.utils.dlpack.to_dlpack(y.detach())))',
        'see("dlpack", torch.from_dlpack(y.detach()))',
        'see("array", float(np.asarray(y.detach()).sum()) > 1e9)',
        'see("array", torch.from_numpy(y.detach().numpy()))', 'see("raw", raw(y))',
        'see("list", len(y.tolist()))',
        'see("storage", y.untyped_storage().nbytes() // y.element_size())', 'see("raw", raw(y.detach()))',
        'see("pointer", y.data_ptr() == y.detach().data_ptr())',
        'see("array", torch.tensor(y.detach().numpy()))',
        'see("storage", torch.empty(0, dtype=y.dtype).set_(y.detach().untyped_storage()))',
    ),
    "writes its memory": (
        "y.data.neg_()", "y.detach().numpy()[:] *= -1", "y.data = -y.data",
        "with torch.no_grad():\n    y.neg_()",
        "np.asarray(y.detach())[:1] = 0.5", "y.detach()[:, :1].zero_()",
        "torch.from_dlpack(y.detach()).neg_()",
        "y.detach().resize_(0)", "y.set_(y.detach().clone())", "torch.neg(y.detach(), out=y.detach())",
    ),
    "hooks a value": (
        'if y.requires_grad:\n    y.register_hook(lambda grad: see("gradient of y", grad))',
        "if y.requires_grad:\n    y.register_hook(lambda grad: grad * 2)",
        "if y.requires_grad:\n    y.retain_grad()\n    self.kept = y",
        'if y.requires_grad:\n    y.register_post_accumulate_grad_hook(lambda t: None)',
        'if y.requires_grad:\n    see("gradient inside", torch.autograd.grad(y.sum(), u, retain_graph=True))',
        'if y.requires_grad:\n    see("gradient inside", torch.autograd.grad(y.sum(), y, retain_graph=True))',
        'if y.requires_grad:\n    y.grad_fn.register_hook(lambda _, grads: see("gradient given", grads[0]))',
    ),
    "breaks off": (
        'if self.calls == 4:\n    raise ValueError("stop")',
        'if self.calls > 3 and self.training:\n    raise KeyError',
        "if self.calls == 5:\n    return y", "if self.calls == 3:\n    return y, u",
        "if self.calls > 4:\n    return a",
    ),
    "a function of its own": (
        "y = Twice.apply(y)", "y = Negated.apply(y)", "y = Negated.apply(y.clone())",
        "y = checkpoint(F.relu, y, use_reentrant=False)", "y = checkpoint(F.relu, y, use_reentrant=True)",
        "y = torch.func.vmap(torch.tanh)(y)", "y = checkpoint({conv}, u, use_reentrant=False)",
    ),
    "calls it again": (
        "y = y + {conv}(u)", 'see("again", {conv}(u))', "y = F.relu({conv}(u))", "b = {norm}(y)",
        "y = {norm}(y)",
        "y = {conv}(u) + F.relu({conv}(u))",
    ),
}  # fmt: skip
CONDITIONS = (
    "self.calls == 4",
    "self.calls > 3",
    "self.calls % 3 == 2",
    "self.training",
    "not self.training",
)

#: (what it is, its first line, what follows its body, what follows each statement)
REGIONS = (
    ("region", "with torch.no_grad():", "", ""), ("region", "with torch.enable_grad():", "", ""),
    ("region", "with torch.inference_mode():", "", ""),
    ("region", "with torch.set_grad_enabled(False):", "", ""),
    ("autocast", 'with torch.autocast("cpu", dtype=torch.bfloat16):', "y = y.to(DTYPE)", ""),
    ("region", "with torch.autograd.graph.save_on_cpu():", "", ""),
    ("region", "with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):", "", ""),
    ("region", "with torch.autograd.forward_ad.dual_level():", "", ""),
    ("region", "with Watch():", "", ""),
    (
        "checkpoint", "def part(y, u=u, a=a):",
        "    return y\ny = checkpoint(part, y, use_reentrant=False)", "",
    ),
    ("checkpoint", "def part(y, u=u, a=a):", "    return y\ny = checkpoint(part, y, use_reentrant=True)", ""),
    ("generator", "def part(y):", "y = [*part(y)][-1]", "yield y"),
    ("generator", "def part(y):", "for y in part(y):\n    pass", "yield y"),
    ("generator", "def part(y):", "self.running = part(y)\nfor y in self.running:\n    pass", "yield y"),
    ("loop", "for _ in range(2):", "", ""), ("exception", "try:", "finally:\n    self.done = True", ""),
    ("exception", "try:", "except ValueError:\n    y = -y", ""),
)  # fmt: skip
HOOKS = (
    '{conv}.register_forward_hook(lambda m, i, o: see("hook", o))',
    "{conv}.register_forward_hook(lambda m, i, o: -o)",
    "{conv}.register_forward_pre_hook(lambda m, i: (-i[0],))", '{norm}.register_forward_hook(Hook("norm"))',
    '{norm}.register_forward_pre_hook(lambda m, i: see("mean", m.running_mean))',
    '{norm}.register_forward_hook(lambda m, i, o: see("mean", m.running_mean))',
    '{norm}.register_forward_hook(lambda m, i, o: see("tracked", m.num_batches_tracked))',
    '{norm}.register_forward_hook(lambda m, i, o: [o, m.running_mean.neg_()][0])',
    '{conv}.register_forward_hook(functools.partial(self.saw, "partial"))',
    "{conv}.register_forward_hook(self.see)",
    '{norm}.register_forward_hook(functools.partial(self.saw, "partial"))',
    "{norm}.register_forward_hook(self.see)",
    '{conv}.register_full_backward_hook(lambda m, i, o: see("gradient behind", o))',
    '{norm}.register_forward_pre_hook(Hook("pre"))',
    '{norm}.register_full_backward_hook(lambda m, i, o: see("gradient behind", o))',
    '{conv}.register_full_backward_pre_hook(lambda m, o: see("gradient behind", o))',
    '{conv}.weight.register_hook(lambda grad: grad * 2)',
    '{conv}.weight.register_hook(lambda grad: see("gradient of weight", grad))',
    "self.lock = threading.Lock()", "self.near = weakref.proxy({conv})",
    "{conv}.forward = functools.partial(type({conv}).forward, {conv})",
    '{conv}.register_load_state_dict_post_hook(lambda m, keys: see("loaded", type(m) is type(self.c1)))',
    "{conv}._conv_forward = functools.partial(type({conv})._conv_forward, {conv})",
    "self.register_forward_hook(lambda m, i, o: None)",
    "self.register_forward_pre_hook(lambda m, i: (i[0] * 2,))",
    '{conv}.register_forward_hook(lambda m, i, o: see("hook", o), always_call=True)',
    "torch.nn.utils.parametrizations.weight_norm({conv})",
    "torch.nn.utils.prune.l1_unstructured({conv}, 'weight', 0.3)",
)  # fmt: skip
RETURNS = (
    *("return y",) * 5, "return y, a", "return {'y': y, 'a': a}",
    "return (y, a) if self.calls % 3 == 0 else y",
    "return y if self.calls != 4 else u", "return [y.sum(), y]",
    "return (y, self.kept) if self.calls > 3 else y",
)  # fmt: skip

#: How the driver calls the model: what it does with ``out``, or all of it where that is a "with".
CALLS = {
    "train": "see('out', out)\ntotal(out).backward()\nsee('gradient of x', x.grad)",
    "step": "see('out', out)\ntotal(out).backward()\noptimizer.step()\noptimizer.zero_grad()",
    "eval": "with torch.no_grad():\n    see('out', model(x))",
    "inference": "with torch.inference_mode():\n    see('out', model(x))",
    "forward": "see('out', out)",
    "autocast": "with torch.autocast('cpu', dtype=torch.bfloat16):\n    see('out', model(x))",
    "grads": "found = torch.autograd.grad(total(out), [*model.parameters()], allow_unused=True)\n"
    "see('gradients', found)",
    "kept": "see('gradient of kept', torch.autograd.grad(total(out), model.kept, allow_unused=True))",
    "retain": "model.kept.retain_grad()\ntotal(out).backward()\nsee('gradient of kept', model.kept.grad)",
    "hooked": "model.kept.register_hook(lambda g: see('gradient of kept', g))\ntotal(out).backward()",
    "loss": "(total(out) + total(model.kept)).backward()",
    "two": "later = model(-x.detach())\n(total(out) + total(later)).backward()",
    "double": "grads = torch.autograd.grad(total(out), x, create_graph=True)\ntotal(grads).backward()",
    "mutated": "out.mul_(0.5)\nsee('out', out)\ntotal(out).backward()\nsee('gradient of x', x.grad)",
    "functional": "changed = {k: -v.detach() for k, v in model.named_parameters()}\n"
    "see('out', torch.func.functional_call(model, changed, x))",
    "twice": "total(out).backward(retain_graph=True)\ntotal(out).backward()",
    "refilled": "x.data.zero_()\nsee('out', out)\nsee('kept', model.kept)\ntotal(out).backward()",
}
ORDINARY = ("train", "step", "eval", "inference", "forward", "grads")
#: What most calls of a program may be.
USUAL = (*ORDINARY, "train", "train", "step", "eval", "kept", "loss", "mutated")
BETWEEN = (
    "model.eval()", "model.train()", "model = copy.deepcopy(model)",
    "model = pickle.loads(pickle.dumps(model))",
    "model = saved(model)", "model.load_state_dict(state)", "state = copy.deepcopy(model.state_dict())",
    "model.zero_grad()", "optimizer.step()", "{conv}.weight.data.neg_()", "{norm}.eval()",
    "{norm}.running_mean.zero_()",
    "{conv}.requires_grad_(False)", "model.requires_grad_(False)",
    "model.to(memory_format=torch.channels_last)",
    'see("part", {conv}({u}))', 'see("part", F.relu({conv}({u})))', 'see("part", {norm}({conv}({u})))',
    'see("report", str(model) == str(build()))', "model.held.clear()", "model.kept = None",
    'see("held", model.held)',
    "handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: see('global', o))",
    "handle.remove()", "handle = nn.modules.module.register_module_forward_pre_hook(lambda m, i: None)",
    'handle = {norm}.register_forward_hook(lambda m, i, o: see("mean", m.running_mean))',
    'handle = {conv}.register_forward_hook(lambda m, i, o: o * 2)', "model.calls = 0", "{conv}.bias = None",
    'see("kept", model.kept)', 'see("kept", model.kept)', "model.kept.data.neg_()",
    "{conv}.weight.grad = None",
    "for p in model.parameters():\n    p.data = p.data * 0.9",
    "{conv}.weight = nn.Parameter({conv}.weight.detach() * 2)", "torch.nn.init.normal_({conv}.weight)",
)  # fmt: skip
INPUTS = (
    "x = rand({size})", "x = rand({size})", "x = rand({size}).requires_grad_()",
    "x = rand({size}).requires_grad_()",
    "x = rand({size}).flip(0)", "x = rand(4, {size})[1]", "x = rand({size}, 2)[..., 1]", "x = rand({other})",
    "x = rand({size})[:1].expand({size})",
    "x = rand({size}).transpose(-1, -2).contiguous().transpose(-1, -2)",
    "x = rand({size}).movedim(1, -1).contiguous().movedim(-1, 1)",
)  # fmt: skip
