"""Running a block where its convolution stands, with placeholders for the values between its steps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from cnnlstm_fast.functional.epilogue import Program, moments_of, run_program
from cnnlstm_fast.fusion import run
from cnnlstm_fast.fusion.calls import Conv, Norm, is_sum
from cnnlstm_fast.fusion.carry import CarriedMap, Carry, in_pytorchs_layout
from cnnlstm_fast.fusion.context import Contents, Context, context_of, has_saved_tensor_hooks, hash_of
from cnnlstm_fast.fusion.graph import OperandsToPlaceholders, PlaceholdersToResult, SpeculatedGraph
from cnnlstm_fast.fusion.observe import ObservedTensor
from cnnlstm_fast.fusion.plan import FusionPlan, ShapePlan, Step
from cnnlstm_fast.fusion.session import Session
from cnnlstm_fast.fusion.tensors import (
    METADATA,
    alias,
    alias_by,
    no_function,
    outside_of_transforms,
    unversioned_alias,
)
from cnnlstm_fast.fusion.writes import Token
from cnnlstm_fast.planning import observer


class Speculation:
    """One speculated call: the block's result, and how many of its steps the program has taken.

    Attributes:
        site: of the convolution; it is told when the program does something else than the plan.
        function, x, conv: the convolution, its input and its other arguments.
        carry: that of the session, where the result is a carried map.
        position: how many steps the program has taken.
        result: of the block, until the last step returns it; None before the sum of a program with one.
        head: what a program's first steps give, until its sum runs.
        moments: statistics of the batch of a program's norm (:func:`moments_of`).
        added: the other operand of a program's sum, and what it held when the sum ran.
        norm: the norm's arguments, first as expected, then as given.
        contents: copies of the norm's tensors and of the bias, as the block read them; None without a norm.
        bias_hash: of a bias that is not copied: its change is noticed then, and cannot be undone.
        batch_statistics: mean and unbiased variance of the batch; the norm's call updates its running
            statistics with them.
        versions: of the other operands.
        placeholders: weak references to all of them.
        unreleased: placeholders that the program has not received yet, the next one last.
        graph: what the gradients need, or None without gradients.
        done: the result has been returned, or never will be.
        token: under which the session watches for writes to its operands.
        answers_metadata: see :meth:`metadata_only`.
    """

    __slots__ = (
        "__weakref__", "added", "added_then", "answers_metadata", "batch_statistics", "bias_hash", "carry",
        "contents", "context", "conv", "done", "function", "graph", "head", "moments", "norm",
        "placeholders", "plan", "position", "result", "session", "shape_plan", "site", "token", "unreleased",
        "versions", "x",
    )  # fmt: skip

    def __init__(
        self, site, session: Session, plan: FusionPlan, shape_plan: ShapePlan, context: Context, function,
        x: Tensor, conv: Conv, carry: Carry | None,
    ):  # fmt: skip
        self.site, self.session, self.context = site, session, context
        self.plan, self.shape_plan = plan, shape_plan
        self.function, self.x, self.conv, self.carry = function, x, conv, carry
        self.position = 0
        self.norm: Norm | None = plan.norm
        self.contents: Contents | None = None
        self.bias_hash: int | None = None
        bias = conv.bias if x.is_cpu else None
        if self.norm is not None:
            self.contents = Contents([*self.norm.read, bias] if bias is not None else self.norm.read)
        elif bias is not None and plan.steps:
            self.bias_hash = hash_of(bias)
        self.batch_statistics: tuple[Tensor, Tensor] | None = None
        self.graph: SpeculatedGraph | None = None
        self.placeholders: list[weakref.ref] = []
        self.unreleased: list[Placeholder] = []
        self.done = self.answers_metadata = False
        self.token: weakref.ref[Token] | None = None
        self.head: Tensor | None = None
        self.moments: Tensor | None = None
        self.added: Tensor | None = None
        self.added_then: Tensor | None = None
        self.versions = _versions(*self._watched_operands())
        self.result: Tensor | None = None
        if plan.is_program:
            self.head, self.moments = self._run_head(x, conv, self.norm)
            self.batch_statistics = self._statistics_of_moments()
            if plan.sum_at is None:
                self.result = self._run_epilogue(None)
        else:
            self.result, self.batch_statistics = self._run_block(x, conv, self.norm)

    def _run_block(
        self, x: Tensor, conv: Conv, norm: Norm | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The block's result, and mean and variance of the batch for its norm's running statistics.

        The running statistics themselves are not updated.
        """
        statistics = module = None
        if norm is not None:
            if norm.training and norm.running_mean is not None:
                mean, var = (torch.zeros_like(cast(Tensor, t)) for t in norm[:2])
                statistics = mean, var
                norm = norm._replace(running_mean=mean, running_var=var, momentum=1.0)
            module = norm.module(conv.weight.shape[0], x.dim())
        parts = module, self.plan.activation, self.plan.pool
        result = run.run_block(x, conv, *parts, layout=self.shape_plan.layout)
        if self.shape_plan.carried and result.is_contiguous():  # one position or channel: PyTorch's strides
            result = result.flatten().view(result.shape)
        return result, statistics

    def _run_head(self, x: Tensor, conv: Conv, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
        """The first steps of a program in one call, and the statistics of the batch for its norm."""
        parts = self.plan.head_parts(self.shape_plan.head, conv, x, norm)
        head = run.run_block(x, conv, *parts, None, layout=self.shape_plan.layout)
        trained = norm is not None and norm.training
        return head, moments_of(head, self._program(norm)) if trained else None

    def _statistics_of_moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and unbiased variance of the batch, in the dtypes of the running statistics."""
        norm, moments, head = self.norm, self.moments, self.head
        if norm is None or moments is None or head is None:
            return None
        if norm.running_mean is None or norm.running_var is None:
            return None
        count = head.numel() // self.conv.weight.shape[0]
        mean, var = moments[0], moments[1] * (count / (count - 1))
        return mean.to(norm.running_mean.dtype), var.to(norm.running_var.dtype)

    def _program(self, norm: Norm | None) -> Program:
        """The steps behind the first ones."""
        program = self.shape_plan.program
        assert program is not None
        if program.norm is None or norm is None:
            return program
        norm = norm.uncounted() if norm.training else norm
        return program._replace(norm=norm.module(self.conv.weight.shape[0], self.x.dim()))

    def _run_epilogue(self, added: Tensor | None) -> Tensor:
        """The result of a program, from that of its first steps."""
        head, self.head = self.head, None
        assert head is not None
        watched = observer.current
        if watched is not None:
            names = [str(step) for step in self.plan.steps[self.shape_plan.head :]]
            watched.epilogue_begins(head, self.conv.weight, "+".join(names))
        result = run_program(head, self._program(self.norm), added, self.moments)
        if watched is not None:
            watched.block_ends(result)
        return result

    def start(self) -> Tensor:
        """What the convolution returns: a placeholder, or the result where the block has no other step."""
        if not self.plan.steps:
            return cast(Tensor, self._release_result(None))
        operands = self._operands()
        if self.context.records and any([t is not None and t.requires_grad for t in operands]):
            self.graph = SpeculatedGraph(self, operands)
        self.session.speculations.append(weakref.ref(self))
        token, self.token = self.session.writes.begin(self)
        sum_at = self.plan.sum_at
        slots = [n for n, at in enumerate(self.plan.own_values) if sum_at is None or at <= sum_at]
        self._place(slots, operands, token)
        return self.unreleased.pop()

    def _place(self, slots: list[int], operands: tuple, token: Token) -> None:
        """Make the placeholders of these slots, which the program is to receive next."""
        if self.graph is not None:
            with self.metadata_only():
                values = list(OperandsToPlaceholders.apply(self.graph, slots, *operands))
        else:
            values = self.make_placeholders(slots, "sizes")
        self.placeholders += [weakref.ref(value) for value in values]
        for value in values:
            value._token = token
        self.unreleased = values[::-1]

    def _operands(self) -> tuple[Tensor | None, ...]:
        """Input, weight and bias, and the norm's weight and bias."""
        return (self.x, *self.conv[:2], *(() if self.norm is None else self.norm[2:4]))

    def make_placeholders(self, slots: list[int], policy: str) -> list[Placeholder]:
        """New placeholders; C code that asks for the device, or what ``policy`` names, gives them memory."""
        found, device = [], self.x.device
        for slot in slots:
            number = self.plan.own_values[slot]
            shape, stride = self.shape_plan.shapes[number]
            value: Placeholder = Tensor._make_wrapper_subclass(
                Placeholder, shape, strides=stride, dtype=self.plan.dtypes[number], device=device,
                dispatch_device=True, dispatch_sizes_strides_policy=policy,
            )  # fmt: skip
            torch._C._set_throw_on_mutable_data_ptr(
                value
            )  # other access to its memory raises instead of crashing
            value._speculation, value._at, value._slot = self, number, slot
            found.append(value)
        return found

    @contextlib.contextmanager
    def metadata_only(self) -> Iterator[None]:
        """While this is entered, a placeholder that is asked for its device or sizes gets no values."""
        self.answers_metadata = True
        try:
            yield
        finally:
            self.answers_metadata = False

    def advance(self, value: Placeholder, function, args, kwargs) -> Tensor | None:
        """The result of a call on ``value`` if it is the next step of the plan, else None."""
        at = self.position
        if self.done or value._at != at:
            return None
        steps = self.plan.steps
        step = steps[at]
        if function is not step.function or context_of(self.x) != self.context or has_saved_tensor_hooks():
            return None
        if step.kind == "sum":
            return self._advance_sum(value, step, args, kwargs)
        if args[0] is not value:
            return None
        if step.kind == "norm":
            if not self._confirm_norm(args, kwargs):
                return None
        elif args[1:] != step.args or kwargs != step.kwargs:
            return None
        if at + 1 == len(steps):
            return self._release_result(value if step.same_object else None)
        self.position = at + 1
        if step.same_object:
            value._at = at + 1
            return value
        return self.unreleased.pop()

    def _advance_sum(self, value: Placeholder, step: Step, args, kwargs) -> Tensor | None:
        """As :meth:`advance`. The sum's other operand is there, so the result is computed."""
        at, first = self.position, step.found.value.first
        if len(args) != 2 or kwargs != step.kwargs or args[0 if first else 1] is not value:
            return None
        added = self._added_operand(args[1 if first else 0])
        norm = self.norm
        if added is None or (norm is not None and not cast(Contents, self.contents).same(norm.read)):
            return None
        self.added = added
        self.versions += _versions(added)
        self.result = self._run_epilogue(added)
        if at + 1 == len(self.plan.steps):
            return self._release_result(value if step.same_object else None)
        slots = [n for n, number in enumerate(self.plan.own_values) if number > at]
        if self.graph is None and self.context.records and added.requires_grad:
            self.graph = SpeculatedGraph(self, self._operands())
        if self.graph is None and step.same_object:
            value._at = self.position = at + 1
            self._place(slots[1:] if self.plan.own_values[slots[0]] == at + 1 else slots, (), value._token)
            return value
        operands = (*self._operands(), added)
        if self.graph is not None:
            self.graph.needs.append(added.requires_grad)
        self._place(slots, operands, value._token)
        found = self.unreleased.pop()
        if step.same_object:
            with self.metadata_only():
                if not _exchange(value, found):
                    self.unreleased.clear()
                    return None
            found = value
        self.position = at + 1
        return found

    def _added_operand(self, other: Any) -> Tensor | None:
        """The other operand of the sum, if the epilogue may read it as it lies in memory now."""
        carried = type(other) is CarriedMap
        if type(other) is ObservedTensor:
            other.close()
        if not carried and type(other) not in (Tensor, nn.Parameter):
            return None
        shape, strides = self.shape_plan.shapes[self.position]
        dtype, device = self.plan.dtypes[self.position], self.x.device
        with no_function():
            if (other.shape, other.dtype, other.device) != (shape, dtype, device) or other.is_neg():
                return None
            if not carried and (other.layout is not torch.strided or other.stride() != strides):
                return None
            if carried and torch.empty(shape, device="meta").stride() != strides:
                return None
        if carried:
            return other._carry.memory(other)
        return other if self.carry is None else self.carry.read(other)

    def _confirm_norm(self, args, kwargs) -> bool:
        """Whether a norm's call reads what the block has read; if it does, update its running statistics."""
        expected = self.norm
        assert expected is not None
        try:
            given = Norm(*args[1:], **kwargs)
        except TypeError:
            return False
        if given.training != expected.training or given.eps != expected.eps:
            return False
        if any([a is not b for a, b in zip(given[:4], expected[:4], strict=True)]):
            self.plan.norm = given  # the next call may have the same tensors
            return False
        if not cast(Contents, self.contents).same(given.read):
            return False
        self.norm = given
        if self.batch_statistics is not None:
            with torch.no_grad(), no_function():
                # PyTorch's norm does not count this for a version either: a graph may have saved the tensors.
                running = [given.running_mean.data, given.running_var.data]  # type: ignore[union-attr]
                torch._foreach_lerp_(running, list(self.batch_statistics), float(given.momentum))
        return True

    def _release_result(self, value: Placeholder | None) -> Tensor | None:
        """The result, for the program; after a step in place the object ``value`` becomes it.

        None where C code holds ``value``, which then cannot become another tensor.
        """
        result = self.result
        assert result is not None
        if self.graph is not None:
            with self.metadata_only():
                result = PlaceholdersToResult.apply(self.graph, result, *self._pending())
        elif result._is_view():  # results of PyTorch's operators are no views
            result = unversioned_alias(result)
        if self.carry is not None:
            result = self.carry.hold(result)
        if value is not None:
            # Who watches may hold the block's own object.
            plain = self.graph is None and self.carry is None and not result.requires_grad
            if not _exchange(value, result.detach() if plain else result):
                return None
            result = value
        if type(result) is CarriedMap:
            result._carry.note(result)
        self.result, self.done, self.position = None, True, len(self.plan.steps)
        if self.graph is not None:
            self.graph.speculation = None
        if self.token is not None:
            self.session.writes.released(self.token)
        return result

    # ------------------------------------------------------------ when the program does something else

    def reads_any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether values that somebody holds are still to be computed from what ``tensors`` are views of."""
        operands = [t for t in (self.x, *self.conv[:2], self.added) if t is not None]
        is_alias = torch._C._is_alias_of  # type: ignore[attr-defined]
        return any([is_alias(t, a) for t in tensors for a in operands]) and bool(self._pending())

    def _pending(self) -> list[Placeholder]:
        """The placeholders that the program holds and that have no value."""
        found = [ref() for ref in self.placeholders]
        return [v for v in found if type(v) is Placeholder and not hasattr(v, "_value")]

    def close(self) -> None:
        """End the speculation with its session."""
        self.unreleased = []
        if self._pending():
            self.site.disable("its values are still held when the model's forward has ended")
            self.materialize()
        self.done, self.result, self.head = True, None, None

    def materialize(self, below: bool = False) -> None:
        """Compute the values of all placeholders that the program holds, by PyTorch's own operators.

        Before the result has been returned, each placeholder becomes its value. Later, and for C code
        (``below``), a placeholder keeps its place in the autograd graph and only gets the value's memory.
        """
        if torch._C._are_functorch_transforms_active():
            with outside_of_transforms():
                self._materialize(below)
        else:
            self._materialize(below)

    def _materialize(self, below: bool) -> None:
        if self.token is not None:
            self.session.writes.end(self.token)
        late, running = self.done and self.graph is not None, not self.done
        if late:
            self.site.disable("its values are used after the block has run")
        elif not self.done:
            self.site.mispredicted(self.plan)
        self.done, self.unreleased = True, []
        held = {value._at: value for value in self._pending()}
        graph = self.graph
        if _versions(*self._watched_operands()) != self.versions or (running and self._has_changed()):
            self._raise_operand_changed()
        self.result = self.head = None
        if self.added is not None and late:
            self.added_then = self.added.detach().clone()
        with self.context.entered(self.x.device.type):
            x, conv, norm = self._operands_then(graph is not None)
            if graph is not None:
                operands = [x, *conv[:2], *(() if norm is None else norm[2:4])]
                if self.added is not None:
                    self.added = alias(self.added)
                    operands.append(self.added)
                graph.operands = tuple(operands)
            y = self.function(in_pytorchs_layout(x) if self.shape_plan.carried else x, *conv)
            for at in range(max(held, default=-1) + 1):
                if at:
                    y = self._step(at - 1, y, norm)
                if at in held:
                    y = held[at].resolve(y, graph, keep=late or below)
        self.graph = None

    def _watched_operands(self) -> tuple[Tensor | None, ...]:
        """Operands of which there are no copies."""
        copied = self.x.is_cpu and self.contents is not None
        return *(self.conv[:1] if copied else self.conv[:2]), self.x, self.added

    def _then(self, t: Tensor | None, with_graph: bool = False) -> Tensor | None:
        """An operand with what it held when the block read it; ``with_graph`` wants an alias in any case.

        Where one operand depends on another, no gradients flow that way from an alias.
        """
        if t is None:
            return None
        then = None if self.contents is None else self.contents.then(t)
        if then is not None:
            return alias_by(t, lambda _: then)
        return alias(t) if with_graph else t

    def _operands_then(self, with_graph: bool = False) -> tuple[Tensor, Conv, Norm | None]:
        """Input, the convolution's and the norm's arguments as the block has read them."""
        x, weight, bias = [self._then(t, with_graph) for t in (self.x, *self.conv[:2])]
        norm = self._norm_then(with_graph)
        return cast(Tensor, x), self.conv._replace(weight=cast(Tensor, weight), bias=bias), norm

    def _norm_then(self, with_graph: bool = False) -> Norm | None:
        norm = self.norm
        if norm is None:
            return None
        weight, bias = [self._then(t, with_graph) for t in norm[2:4]]
        if not norm.training:
            mean, var = [self._then(t) for t in norm[:2]]
            norm = norm._replace(running_mean=mean, running_var=var)
        return norm._replace(weight=weight, bias=bias)

    def _has_changed(self) -> bool:
        """Whether an operand holds something else than when the block read it, as far as its result shows.

        The block runs again on what its operands hold now. It gives the same bits if they hold the same.
        """
        if self.bias_hash is not None and hash_of(cast(Tensor, self.conv.bias)) != self.bias_hash:
            return True
        watched, observer.current = observer.current, None
        try:
            with self.context.entered(self.x.device.type):
                found, again = self._run_again(*self._operands_then())
        except (RuntimeError, ValueError):  # they do not even fit
            return True
        finally:
            observer.current = watched
        tolerance = min(64 * torch.finfo(self.plan.dtypes[0]).eps, 0.05)
        then = self.moments if self.plan.is_program else self.batch_statistics
        if then is not None and again is not None:
            one, other = [torch.stack([mean, var.sqrt()]) for mean, var in (again, then)]
            if _differ(one, other, tolerance):
                return True
        expected = self.head if self.result is None else self.result
        return expected is not None and _differ(found.detach(), expected.detach(), tolerance)

    def _run_again(self, x: Tensor, conv: Conv, norm: Norm | None) -> tuple[Tensor, Any]:
        """What has run so far, and the statistics of the batch."""
        if not self.plan.is_program:
            return self._run_block(x, conv, norm)
        found, moments = self._run_head(x, conv, norm)
        if self.head is None:
            found = run_program(found, self._program(norm), self.added, moments)
        return found, moments

    def _raise_operand_changed(self) -> None:
        self.site.disable("its operands are changed in place before its result is used")
        raise RuntimeError(
            "an operand of a convolution was changed in place before the convolution's result was used, "
            "and not as in the calls that cf.accelerate has seen: the result cannot be computed any "
            "more. From now on this convolution runs as it is"
        )

    def _step(self, number: int, y: Tensor, norm: Norm | None, added: Tensor | None = None) -> Tensor:
        """Run a step that the program has taken; running statistics are not updated a second time."""
        step = self.plan.steps[number]
        if step.kind == "sum":
            added = self.added if added is None else added
            assert added is not None
            return step.run(
                y,
                torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).copy_(added)
                if added.stride() != y.stride()
                else added,
            )
        if step.kind != "norm":
            return step.run(y)
        assert norm is not None
        return step.function(y, *(norm.uncounted() if norm.training else norm))

    def run_steps_from(self, at: int, y: Tensor) -> Tensor:
        """The result from value ``at``, by PyTorch's own operators."""
        norm = self._norm_then()
        for number in range(at, len(self.plan.steps)):
            inplace = self.plan.steps[number].found.inplace
            y = self._step(number, y.clone() if inplace else y, norm, self.added_then)
        return y


def _versions(*tensors: Tensor | None) -> list[int]:
    return [t._version for t in tensors if t is not None and not t.is_inference()]


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether two runs of one call differ by more than another order of its sums may make."""
    if torch.equal(found, expected):
        return False
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return True
    error = (found[finite] - expected[finite]).float().norm()
    return bool(error > tolerance * expected[finite].float().norm())


def _exchange(value: Placeholder, true: Tensor) -> bool:
    """Make the Python object ``value`` the tensor ``true``; False where C code holds one of them."""
    with no_function():
        if value._use_count() > 1 or true._use_count() > 1:  # type: ignore[attr-defined]
            return False
    torch._C._swap_tensor_impl(value, true)
    for name in ("_speculation", "_at", "_slot", "_token"):
        del value.__dict__[name]
    value.__dict__.update(true.__dict__)
    value.__class__ = type(true)  # type: ignore[assignment]
    return True


# ---------------------------------------------------------------- placeholders


class Placeholder(Tensor):
    """Stands for a value between two steps of a block, which no other step is expected to read.

    It has a shape, strides and a place in the autograd graph. It gets memory only when something reads it.

    Attributes:
        is_placeholder: tells `explain` that a module which returns one is part of a block.
        _at: the value's number.
        _slot: its index among the placeholders.
        _value: the value, where the placeholder could not become it.
    """

    is_placeholder = waits_for_sums = True
    _speculation: Speculation
    _at: int
    _slot: int
    _token: Token
    _value: Tensor

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value in args[: 2 if is_sum(function) else 1]:
            if type(value) is not Placeholder:
                continue
            speculation = value._speculation
            writes = speculation.session.writes
            watching = writes.pause()
            try:
                result = speculation.advance(value, function, args, kwargs)
                if result is not None:
                    return result
                if function in METADATA:
                    with speculation.metadata_only(), no_function():
                        return function(*args, **kwargs)
            finally:
                if watching:
                    writes.resume()
        _materialize_all(args, kwargs)
        if function in _NEEDS_MEMORY:
            args, kwargs = tree_map(_as_plain_tensor, (args, kwargs))
        with no_function():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as its documentation has it
        cls, function, types, args=(), kwargs=None
    ):
        """Answer C code, which does not pass through :meth:`__torch_function__`."""
        speculation = getattr(args[0], "_speculation", None) if args else None
        if speculation is not None and speculation.answers_metadata:
            if function is torch.ops.prim.device.default:
                return speculation.x.device
            shape, strides = speculation.shape_plan.shapes[speculation.plan.own_values[args[0]._slot]]
            return function(torch.empty_strided(shape, strides, device="meta"), *args[1:], **(kwargs or {}))
        _materialize_all(args, kwargs, below=True)
        args, kwargs = tree_map(_as_memory, (args, kwargs or {}))
        return function(*args, **kwargs)

    def resolve(self, true: Tensor, graph: SpeculatedGraph | None, keep: bool) -> Tensor:
        """Become the value ``true``, or get its memory; returns the tensor for the next step."""
        if graph is not None:  # C code may have saved the placeholder's place in the graph
            graph.true[self._slot] = self._speculation, self._at, alias(true)
        if not keep and _exchange(self, true):
            return self
        self._value = true.detach()
        with torch.no_grad():
            self.data = self._value
        return true


def _materialize_all(args, kwargs, below: bool = False) -> None:
    """Give all placeholders among the arguments their values, and let the others know that they are read."""
    for value in tree_iter((args, kwargs)):
        if type(value) is Placeholder and not hasattr(value, "_value"):
            value._speculation.materialize(below)
        elif type(value) is CarriedMap and not below:
            value.leave()
        elif type(value) is ObservedTensor and not below:
            value.close()


#: Functions that need a plain tensor, because they reach for its memory or print it.
_NEEDS_MEMORY = {
    Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.untyped_storage, Tensor.storage, Tensor.data_ptr,
    Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__,
    *(getattr(Tensor, name).__get__ for name in ("data", "__cuda_array_interface__")),
}  # fmt: skip


def _as_plain_tensor(value):
    if type(value) is not Placeholder or not hasattr(value, "_value"):
        return value
    with no_function():
        return alias_by(value, _view_of_value) if value.requires_grad else value._value


def _view_of_value(placeholder: Placeholder) -> Tensor:
    return placeholder._value.view_as(placeholder._value)


def _as_memory(value):
    return value._value if type(value) is Placeholder else value
