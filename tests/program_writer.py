"""Random programs as they are written from the tables of grammar.py, and made smaller."""

from __future__ import annotations

import copy
import inspect
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grammar
import torch
from torch import nn
from torch.utils import _pytree as pytree


def begin_at_any_size() -> None:
    """Let models be fused however small they are, also where PyTorch's operators are the fastest."""
    from cnnlstm_fast.fusion import carry, plan
    from cnnlstm_fast.planning import choose

    plan.OVERHEAD_US = 0
    carries = plan.FusionPlan._carries
    plan.FusionPlan._why_unfused = lambda *args: None
    plan.FusionPlan._carries = lambda *args: carries(*args[:-1], float("inf"))
    carry.GAIN_PERCENT = -(10**6)
    choose.GAIN_PERCENT = -(2**31)


class Lowered(nn.Module):
    """A model as PyTorch itself runs it in a lower precision.

    Args:
        dtype: to which parameters and the input are cast; int8 quantizes as PyTorch does.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, None
        if dtype is torch.int8:
            layers = {nn.Linear, nn.LSTM, nn.GRU}
            lowered = torch.ao.quantization.quantize_dynamic(model.eval(), layers, torch.qint8)
        else:
            lowered, self.dtype = copy.deepcopy(model).to(dtype).eval(), dtype
        self.run = lowered.forward  # no submodule: parameters are the model's

    def forward(self, x):
        if self.dtype is None:
            return self.run(x)
        return pytree.tree_map_only(torch.Tensor, lambda t: t.to(x.dtype), self.run(x.to(self.dtype)))


class Frozen(nn.Module):
    """A model that is frozen for its first input, to compute in ``dtype``."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.dtype, self.frozen, self.whole = model, dtype, None, False

    def forward(self, x):
        import cnnlstm_fast as cf

        if self.frozen is None:
            try:
                frozen = cf.freeze(self.model, x.clone(), dtype=self.dtype)
            except Exception:
                self.model(x)  # what raises may have written to its input before
                raise
            self.frozen = [frozen]  # no submodule: parameters are the model's
            self.whole = frozen.version_of((x,)) is not None  # it is one call into C++
        return self.frozen[0](x)


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


#: Modes that freeze, and the lower precision in which they do.
LOWER = {"freeze": None, "freeze bfloat16": torch.bfloat16, "freeze int8": torch.int8}
#: How a program begins that is frozen: as frozen models always are.
EVAL = "model.eval()"
#: What a program does that a frozen model, which runs none of its Python, need not do again.
STATEFUL = re.compile(r"self\.(calls|kept|held|running|done)|\b(keep|see)\b|\braise\b|weakref|\.tag\b")


def labels(nodes: tuple[Node, ...]) -> set[str]:
    return {label for n in nodes for label in ({n.label} | labels(n.body or ()))} - {""}


@dataclass(frozen=True)
class Program:
    """A program: its modules by name, and the statements of ``__init__``, ``forward`` and the driver.

    Its ``forward`` counts its calls if it ``counts``.
    """

    seed: int
    modules: dict[str, str] = field(hash=False)
    init: tuple[Node, ...] = ()
    forward: tuple[Node, ...] = ()
    drive: tuple[Node, ...] = ()
    counts: bool = True

    def source(self) -> str:
        """The class and the driver."""
        parts = (self.init, 2), (self.forward, 2), (self.drive, 1)
        init, forward, drive = ("\n".join(lines(part, indent)) for part, indent in parts)
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
            "        self.held.append(args[-1])", "", "    def forward(self, x):",
            *(["        self.calls += 1"] if self.counts else []), "        y = u = a = x",
            *([forward] if forward else []), "", "", "def drive(wrap):",
            "    keep.clear()", "    model = wrap(build())",
            "    optimizer = torch.optim.SGD(model.parameters(), 0.01)",
            "    state = copy.deepcopy(model.state_dict())", *([drive] if drive else []), "",
        ))  # fmt: skip

    def frozen(self) -> Program | None:
        """The same model without what happens in between, called in inference; None where nothing is left."""
        forward = tuple(n for n in self.forward if not n.label or n.label in ("moves", "side by side"))
        if STATEFUL.search("\n".join(lines(forward, 0))) or not any("self.c" in n.text for n in forward):
            return None
        inputs = [n for n in self.drive if n.text.startswith("x = ")]
        call = Node("with caught():", "", (Node("with torch.no_grad():\n    see('out', model(x))"),))
        drive = [Node(EVAL), *(n for given in inputs for n in (given, call, Node('see("x", x)')))]
        return replace(self, init=(), forward=forward, drive=tuple(drive), counts=False)

    def script(self, mode: str) -> str:
        """All of it, to be run as it is."""
        wrap = {"accelerate": "cf.accelerate", "compile": "compiled"}.get(mode)
        usual = "lambda model: model"
        if wrap is None:
            dtype = LOWER[mode]
            wrap = f"lambda model: Frozen(model, {dtype})"
            usual = f"lambda model: Lowered(model, {dtype})" if dtype else usual
        begin = "\n\n".join(map(inspect.getsource, (begin_at_any_size, Lowered, Frozen)))
        footer = grammar.FOOTER.format(begin=begin, plain=usual, wrap=wrap)
        prelude = grammar.PRELUDE.replace("NUDGE = 0", f"NUDGE = {self.seed}")
        return prelude + self.source() + footer

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


PRELUDE_CODE = compile(grammar.PRELUDE, "<program>", "exec")


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
        self.often = rng.choice((0.0, 0.1, 0.25, 0.5))

    def fill(self, text: str, **words: str) -> str:
        words = self.words | words
        return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)

    def works(self, text: str) -> bool:
        """Whether a statement can be run here; if so it has been."""
        before = dict(self.space)
        try:
            exec(re.sub(r"\breturn\b.*", "pass", text), self.space)
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
            channels = y.shape[1] if y.dim() > 1 else 1
            text = self.fill(self.rng.choice(texts), d=str(y.dim() - 2), c=str(channels))
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
            label = rng.choice(list(grammar.EVENTS))
            if self.add(nodes, grammar.EVENTS[label], label) and rng.random() < 0.4:
                nodes.append(Node(f"if {rng.choice(grammar.CONDITIONS)}:", label, (nodes.pop(),)))
        if rng.random() < 0.12:
            self.add(nodes, grammar.MOVES, "moves")

    def conv(self) -> str:
        rng, y = self.rng, self.space["y"]
        for _ in range(12):
            made = f"nn.Conv{{d}}d({{c}}, {rng.choice((2, 3, 4, 6, 16))}"
            for name, choices in grammar.CONV.items():
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
            self.add(nodes, grammar.CONVOLVE)
        else:
            self.add(nodes, ("y = {conv}(u)", "y = {conv}(y)", "y = {conv}(u)"))
        self.event(nodes)
        if rng.random() < 0.15:  # what most people put behind the norm
            self.step(nodes, "f", grammar.ACTIVATIONS, grammar.ACTIVATE)
        if rng.random() < 0.55 and (norm := self.one_of("n", grammar.NORMS)):
            self.words["norm"] = f"self.{norm}"
            self.add(nodes, ("y = {norm}(y)",) if rng.random() < 0.8 else grammar.BATCH_NORM)
            self.event(nodes)
        if rng.random() < 0.3:
            self.sum(nodes)
        for prefix, share, modules, functions in (
            ("p", 0.1, grammar.POOLS, grammar.POOL), ("f", 0.9, grammar.ACTIVATIONS, grammar.ACTIVATE),
            ("d", 0.15, grammar.DROPS, grammar.MOVES), ("p", 0.5, grammar.POOLS, grammar.POOL),
        ):  # fmt: skip
            if rng.random() < share:
                self.step(nodes, prefix, modules, functions)
        if rng.random() < 0.3:
            self.add(nodes, grammar.JOINS)

    def step(self, nodes: list[Node], prefix: str, modules, functions) -> None:
        """A call of one of the modules or functions."""
        name = self.one_of(prefix, modules) if self.rng.random() < 0.5 else None
        self.add(nodes, (f"y = self.{name}(y)",) if name else functions)
        self.event(nodes)

    def twin(self) -> str:
        """A second convolution like the block's, by name."""
        conv = self.words["conv"][5:]
        other = f"{conv}_other"
        if conv != "none" and other not in self.modules:
            self.modules[other] = self.modules[conv]
            self.model.add_module(other, eval(self.modules[other], self.space))
        return f"self.{other}"

    def sum(self, nodes: list[Node]) -> None:
        """Another value added to the block's."""
        other = self.twin()
        norm = self.one_of("n", grammar.NORMS) if self.rng.random() < 0.7 else None
        m = f"self.{norm}" if norm else self.words["norm"]
        self.add(nodes, [self.fill(text, other=other, m=m) for text in grammar.SUMS])
        self.event(nodes)

    def branches(self, nodes: list[Node]) -> None:
        """Two convolutions alike, each with a norm."""
        other = self.twin()
        self.space["y"] = self.model.get_submodule(self.words["conv"][5:])(self.space["y"])
        norms = [self.one_of("n", grammar.NORMS) or "none" for _ in range(2)]
        n, m = f"self.{norms[0]}", f"self.{self.rng.choice(norms)}"
        self.words |= {"norm": n, "other": other}
        branches = [self.fill(text, n=n, m=m) for text in grammar.BRANCHES]
        self.add(nodes, branches, "side by side")
        self.event(nodes)

    def region(self, nodes: list[Node]) -> list[Node]:
        """Some of the statements in a region."""
        begin = self.rng.randrange(len(nodes) + 1)
        end = self.rng.randint(begin, len(nodes))
        label, first, after, each = self.rng.choice(grammar.REGIONS)
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
            self.add(nodes, grammar.MOVES, "moves")
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
            self.add(nodes, grammar.BRIDGES)
            if rng.random() < 0.6 and (name := self.one_of("l", grammar.HEADS)):
                self.add(nodes, (f"y = self.{name}(y)", f"y = self.{name}(y)[0]"))
                self.add(nodes, ("y = y[0]", "pass"))
        nodes.append(Node(rng.choice(grammar.RETURNS)))
        init: list[Node] = []
        if rng.random() < 0.3:
            self.add(init, grammar.HOOKS, "hooks")
        if rng.random() < 0.05 and "c2" in self.modules:
            init.append(Node("self.c2.weight = self.c1.weight", "tied weights"))
        return Program(self.seed, self.modules, tuple(init), tuple(nodes), tuple(self.driver(size, nodes)))

    def driver(self, size: list[int], forward: list[Node]) -> list[Node]:
        """Five to eight calls, most of one kind, and what happens between them."""
        rng, nodes = self.rng, []
        keeps = any("self.kept" in line for line in lines(tuple(forward), 0))
        calls = {name: call for name, call in grammar.CALLS.items() if keeps or "model.kept" not in call}
        habit = rng.choice([name for name in grammar.USUAL if name in calls])
        usual, between = rng.choice(grammar.INPUTS[:4]), rng.choice((0.1, 0.3, 0.5))
        if rng.random() < 0.3 or habit in ("eval", "inference"):
            nodes.append(Node("model.eval()"))
        words = {"size": str(size)[1:-1], "other": str([size[0] + 1, *size[1:-1], size[-1] + 2])[1:-1]}
        words |= {name: self.words[name].replace("self.", "model.") for name in ("conv", "norm")}
        for _ in range(rng.randint(5, 8)):
            given = usual if rng.random() < 0.8 else rng.choice(grammar.INPUTS)
            nodes.append(Node(self.fill(given, **words)))
            name = habit if rng.random() < 0.75 else rng.choice(list(calls))
            label = "" if name in grammar.ORDINARY else f"call: {name}"
            if calls[name].startswith("with"):
                body = [Node(calls[name], label)]
            else:
                body = [Node(step, label) for step in calls[name].splitlines()]
                body[:0] = Node("model.zero_grad()"), Node("out = model(x)")
            nodes.append(Node("with caught():", "", tuple(body)))
            if keeps and rng.random() < 0.5:
                nodes.append(Node("with caught():", "", (Node('see("kept", model.kept)'),)))
            if rng.random() < between:
                text = self.fill(rng.choice(grammar.BETWEEN), **words)
                nodes.append(Node("with caught():", "", (Node(text, "between calls"),)))
            nodes.append(Node("look(model)" if rng.random() < 0.8 else 'see("x", x)'))
        return [*nodes, Node('see("held", model.held)'), Node("look(model)")]
