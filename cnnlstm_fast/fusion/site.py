"""One convolution of an accelerated model: a call runs as PyTorch's, is observed, or runs as a block."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlstm_fast.fusion import session
from cnnlstm_fast.fusion.calls import Conv
from cnnlstm_fast.fusion.carry import CarriedMap, Carry, Decisions, in_pytorchs_layout, is_image
from cnnlstm_fast.fusion.context import Context, context_of, why_watched
from cnnlstm_fast.fusion.observe import Observation, ObservedTensor
from cnnlstm_fast.fusion.plan import MEMORY, FusionPlan, ShapePlan
from cnnlstm_fast.fusion.speculate import Speculation
from cnnlstm_fast.fusion.timing import seconds_of_ways
from cnnlstm_fast.planning import observer, tuner
from cnnlstm_fast.planning.support import global_hooks, records_gradients

#: How often the program may do something else than was observed before a convolution is no longer fused.
MOST_MISPREDICTIONS = 3

_PLAIN = (Tensor, nn.Parameter)
_ACCEPTED = (Tensor, nn.Parameter, ObservedTensor, CarriedMap)

#: By type: ``_conv_forward``, and the name, Python function and built-in that it calls, if it is not patched.
_OWN: dict[type, tuple] = {
    cls: (cls._conv_forward, name, getattr(F, name), getattr(torch, name))
    for cls, name in ((nn.Conv1d, "conv1d"), (nn.Conv2d, "conv2d"))
}


class ConvSite:
    """Replaces a convolution's ``_conv_forward``, as an attribute of the module.

    A copy of a site knows nothing of its original's calls.

    Attributes:
        known: an observation or a plan by training mode, dtype, device and
            :class:`~cnnlstm_fast.fusion.context.Context`.
        decisions: whether sessions carry that begin with this convolution.
        left_to_pytorch: keys (:func:`_call_key`) of calls that are known to run as PyTorch's.
        why_disabled: why all calls run as PyTorch's from now on, or None.
        why_unfused: why the last call ran as PyTorch's.
    """

    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        self.known: dict[tuple, Observation | FusionPlan] = {}
        self.decisions = Decisions()
        self.left_to_pytorch: set[tuple] = set()
        self.mispredictions = 0
        self.why_disabled: str | None = None
        self.why_unfused: str | None = None

    def __reduce__(self):
        return ConvSite, (self.module(),)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module: Any = self.module()
        kind: Any = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Conv1d
        running = session.current()
        if running is not None and running.decisions is None and not torch.compiler.is_compiling():
            shape_kind, running.carry = self.decisions.begin(x, module.training, running.writes)
            running.decisions = None if shape_kind is None else (self.decisions, shape_kind)
        if (
            torch.compiler.is_compiling()
            or self.why_disabled
            or observer.current is not None
            or (self.left_to_pytorch and (running is None or running.carry is None))
        ):
            if self._is_left_to_pytorch(module, x):
                return kind._conv_forward(module, x, weight, bias)
        why = self._why_unfused(module, kind, x, weight, running)
        if why is None and running is None:
            why = "is called outside of the model's forward"
            session.watch_caller(module)
        if why is not None or running is None:
            self.note_unfused(why or "")
            return kind._conv_forward(module, x, weight, bias)
        function, padding = _OWN[kind][3], module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        elif padding == "same" and records_gradients() and weight.requires_grad:
            x, padding = _padded_after(x, weight, module)
        conv = Conv(weight, bias, module.stride, padding, module.dilation, module.groups)
        return self._convolve(running, module, function, x, conv)

    def _is_left_to_pytorch(self, module: nn.Module, x: Any) -> bool:
        """Whether a call is known to run as PyTorch's; a cheap look."""
        if torch.compiler.is_compiling():
            return True
        if self.why_disabled:
            self.note_unfused(self.why_disabled)
            return True
        if self.left_to_pytorch and observer.current is None and type(x) is Tensor:
            try:
                return _call_key(module, x) in self.left_to_pytorch
            except (
                RuntimeError,
                TypeError,
            ):  # sparse and nested tensors have no strides, symbolic sizes no hash
                pass
        return False

    def _why_unfused(self, module: nn.Module, kind: Any, x: Any, weight: Any, running: Any) -> str | None:
        """Why a call must run as PyTorch's, as a sentence; None where it need not."""
        own, name, functional_own, _ = _OWN[kind]
        if kind._conv_forward is not own or getattr(F, name) is not functional_own:
            return "PyTorch's convolution is patched"
        if (
            module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
            or module._forward_pre_hooks or global_hooks()
        ):  # fmt: skip
            return "has hooks"
        if type(x) not in _ACCEPTED or x.layout is not torch.strided or x.is_nested:
            return "its input is not a plain tensor"
        if type(weight) not in _PLAIN or x.dim() != weight.dim():
            return "its weight is a Tensor subclass or its input has no batch dimension"
        if x.requires_grad and torch.is_inference_mode_enabled():
            # A view of it says so there, and not any more as soon as a mode watches.
            return "its input requires a gradient in inference mode"
        return why_watched(
            torch._C._len_torch_dispatch_stack() == 0 if running is None else running.writes.alone()
        )

    def _convolve(self, running: session.Session, module, function, x: Tensor, conv: Conv) -> Tensor:
        context = context_of(x)
        key = (module.training, x.dtype, x.device.type, *context)
        known = self.known.get(key)
        if known is None or (type(known) is Observation and known.plan is None):
            self.note_unfused("is being observed: the first call in this mode")
            running.settled = False
            y = function(x, *conv)
            if type(y) is Tensor and (known is None or len(known.repeats) < Observation.MOST):
                observation = Observation(running, function, x, conv)
                observation.observe(y)
                if known is None:
                    self.known[key] = observation
                else:
                    known.repeats.append(observation)
            return y
        if type(known) is Observation:
            plan = known.common_plan()
            if plan is None:
                self.disable("what follows it differs within one call of the model")
                return function(x, *conv)
            known = self.known[key] = plan
        assert type(known) is FusionPlan
        carry = running.carry
        if carry is not None and function is torch.conv2d and carry.may_pass():
            return self._convolve_carried(running, carry, known, context, function, x, conv)
        if isinstance(x, CarriedMap):
            x.leave()
        known.carries = False
        known, shape_plan = self._planned(running, known.best_for, x, conv, False)
        if not shape_plan.shapes:
            if module.padding_mode == "zeros":
                self._leave_to_pytorch(module, x)  # otherwise x is not the module's input, or it is cast
            self.note_unfused(shape_plan.why)
            return function(x, *conv)
        return self._speculate(running, known, shape_plan, context, function, x, conv, None)

    def _convolve_carried(
        self, running: session.Session, carry: Carry, known: FusionPlan, context: Context, function,
        x: Tensor, conv: Conv,
    ) -> Tensor:  # fmt: skip
        """A call in a session whose maps lie channels-last."""
        if type(x) is ObservedTensor:
            x.close()
        result_of: Carry | None = None
        known.carries = False
        plan, shape_plan = known, None
        if is_image(x):
            as_it_lies = carry.memory(x)
            site = self._planned(running, known.carried_site, as_it_lies, conv)
            carry.plain_us, carry.saved_us = carry.plain_us + site.plain_us, carry.saved_us + site.saves_us
            if not site.leaves:
                x, result_of = as_it_lies if type(x) is CarriedMap else carry.read(x), carry
                if not carry.rehearses:
                    known.carries = True
                    plan, shape_plan = site.plan, site.shape_plan
        if isinstance(x, CarriedMap):
            x.leave()
        if shape_plan is None:
            plan, shape_plan = self._planned(running, known.best_for, x, conv, False)
        if shape_plan.shapes:
            return self._speculate(running, plan, shape_plan, context, function, x, conv, result_of)
        self.note_unfused(shape_plan.why)
        if result_of is None:
            return function(x, *conv)
        carry.calls()
        return carry.hold(function(x, *conv), changeable=True)

    def _speculate(
        self, running: session.Session, known: FusionPlan, shape_plan: ShapePlan, context: Context, function,
        x: Tensor, conv: Conv, carry: Carry | None,
    ) -> Tensor:  # fmt: skip
        try:
            speculation = Speculation(self, running, known, shape_plan, context, function, x, conv, carry)
        except Exception as error:  # PyTorch's operators raise their own error, if they do
            self.disable(f"its block raises {type(error).__name__}: {error}")
            return function(in_pytorchs_layout(x) if shape_plan.carried else x, *conv)
        return speculation.start()

    def _planned(self, running: session.Session, find: Callable, x: Tensor, conv: Conv, *args) -> Any:
        """What a method of a plan finds for ``x``; under ``cnnlstm_fast.tune`` ways are timed."""
        if not (tuner.enabled and x.is_cpu):
            return find(x, conv, *args)
        watching = running.writes.pause()  # nothing is timed while a mode is active
        try:
            return find(x, conv, *args, seconds_of_ways)
        finally:
            if watching:
                running.writes.resume()

    def disable(self, why: str) -> None:
        """Run all calls as PyTorch's from now on."""
        self.known.clear()
        self.why_disabled = why

    def mispredicted(self, plan: FusionPlan) -> None:
        """Forget ``plan``, since the program did something else: the convolution is observed again."""
        self.mispredictions += 1
        if self.mispredictions >= MOST_MISPREDICTIONS:
            self.disable("what follows it changes from call to call")
        else:
            self.left_to_pytorch.clear()
            self.known = {
                key: known
                for key, known in self.known.items()
                if known is not plan and not (type(known) is FusionPlan and plan in known.others)
            }

    def _leave_to_pytorch(self, module: nn.Module, x: Tensor) -> None:
        if len(self.left_to_pytorch) >= MEMORY:
            self.left_to_pytorch.clear()
        self.left_to_pytorch.add(_call_key(module, x))

    def note_unfused(self, why: str) -> None:
        """Note why a call runs as PyTorch's, for ``report()`` and `explain`."""
        self.why_unfused = why
        if observer.current is not None:
            observer.current.as_is(cast(nn.Module, self.module()), why)


def _padded_after(x: Tensor, weight: Tensor, module: nn.Module) -> tuple[Tensor, Any]:
    """Input and padding of a convolution with ``padding="same"``, whose sides may differ by one.

    PyTorch pads the longer side in a copy, and its graph saves that copy. Later writes to the input are
    then allowed, so the same copy is made here. The weight may be of another size than the module was made
    for; PyTorch goes by the weight's.
    """
    dilation: Any = module.dilation
    sums = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    if not any([both % 2 for both in sums]):
        return x, module.padding
    return F.pad(x, [side for both in reversed(sums) for side in (0, both % 2)]), tuple(s // 2 for s in sums)


def _call_key(module: nn.Module, x: Tensor) -> tuple:
    """What decides whether a call of one site runs as PyTorch's."""
    autocast = torch._C._is_any_autocast_enabled() and context_of(x).autocast
    return (
        x.shape, x.stride(), x.dtype, x.is_cpu, module.training,
        records_gradients(), autocast, tuner.enabled,
    )  # fmt: skip
