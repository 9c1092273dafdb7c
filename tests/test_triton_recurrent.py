"""The Triton kernels of recurrent layers: in Triton's interpreter on any machine, compiled on a CUDA device.

What is expected comes from a loop over steps written here, in float64; PyTorch's own error is that of
the same loop in the dtype at hand, since its own layers take neither resets nor lengths.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import SEED, STRIDED, assert_close_as_torch, strided
from interpreted import interpreter_and_cuda, kernels_of, launch_in_bounds, no_launch, with_open_sizes
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton")
# In the interpreter a case takes a tenth of a second or more.
pytestmark = [pytest.mark.usefixtures("float32_means_float32"), pytest.mark.some(10), pytest.mark.share(3)]

MODES = {"LSTM": 0, "GRU": 1}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
modes = pytest.mark.parametrize("mode", ["LSTM", "GRU"])


@dataclass(frozen=True)
class Layer:
    """A recurrent layer and its input's sizes; ``width`` is the input's features."""

    mode: str
    batch: int
    steps: int
    width: int
    hidden: int
    directions: int = 1
    batch_first: bool = False
    bias: bool = True
    state: str = "both"  # which initial states are given: "none", "h", "c" (LSTM only) or "both"
    reset: bool = False
    lengths: bool = False

    @property
    def gates(self) -> int:
        return 4 if self.mode == "LSTM" else 3

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Everything a call takes, the ten weights under their names in the op's schema."""
        d, b, h = self.directions, self.batch, self.hidden
        leading = (b, self.steps) if self.batch_first else (self.steps, b)
        found = {"x": torch.randn(*leading, self.width)}
        if self.state in ("h", "both"):
            found["h0"] = torch.randn(d, b, h)
        if self.mode == "LSTM" and self.state in ("c", "both"):
            found["c0"] = torch.randn(d, b, h)
        for end in ("", "_r")[:d]:
            found[f"w_ih{end}"] = torch.randn(self.gates * h, self.width) * (0.8 / self.width**0.5)
            found[f"w_hh{end}"] = torch.randn(self.gates * h, h) * (0.8 / h**0.5)
            if self.bias:
                found[f"b_ih{end}"], found[f"b_hh{end}"] = torch.randn(2, self.gates * h).mul(0.5).unbind()
        found = {name: t.to(dtype) for name, t in found.items()}
        if self.reset:
            found["reset"] = torch.rand(leading) < random.choice((0.02, 0.2, 0.7))
        if self.lengths:
            found["lengths"] = torch.randint(random.choice((0, self.steps // 2, 1)), self.steps + 1, (b,))
        return found

    def grads(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """Gradients of out, h_n and c_n."""
        d, b, h = self.directions, self.batch, self.hidden
        leading = (b, self.steps) if self.batch_first else (self.steps, b)
        out, states = torch.randn(*leading, d * h).to(dtype), torch.randn(2, d, b, h).to(dtype)
        return out, states[0], states[1] if self.mode == "LSTM" else None


WEIGHTS = [f"{name}{end}" for end in ("", "_r") for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")]
INPUTS = ["x", "h0", "c0", *WEIGHTS]


def loop(layer: Layer, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """(out, h_n, c_n or None) by one step after the other, in the dtype of the tensors."""
    x = tensors["x"].transpose(0, 1) if layer.batch_first else tensors["x"]
    reset, lengths = tensors.get("reset"), tensors.get("lengths")
    if reset is not None and layer.batch_first:
        reset = reset.t()
    zero = x.new_zeros(layer.batch, layer.hidden)
    outs, hs, cs = [], [], []
    for d, end in enumerate(("", "_r")[: layer.directions]):
        w_ih, w_hh = tensors[f"w_ih{end}"], tensors[f"w_hh{end}"]
        b_ih, b_hh = tensors.get(f"b_ih{end}"), tensors.get(f"b_hh{end}")
        h = tensors["h0"][d] if "h0" in tensors else zero
        c = tensors["c0"][d] if "c0" in tensors else zero
        steps = range(layer.steps)
        found = [zero] * layer.steps
        for t in reversed(steps) if d else steps:
            valid = torch.ones_like(zero[:, :1]).bool() if lengths is None else (t < lengths)[:, None]
            if reset is None:
                before_h, before_c = h, c
            else:
                before_h, before_c = (s.where(~reset[t][:, None], zero) for s in (h, c))
            of_x = torch.nn.functional.linear(x[t], w_ih, b_ih).chunk(layer.gates, 1)
            of_h = torch.nn.functional.linear(before_h, w_hh, b_hh).chunk(layer.gates, 1)
            if layer.mode == "LSTM":
                i, f, g, o = (a + b for a, b in zip(of_x, of_h, strict=True))
                new_c = torch.sigmoid(f) * before_c + torch.sigmoid(i) * torch.tanh(g)
                new_h = torch.sigmoid(o) * torch.tanh(new_c)
                c = new_c.where(valid, c)
            else:
                r, z = (torch.sigmoid(a + b) for a, b in zip(of_x[:2], of_h[:2], strict=True))
                n = torch.tanh(of_x[2] + r * of_h[2])
                new_h = (1 - z) * n + z * before_h
            h = new_h.where(valid, h)
            found[t] = new_h.where(valid, zero)
        outs.append(torch.stack(found))
        hs.append(h)
        cs.append(c)
    out = torch.cat(outs, -1)
    out = out.transpose(0, 1) if layer.batch_first else out
    return out, torch.stack(hs), torch.stack(cs) if layer.mode == "LSTM" else None


def by_loop(layer: Layer, tensors: dict[str, Tensor], grads, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results and gradients of :func:`loop` in a dtype."""
    leaves = {
        name: t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    results = loop(layer, leaves)
    pairs = [(r, g.to(dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
    wanted = [name for name in INPUTS if name in leaves]
    found = torch.autograd.grad(
        [r for r, _ in pairs], [leaves[name] for name in wanted], [g for _, g in pairs]
    )
    named = dict(zip(("out", "h_n", "c_n"), (r for r in results if r is not None), strict=False))
    return {name: r.detach() for name, r in named.items()} | dict(
        zip((f"d{name}" for name in wanted), found, strict=True)
    )


class Kernels:
    """The host functions of the kernels, and where their tensors have to be."""

    def __init__(self, module, device: str):
        self.module, self.device = module, device

    def _inputs(self, layer: Layer, tensors: dict[str, Tensor]) -> list:
        """What both directions of differentiation take: x, states, weights, masks; the lengths on the CPU."""
        there = {name: t if name == "lengths" else _moved(t, self.device) for name, t in tensors.items()}
        return [there.get(name) for name in (*INPUTS, "reset", "lengths")]

    def forward(self, layer: Layer, tensors: dict[str, Tensor], keep: bool = True) -> tuple[Tensor, ...]:
        """(out, h_n, c_n, saved)"""
        inputs = self._inputs(layer, tensors)
        return self.module.forward(*inputs, MODES[layer.mode], layer.batch_first, keep, run=launch_in_bounds)

    def __call__(self, layer: Layer, tensors, grads, needs=(True, True, True)) -> dict[str, Tensor]:
        """Results and gradients under the names of :func:`by_loop`."""
        inputs = self._inputs(layer, tensors)
        out, h_n, c_n, saved = self.forward(layer, tensors)
        assert out.is_contiguous() and out.dtype == tensors["x"].dtype
        grads = [None if g is None else _moved(g, self.device) for g in grads]
        found = self.module.backward(
            *grads, *inputs, out, saved, MODES[layer.mode], layer.batch_first, *needs, run=launch_in_bounds
        )
        named = {"out": out, "h_n": h_n} | ({"c_n": c_n} if layer.mode == "LSTM" else {})
        if layer.mode == "GRU":
            assert c_n.shape == (0,)
        needed = dict(zip(INPUTS, [needs[0], *[needs[1]] * 2, *[needs[2]] * 10], strict=True))
        for name, g in zip(INPUTS, found, strict=True):
            if name in tensors and needed[name]:
                assert g.is_contiguous()
                named[f"d{name}"] = g
            else:
                assert g.shape == (0,), name
        return {name: t.cpu() for name, t in named.items()}


def _moved(t: Tensor, device: str) -> Tensor:
    """The tensor on a device with the strides it has."""
    if device == "cpu":
        return t
    flat = torch.as_strided(t, [t.untyped_storage().nbytes() // t.element_size()], [1], 0)
    return flat.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


@interpreter_and_cuda
def kernels(request):
    yield from kernels_of("recurrent", request.param, Kernels)


@pytest.fixture(params=["resident", "streamed"])
def weights(request, kernels, monkeypatch):
    """Where the recurrent weights are: the sizes of these tests would keep all of them on chip."""
    if request.param == "streamed":
        monkeypatch.setattr(kernels.module, "RESIDENT_BYTES", 0)
    return request.param


def assert_layer(kernels, layer: Layer, dtype: torch.dtype, change=lambda name, t: t) -> dict[str, Tensor]:
    """Results and gradients as near to float64 as PyTorch's own; returns them.

    ``change`` gives the tensors (also "grad_out") other strides.
    """
    tensors = {name: change(name, t) for name, t in layer.tensors(dtype).items()}
    grads = layer.grads(dtype)
    grads = (change("grad_out", grads[0]), *grads[1:])
    found = kernels(layer, tensors, grads)
    true, own = (by_loop(layer, tensors, grads, to) for to in (torch.float64, dtype))
    assert found.keys() == true.keys()
    for name, mine in found.items():
        assert_close_as_torch(mine, own[name], true[name], f"{name} of {layer}")
    return found


def _random_layers(count: int, most: int = 40, steps: int = 5):
    rng = random.Random(f"{SEED} recurrent {count}")
    found = []
    for _ in range(count):
        mode = rng.choice(("LSTM", "GRU"))
        found.append(
            Layer(
                mode,
                batch=rng.choice((1, 2, 5, 16, 17, most)),
                steps=rng.choice((1, 2, 3, steps)),
                width=rng.choice((1, 3, 16, 19, most)),
                hidden=rng.choice((1, 5, 16, 17, most)),
                directions=rng.choice((1, 2)),
                batch_first=rng.random() < 0.5,
                bias=rng.random() < 0.8,
                state=rng.choice(("none", "h", "both", "both") + ("c",) * (mode == "LSTM")),
                reset=rng.random() < 0.7,
                lengths=rng.random() < 0.7,
            )
        )
    return pytest.mark.parametrize("layer", found, ids=[str(i) for i in range(count)])


@pytest.mark.some(15)
@dtypes
@_random_layers(5)
def test_random_layers_are_as_near_to_float64_as_torch(kernels, weights, layer, dtype):
    assert_layer(kernels, layer, dtype)


# ---------------------------------------------------------------- layouts


PLAIN = Layer("LSTM", batch=5, steps=3, width=6, hidden=20, directions=2, reset=True, lengths=True)


@pytest.mark.some(6)
@modes
@pytest.mark.parametrize("how", STRIDED)
def test_strided_and_expanded_inputs(kernels, mode, how):
    """x, the gradient of out and the parameters in other memory than usual."""
    layer = replace(PLAIN, mode=mode)

    def change(name, t):
        if name in ("x", "grad_out"):
            return strided(t, how)
        return strided(t, "sliced") if t.dim() == 2 and t.is_floating_point() else t

    assert_layer(kernels, layer, torch.float32, change)


@modes
def test_batch_first_gives_the_same(kernels, weights, mode):
    layer = replace(PLAIN, mode=mode)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    found = kernels(layer, tensors, grads)
    transposed = tensors | {name: tensors[name].transpose(0, 1) for name in ("x", "reset")}
    again = kernels(replace(layer, batch_first=True), transposed, (grads[0].transpose(0, 1), *grads[1:]))
    for name, t in found.items():
        expected = t.transpose(0, 1) if name in ("out", "dx") else t
        assert torch.equal(again[name], expected), name


# ---------------------------------------------------------------- resets and lengths


@modes
def test_a_reset_begins_a_new_sequence(kernels, weights, mode):
    """Forward: the steps from a reset on are those of a sequence of their own, with no initial state."""
    layer = Layer(mode, batch=3, steps=6, width=4, hidden=17, reset=True)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    tensors["reset"].fill_(False)
    tensors["reset"][2] = True
    found = kernels(layer, tensors, grads)
    rest = replace(layer, steps=4, reset=False, state="none")
    alone = {name: t for name, t in tensors.items() if name not in ("reset", "h0", "c0")}
    alone = kernels(rest, alone | {"x": tensors["x"][2:]}, (grads[0][2:], *grads[1:]))
    assert torch.equal(found["out"][2:], alone["out"]) and torch.equal(found["h_n"], alone["h_n"])
    assert torch.equal(found["dx"][2:], alone["dx"])


@modes
def test_nothing_passes_a_reset_or_an_end(kernels, weights, mode):
    """NaNs before a reset, and past a sequence's end, reach nothing behind it."""
    layer = Layer(mode, batch=2, steps=5, width=3, hidden=18, reset=True, lengths=True)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    tensors["reset"].fill_(False)
    tensors["reset"][2] = True
    tensors["lengths"] = torch.tensor([4, 5])
    clean = kernels(layer, tensors, grads)
    tensors["x"][:2] = torch.nan
    tensors["x"][4:, 0] = torch.nan
    grads[0][4:, 0] = torch.nan
    found = kernels(layer, tensors, grads)
    assert torch.equal(found["out"][2:], clean["out"][2:]) and torch.equal(found["h_n"], clean["h_n"])
    assert torch.equal(found["dx"][2:], clean["dx"][2:])
    assert found["out"][:2].isnan().all() and not found["dx"][4:, 0].any()


@modes
def test_sequences_of_no_length_keep_their_state(kernels, weights, mode):
    layer = Layer(mode, batch=3, steps=4, width=3, hidden=5, directions=2, lengths=True, reset=True)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    tensors["lengths"] = torch.zeros(3, dtype=torch.int64)
    tensors["reset"].fill_(True)
    found = kernels(layer, tensors, grads)
    assert not found["out"].any() and not found["dx"].any() and not found["dw_hh"].any()
    assert torch.equal(found["h_n"], tensors["h0"]) and torch.equal(found["dh0"], grads[1])
    if mode == "LSTM":
        assert torch.equal(found["c_n"], tensors["c0"]) and torch.equal(found["dc0"], grads[2])


# ---------------------------------------------------------------- what is asked for


@modes
def test_only_what_is_asked_for_is_computed(kernels, weights, mode):
    layer = replace(PLAIN, mode=mode, steps=2)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    everything = kernels(layer, tensors, grads)
    *results, saved = kernels.forward(layer, tensors, keep=False)
    assert saved.shape == (0,)
    for name, t in zip(("out", "h_n", "c_n"), results, strict=True):
        assert torch.equal(t.cpu(), everything.get(name, t.cpu())), name
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for name, t in kernels(layer, tensors, grads, needs).items():
            assert torch.equal(t, everything[name]), name


@pytest.mark.some(6)
@modes
@pytest.mark.parametrize("given", ["out", "h_n", "c_n"])
def test_a_gradient_of_one_result_alone(kernels, weights, mode, given):
    if mode == "GRU" and given == "c_n":
        given = "out"
    layer = replace(PLAIN, mode=mode)
    tensors = layer.tensors(torch.float32)
    grads = layer.grads(torch.float32)
    names = ("out", "h_n", "c_n")
    zeros = [
        g if name == given or g is None else torch.zeros_like(g) for name, g in zip(names, grads, strict=True)
    ]
    alone = [g if name == given else None for name, g in zip(names, grads, strict=True)]
    expected = kernels(layer, tensors, zeros)
    for name, t in kernels(layer, tensors, alone).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.some(2)
@modes
def test_results_do_not_depend_on_the_rest_of_the_batch(kernels, weights, mode):
    layer = replace(PLAIN, mode=mode, batch=18)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    together = kernels(layer, tensors, grads)
    again = kernels(layer, tensors, grads)
    assert all(torch.equal(again[name], t) for name, t in together.items())
    part = slice(15, 18)
    few = {
        name: t[:, part] if name in ("x", "h0", "c0", "reset") else t[part] if name == "lengths" else t
        for name, t in tensors.items()
    }
    alone = kernels(replace(layer, batch=3), few, [g if g is None else g[:, part] for g in grads])
    for name in ("out", "h_n", "dh0"):
        assert_close_as_torch(alone[name], together[name][:, part], together[name][:, part].double(), name)


def test_small_values_keep_their_relative_accuracy(kernels, weights):
    """tanh of what is nearly zero is what it is given, to the last bits."""
    layer = Layer("LSTM", batch=2, steps=2, width=3, hidden=5, bias=False, state="none")
    tensors = layer.tensors(torch.float32)
    tensors["x"] *= 1e-6
    found = kernels(layer, tensors, layer.grads(torch.float32))
    true = loop(layer, {name: t.double() for name, t in tensors.items()})[0]
    assert (found["out"] - true).norm() < 1e-6 * true.norm()


def test_a_cell_of_any_size_passes_its_gradient(kernels, weights):
    """From h = o tanh(c) to c, each element: 1 - tanh^2 has no digit left from |c| = 9 on."""
    layer = Layer("LSTM", batch=16, steps=1, width=3, hidden=20)
    tensors = {name: torch.zeros_like(t) for name, t in layer.tensors(torch.float32).items()}
    i, f, _, o = tensors["b_ih"].view(4, 20)
    i.fill_(-1000), f.fill_(1000), o.normal_()  # the cell stays as it is
    tensors["c0"] = torch.rand(1, 16, 20) * 70 - 35
    out, *states = (torch.rand(1, 16, 20) + 0.5 for _ in range(3))
    found = kernels(layer, tensors, (out, states[0], torch.zeros(1, 16, 20)))["dc0"]
    true = (out + states[0]).double() * o.double().sigmoid() / tensors["c0"].double().cosh() ** 2
    assert ((found - true).abs() <= 1e-5 * true).all()


@modes
def test_empty_batch(kernels, weights, mode):
    layer = replace(PLAIN, mode=mode, batch=0)
    found = kernels(layer, layer.tensors(torch.float32), layer.grads(torch.float32))
    assert found["out"].shape == (3, 0, 40) and not found["dw_ih"].any() and not found["db_hh"].any()


# ---------------------------------------------------------------- wrong calls, and what only the device knows


def _arguments(device: str, *, backward: bool) -> dict:
    """What the host functions take for one LSTM of 8 units over 3 steps of 2 sequences, under their names."""
    layer = Layer("LSTM", batch=2, steps=3, width=5, hidden=8, reset=True, lengths=True)
    tensors = layer.tensors(torch.float32)
    args = {name: tensors.get(name) for name in (*INPUTS, "reset", "lengths")}
    args |= {"mode": 0, "batch_first": False}
    if not backward:
        given = args | {"keep": True}
    else:
        grads = dict(zip(("grad_out", "grad_hn", "grad_cn"), layer.grads(torch.float32), strict=True))
        given = grads | args | {"out": torch.zeros(3, 2, 8), "saved": torch.zeros(1, 3, 2, 5, 16)}
        given |= {"need_x": True, "need_state": True, "need_weights": True}
    return {name: _there(name, value, device) for name, value in given.items()}


def _there(name: str, value, device: str):
    moves = isinstance(value, Tensor) and name != "lengths" and not value.is_meta
    return value.to(device) if moves else value


WRONG_LAYERS = {
    "an unknown mode": (dict(mode=2), "unknown mode 2"),
    "a 2-d input": (dict(x=torch.zeros(3, 5)), "expected a 3-d input, got 2-d"),
    "float64": (dict(x=torch.zeros(3, 2, 5).double()), "got torch.float64, .*float16 only"),
    "gates of another mode": (dict(mode=1), "w_hh has no whole gates"),
    "not square": (dict(w_hh=torch.zeros(32, 7)), "square per gate"),
    "no units": (dict(w_hh=torch.zeros(0, 0)), "sizes must be positive"),
    "no inputs": (dict(x=torch.zeros(3, 2, 0), w_ih=torch.zeros(32, 0)), "sizes must be positive"),
    "a projection": (dict(w_hr=torch.zeros(4, 8)), "compute no projection"),
    "input size": (dict(x=torch.zeros(3, 2, 6)), r"w_ih does not fit .*expected \(32, 6\)"),
    "a short bias": (dict(b_hh=torch.zeros(31)), r"b_hh does not fit .*expected \(32,\)"),
    "one bias": (dict(b_hh=None), "given alike"),
    "mixed dtypes": (dict(w_hh=torch.zeros(32, 8).bfloat16()), "input and w_hh differ in dtype"),
    "another device": (
        dict(w_ih=torch.zeros(32, 5, device="meta")),
        "input and w_ih are on different devices",
    ),
    "half a direction": (dict(w_ih_r=torch.zeros(32, 5)), "reverse direction lacks a weight"),
    "a direction without biases": (
        dict(w_ih_r=torch.zeros(32, 5), w_hh_r=torch.zeros(32, 8)),
        "given alike",
    ),
    "another size in reverse": (
        dict(
            w_ih_r=torch.zeros(32, 4),
            w_hh_r=torch.zeros(32, 8),
            b_ih_r=torch.zeros(32),
            b_hh_r=torch.zeros(32),
        ),
        "w_ih_r does not fit",
    ),
    "a state of another batch": (dict(h0=torch.zeros(1, 3, 8)), r"h0 does not fit .*expected \(1, 2, 8\)"),
    "a state without directions": (dict(c0=torch.zeros(2, 8)), "c0 does not fit"),
    "a state of another dtype": (dict(c0=torch.zeros(1, 2, 8).half()), "input and c0 differ in dtype"),
    "reset the other way": (dict(reset=torch.zeros(2, 3).bool()), r"reset does not fit .*expected \(3, 2\)"),
    "reset of floats": (dict(reset=torch.zeros(3, 2)), "reset must be bool"),
    "lengths of another batch": (
        dict(lengths=torch.ones(3).long()),
        r"lengths does not fit .*expected \(2,\)",
    ),
    "32-bit lengths": (dict(lengths=torch.ones(2).int()), "lengths must be int64"),
    "lengths past the end": (dict(lengths=torch.tensor([1, 4])), "lengths must lie in 0 to 3, got 1 to 4"),
    "negative lengths": (dict(lengths=torch.tensor([-1, 3])), "lengths must lie in 0 to 3, got -1 to 3"),
}
WRONG_BACKWARDS = {
    "a gradient of another size": (dict(grad_out=torch.zeros(3, 2, 9)), "grad_out does not fit"),
    "a gradient of another dtype": (
        dict(grad_out=torch.zeros(3, 2, 8).double()),
        "input and grad_out differ in dtype",
    ),
    "a short gradient of a state": (dict(grad_hn=torch.zeros(1, 1, 8)), "grad_h_n does not fit"),
    "a flat gradient of a state": (dict(grad_cn=torch.zeros(16)), "grad_c_n does not fit"),
    "another out": (dict(out=torch.zeros(2, 2, 8)), "out does not fit"),
    "out with gaps": (dict(out=torch.zeros(3, 2, 16)[..., ::2]), "out must be contiguous"),
    "nothing saved": (dict(saved=torch.zeros(0)), r"saved does not fit .*expected \(1, 3, 2, 5, 16\)"),
    "saved of a GRU": (
        dict(saved=torch.zeros(1, 3, 2, 4, 16)),
        r"saved does not fit .*expected \(1, 3, 2, 5, 16\)",
    ),
    "saved without its padding": (
        dict(saved=torch.zeros(1, 3, 2, 5, 8)),
        r"saved does not fit .*expected \(1, 3, 2, 5, 16\)",
    ),
    "saved of another dtype": (
        dict(saved=torch.zeros(1, 3, 2, 5, 16).bfloat16()),
        "saved must be contiguous torch.float32",
    ),
}


@pytest.mark.parametrize(
    ("backward", "wrong"),
    [
        pytest.param(way == "backward", wrong, id=f"{way}: {name}")
        for way, more in (("forward", {}), ("backward", WRONG_BACKWARDS))
        for name, wrong in (WRONG_LAYERS | more).items()
    ],
)
def test_wrong_calls_start_no_kernel(kernels, backward, wrong):
    changes, message = wrong
    changes = {name: _there(name, value, kernels.device) for name, value in changes.items()}
    function = kernels.module.backward if backward else kernels.module.forward
    with pytest.raises(RuntimeError, match=message):
        function(**_arguments(kernels.device, backward=backward) | changes, run=no_launch)


def test_checks_leave_the_sizes_of_a_trace_open():
    from cnnlstm_fast.kernels import checks

    open_dims = {"x": (0, 1), "h0": (1,), "c0": (1,), "reset": (0, 1), "lengths": (0,), "out": (0, 1)}
    open_dims |= {"grad_out": (0, 1), "grad_hn": (1,), "grad_cn": (1,), "saved": (1, 2)}
    env, args = with_open_sizes(_arguments("cpu", backward=True), open_dims)
    x, h0, c0, *weights = (args[name] for name in INPUTS)
    assert type(x.shape[1]) is torch.SymInt
    checks.check_layer(x, h0, c0, weights, args["reset"], args["lengths"], 0, False)
    grads = [args[name] for name in ("grad_out", "grad_hn", "grad_cn")]
    checks.check_layer_backward(grads, x, weights[1], None, args["out"], args["saved"], 0, False)
    assert not env.guards


@pytest.mark.some(10)
@modes
@pytest.mark.parametrize(
    "lengths",
    [[0, 0, 0], [9, 1, 4], [-1, -7, -2], [2**32 + 2, 2**31, -(2**31)], [2**63 - 1, -(2**63), 0]],
    ids=str,
)
def test_any_lengths_are_safe(kernels, weights, mode, lengths):
    """Lengths that a device holds are not looked at: below none is none, past the last step is the last."""
    layer = Layer(mode, batch=3, steps=4, width=3, hidden=5, directions=2, lengths=True, reset=True)
    tensors, grads = layer.tensors(torch.float32), layer.grads(torch.float32)
    wrong = torch.tensor(lengths)
    tensors["lengths"] = wrong.clamp(0, layer.steps)
    expected = kernels(layer, tensors, grads)

    def run(kernel, programs, args, options):
        args = args | {"lengths_ptr": wrong.to(kernels.device)}
        launch_in_bounds(kernel, programs, args, options)

    inputs, mode = kernels._inputs(layer, tensors), MODES[mode]
    out, h_n, _, saved = kernels.module.forward(*inputs, mode, False, True, run=run)
    moved = [None if g is None else _moved(g, kernels.device) for g in grads]
    found = kernels.module.backward(*moved, *inputs, out, saved, mode, False, True, True, True, run=run)
    assert torch.equal(out.cpu(), expected["out"]) and torch.equal(h_n.cpu(), expected["h_n"])
    for name, g in zip(INPUTS, found, strict=True):
        assert name not in tensors or torch.equal(g.cpu(), expected[f"d{name}"]), name


# ---------------------------------------------------------------- the op


@pytest.mark.parametrize("mode", [0, 1])
def test_tracing_shows_the_kernels(mode):
    """Under AOTAutograd the op on CUDA tensors becomes its kernels, so that inductor can see them."""
    from functorch.compile import aot_function
    from torch._subclasses import FakeTensorMode

    from cnnlstm_fast.ops.recurrent import backward_op, forward_op

    def step(x, w_ih, w_hh, grad, reset):
        inputs = x, None, None, w_ih, w_hh, *[None] * 8, reset, None
        out, h_n, _, saved = forward_op(*inputs, mode, False, True)
        return out, h_n, *backward_op(grad, None, None, *inputs, out, saved, mode, False, True, False, True)

    class Captured(Exception):
        pass

    def capture(graph, inputs):
        raise Captured([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])

    rows = (4 - mode) * 20
    with FakeTensorMode(), pytest.raises(Captured) as captured:
        inputs = [torch.empty(s, device="cuda") for s in ((5, 3, 6), (rows, 6), (rows, 20), (5, 3, 20))]
        reset = torch.empty(5, 3, dtype=torch.bool, device="cuda")
        aot_function(step, fw_compiler=capture)(*inputs, reset)
    targets = captured.value.args[0]
    assert not [target for target in targets if "cnnlstm_fast" in target]
    assert targets.count("triton_kernel_wrapper_functional") == 2


def test_what_the_kernels_do_not_take_is_said():
    from cnnlstm_fast.planning import support

    x = torch.empty(3, 2, 4, device="meta")

    class OnCuda:  # what the rule looks at before it looks at the tensors
        device = torch.device("cuda")

    w_ih = x.new_empty(80, 4)
    assert "proj_size" in support.why_not_fused_recurrent(OnCuda, [w_ih, x.new_empty(80, 7)])
    assert "units" in support.why_not_fused_recurrent(OnCuda, [w_ih, x.new_empty(4 * 1025, 1025)])


# ---------------------------------------------------------------- on a device


compiled = pytest.mark.parametrize("kernels", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


@compiled
@dtypes
@_random_layers(40, most=150, steps=40)
def test_large_random_layers(kernels, layer, dtype):
    assert_layer(kernels, layer, dtype)


@compiled
@modes
@pytest.mark.parametrize("hidden", [64, 128, 519, 1024])
def test_sizes_of_the_field(kernels, mode, hidden):
    layer = Layer(mode, batch=24, steps=30, width=64, hidden=hidden, directions=2, reset=True, lengths=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert_layer(kernels, layer, dtype)


@compiled
@modes
def test_without_masks_it_is_what_cudnn_gives(kernels, mode):
    layer = Layer(mode, batch=20, steps=25, width=30, hidden=128, directions=2, state="none")
    tensors = layer.tensors(torch.float32)
    module = getattr(torch.nn, mode)(30, 128, bidirectional=True, device="cuda")
    with torch.no_grad():
        names = [name for name in WEIGHTS if "hr" not in name]
        for parameter, name in zip(module._flat_weights, names, strict=True):
            parameter.copy_(tensors[name])
        theirs, _ = module(tensors["x"].cuda())
    true = loop(layer, {name: t.double() for name, t in tensors.items()})[0]
    assert_close_as_torch(kernels.forward(layer, tensors)[0].cpu(), theirs.cpu(), true, str(layer))


@compiled
@modes
def test_compiled_and_captured_calls_give_the_same_bits(kernels, mode):
    from cnnlstm_fast.ops.recurrent import forward_op

    layer = replace(PLAIN, mode=mode, lengths=False)
    inputs = kernels._inputs(layer, layer.tensors(torch.float32))

    def call(*inputs):
        return forward_op(*inputs, MODES[mode], False, False)[0]

    eager = call(*inputs)
    assert torch.equal(torch.compile(call, fullgraph=True)(*inputs), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    inputs[0].neg_()
    graph.replay()
    assert torch.equal(captured, call(*inputs)) and not torch.equal(captured, eager)


@compiled
def test_tf32_only_where_torch_allows_it(kernels, monkeypatch):
    layer = Layer("LSTM", batch=20, steps=9, width=16, hidden=64)
    tensors = layer.tensors(torch.float32)
    true = loop(layer, {name: t.double() for name, t in tensors.items()})[0]

    def error():
        return ((kernels.forward(layer, tensors)[0].cpu() - true).norm() / true.norm()).item()

    assert error() < 2**-20
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert 2**-17 < error() < 2**-9
