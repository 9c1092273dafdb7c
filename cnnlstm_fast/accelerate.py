"""Any model -> the same model, fast: a copy whose convolutions watch what follows them, and its report."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from cnnlstm_fast import reference
from cnnlstm_fast.copying import copy_sharing_tensors, held_modules
from cnnlstm_fast.fusion.match import members
from cnnlstm_fast.fusion.observe import Observation
from cnnlstm_fast.fusion.session import mark, unwatch, watch
from cnnlstm_fast.fusion.site import ConvSite
from cnnlstm_fast.nn import recurrent

__all__ = ["Report", "Site", "accelerate"]


def accelerate(model: nn.Module) -> nn.Module:
    """The same model, made of fast parts.

    A convolution and what follows it run as one block wherever the first call showed that the results are the
    same. ``nn.LSTM`` and ``nn.GRU`` become this package's classes, which compare equal to PyTorch's. Hooks,
    parametrizations, custom attributes and methods, ``train``/``eval``, ``state_dict`` keys, copying and
    pickling stay as they are.

    Args:
        model: any module. It stays as it is.

    Returns:
        A module of the same class. It is a ``copy.deepcopy`` of ``model``, except for tensors and for what
        cannot be copied: these are shared. A model that cannot be copied is returned as it is. ``report()``
        of the result lists what became fast, what did not and why (:class:`cnnlstm_fast.accelerate.Report`),
        after two calls in a mode: the first call observes.

    Shapes:
        Inputs and results are those of ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
        >>> fast = cf.accelerate(model)
        >>> fast[0].weight is model[0].weight
        True
        >>> x = torch.randn(8, 1, 32, 100)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"got a {type(model).__name__}, expected an nn.Module")
    model = getattr(model, "_orig_mod", model)
    fast = copy_sharing_tensors(model)
    if fast is model:
        return model
    not_ours = set(map(id, held_modules(model)))
    for module in held_modules(fast):
        if id(module) not in not_ours:
            become_fast(module)
    not_ours |= {id(m) for container in fast.modules() for m in _chain_of(container)}
    changed = {id(m) for m in fast.modules() if isinstance(type(m), _EqualsTwin)}
    for module in fast.modules():
        if _convolves(module) and id(module) not in not_ours:
            module.__dict__["_conv_forward"] = ConvSite(module)
            changed.add(id(module))
    for module in fast.modules():
        if any(id(m) in changed for m in module.modules()):
            mark(module)
    if changed and id(fast) not in changed:
        watch(fast)
    if not hasattr(fast, "report"):
        fast.report = Reporter(fast)  # type: ignore[assignment]  # a plain attribute
    return fast


def _convolves(module: nn.Module) -> bool:
    """Whether a module is a convolution with PyTorch's own forward; its weights may be computed."""
    return any(
        isinstance(module, conv)
        and "forward" not in module.__dict__
        and type(module).forward is conv.forward
        and type(module)._conv_forward is conv._conv_forward
        for conv in (nn.Conv1d, nn.Conv2d)
    )


def _chain_of(module: nn.Module) -> list[nn.Module]:
    """The modules in one of this package's containers, which fuses them by itself."""
    where = type(module).__module__
    ours = where.startswith(__package__ + ".") and where != reference.__name__  # which holds plain models
    if not ours or isinstance(module, nn.RNNBase):
        return []
    return members(module.children())


class _EqualsTwin(type):
    """Metaclass of classes that equal the plain class which they replace, for ``type(m) == nn.LSTM``."""

    twin: type

    def __eq__(cls, other):
        return other is cls.twin or other is cls

    def __hash__(cls):
        return hash(cls.twin)


class LSTM(recurrent.LSTM, nn.LSTM, metaclass=_EqualsTwin):  # type: ignore[misc]  # forward takes more
    """The class of an accelerated ``nn.LSTM``; its instances are instances of ``nn.LSTM`` too."""


class GRU(recurrent.GRU, nn.GRU, metaclass=_EqualsTwin):  # type: ignore[misc]  # forward takes more
    """The class of an accelerated ``nn.GRU``; its instances are instances of ``nn.GRU`` too."""


_FAST: dict[type, type] = {nn.LSTM: LSTM, nn.GRU: GRU}


def become_fast(module: nn.Module) -> None:
    """Give a copied module its fast class, and remove hooks of an earlier acceleration."""
    if "forward" not in module.__dict__:
        module.__class__ = _FAST.get(type(module), type(module))
    unwatch(module)


# ---------------------------------------------------------------- the report


class Site(NamedTuple):
    """One row of a :class:`cnnlstm_fast.accelerate.Report`.

    Attributes:
        name: the module's name in the model.
        block: what runs as one, for example ``Conv2d+BatchNorm+ReLU+MaxPool2d``.
        mode: ``training`` or ``eval``, the dtype, and ``no gradients`` where they are off.
        plan: ``direct``, ``chunked``, ``winograd`` or ``fast`` (a recurrent layer); ``PyTorch`` for what runs
            as it is. ``+epilogue``: one pass runs norm, sum and activation behind the convolution.
        reason: why.
    """

    name: str
    block: str
    mode: str
    plan: str
    reason: str


class Report(NamedTuple):
    """What became fast; ``str()`` is a table.

    Attributes:
        sites: a :class:`cnnlstm_fast.accelerate.Site` for each convolution and recurrent layer, by mode.

    Example:
        >>> fast = cf.accelerate(nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)).eval())
        >>> _ = fast(torch.randn(8, 1, 32, 100)), fast(torch.randn(8, 1, 32, 100))
        >>> fast.report().sites[0].block
        'Conv2d+ReLU+MaxPool2d'
    """

    sites: list[Site]

    def __str__(self) -> str:
        rows = [tuple(name for name in Site._fields), *self.sites]
        widths = [max(len(row[i]) for row in rows) for i in range(len(Site._fields))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class Reporter:
    """``report()`` of an accelerated model; a copy of the model takes a copy of it along."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)  # a strong one would be a cycle, for the garbage collector

    def __reduce__(self):
        return Reporter, (self.model(),)

    def __call__(self) -> Report:
        """Every convolution and recurrent layer, by the calls so far."""
        model: Any = self.model()
        fused = {id(m) for module in model.modules() for m in _chain_of(module)}
        return Report([site for name, m in model.named_modules() for site in _sites(name, m, fused)])


def _sites(name: str, module: nn.Module, fused: set[int]) -> Iterator[Site]:
    kind = type(module).__name__
    site = module.__dict__.get("_conv_forward")
    if isinstance(site, ConvSite):
        if not site.known:
            yield Site(
                name, kind, "", "PyTorch", site.why_disabled or site.why_unfused or "has not been called"
            )
        for (training, dtype, _, grad, _, autocast), known in site.known.items():
            mode = f"{'training' if training else 'eval'}, {str(autocast or dtype)[6:]}"
            mode += "" if grad else ", no gradients"
            if isinstance(known, Observation):
                yield Site(name, kind, mode, "PyTorch", "observed once: fast from the next calls on")
                continue
            rows: dict[tuple[str, str, str], None] = {}
            for plan, found in known.seen():
                ways = ["PyTorch" if found.plan == "reference" else found.plan]
                ways += ["epilogue"] if found.program is not None else []
                rows["+".join([kind, *map(str, plan.steps)]), "+".join(ways), found.why] = None
            for block, way, why in rows:
                yield Site(name, block, mode, way, why)
    elif isinstance(module, nn.RNNBase):
        is_fast = isinstance(module, (recurrent.LSTM, recurrent.GRU))
        why = "" if is_fast else "only nn.LSTM and nn.GRU themselves are replaced"
        yield Site(name, kind, "", "fast" if is_fast else "PyTorch", why)
    elif id(module) in fused and type(module) in (nn.Conv1d, nn.Conv2d):
        yield Site(name, kind, "", "fast", "its container fuses it")
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield Site(name, kind, "", "PyTorch", "is not fused")
