"""``freeze``: a model for inference, its weights packed once, its program one call."""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad

from cnnlstm_fast import _ext
from cnnlstm_fast.accelerate import accelerate, become_fast
from cnnlstm_fast.copying import copy_sharing_tensors, held_modules
from cnnlstm_fast.freeze import archive
from cnnlstm_fast.freeze.capture import NotCaptured
from cnnlstm_fast.freeze.lower import NotLowered
from cnnlstm_fast.freeze.pieces import freeze_pieces
from cnnlstm_fast.freeze.trials import Trial, copied
from cnnlstm_fast.freeze.versions import Version, make_version, resized, signature_of

if TYPE_CHECKING:
    from cnnlstm_fast.freeze.stream import FrozenStream

__all__ = ["Frozen", "freeze", "load_frozen"]

#: Programs of one model: for arguments of other structures, dtypes, or sizes that the model fixes. Then it
#: runs itself.
_MOST_VERSIONS = 6
#: Sizes from 1 on that are tried when a model is frozen, until it takes one; and how long all of that may
#: take.
_MOST_TRIED, _SECONDS_TRIED = 10, 10.0
#: Routes by sizes that are remembered.
_MOST_ROUTES = 2048
#: What a frozen model shares with the one that it stands for, so that keys, hooks on them and `.to` are the
#: same.
_PARTS = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip

_NO_GRADIENTS = (
    "a frozen model gives no gradients, and an input requires one: call the model that was frozen, or the "
    "frozen one under torch.no_grad() or with x.detach()"
)
_NO_MODEL = (
    "this call is none of those that the saved model was frozen for, and a file holds no Python program to "
    "run instead: freeze the model with such inputs and save that"
)


def freeze(model: nn.Module, *example_inputs: Any, dtype: torch.dtype | None = None) -> Frozen:
    """The same model for inference: weights packed and norms folded once, and the program one call.

    Takes the model as in ``eval()``. Where its program cannot be captured whole, parts of it run frozen, in
    the worst case none; ``explain`` says what runs how and why.

    Args:
        model: any module. It stays as it is; the frozen one shares its parameters and buffers.
        example_inputs: arguments of one call, of usual sizes. Other sizes work too.
        dtype: a floating dtype to compute in, as ``torch.bfloat16``: the frozen model then has parameters of
            its own. Floating inputs are cast to it, and floating results back to the dtype of the first such
            input. ``torch.int8``: linear layers, LSTMs and GRUs multiply in int8, with scales for every
            output of a weight and every row of inputs and states; all else stays float32.

    Returns:
        A module that is called as the model is and has the same ``state_dict`` keys.
        See :class:`~cnnlstm_fast.freeze.module.Frozen`.

    Shapes:
        Inputs and results are those of ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``dtype`` neither a floating dtype nor
            ``torch.int8``.
        ValueError: no example inputs are given.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
        >>> frozen = cf.freeze(model, torch.randn(1, 1, 32, 100))
        >>> x = torch.randn(8, 1, 32, 90)
        >>> torch.allclose(frozen(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"got a {type(model).__name__}, expected an nn.Module")
    known = dtype is None or dtype is torch.int8
    if not known and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"got dtype={dtype!r}, expected a floating dtype as torch.bfloat16, torch.int8, or None"
        )
    if not example_inputs:
        raise ValueError("freeze needs example inputs, as cf.freeze(model, torch.randn(1, 3, 32, 100))")
    model = getattr(model, "_orig_mod", model)
    if dtype is not None and dtype is not torch.int8:
        model = copy.deepcopy(model).to(dtype)
    frozen = Frozen(for_capture(model), for_calls(model), dtype)
    frozen.prepare(example_inputs)
    return frozen


def load_frozen(path: str | os.PathLike) -> Frozen:
    """A frozen model from a file that its ``save`` wrote.

    Weights are packed again, and plans timed again on a processor of another kind, so a file serves them all.

    Args:
        path: of the file.

    Returns:
        A frozen model for the calls that it was saved with, at any sizes that these leave open. It has the
        weights under their keys but none of the model's Python.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, none of ours, or of a version that this package does not know.
        RuntimeError: the compiled kernels, which run it, are missing.

    Example:
        >>> frozen = cf.freeze(nn.Linear(4, 2), torch.randn(3, 4))
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/linear.cf"
        >>> frozen.save(path)
        >>> x = torch.randn(5, 4)
        >>> torch.equal(cf.load_frozen(path)(x), frozen(x))
        True
    """
    return archive.load(Path(path), lambda model, dtype: Frozen(model, None, dtype))


def for_capture(model: nn.Module) -> nn.Module:
    """A copy whose recurrent layers are ours, for graphs."""
    twin = copy_sharing_tensors(model)
    if twin is not model:
        for module in held_modules(twin):
            become_fast(module)
        twin.eval()
    return twin


def for_calls(model: nn.Module) -> nn.Module:
    """What runs where no program does."""
    fast = accelerate(model)
    if fast is not model:
        fast.eval()
    return fast


class Frozen(nn.Module):
    """A model for inference, made by :func:`cnnlstm_fast.freeze`.

    - It is called as the model is, and its results belong to the caller. They never require gradients.
    - ``state_dict`` keys, parameters and submodules are those of the model. After a change of weights from
      outside, as ``optimizer.step()`` of the original, call :meth:`refresh`; ``load_state_dict``, ``.to`` and
      the like do so by themselves.
    - A frozen model does not train: :meth:`train` raises.
    - Any number of threads may call it.
    - ``copy.deepcopy`` makes a frozen model of its own weights. It is saved by :meth:`save`, not by pickling.

    Args:
        model: whose program is captured: in eval mode, its recurrent layers this package's.
        plain: what runs where there is no program; None for a model from a file.
        dtype: to compute in; None for that of the weights, ``torch.int8`` for that with linear and recurrent
            layers in int8.

    Shapes:
        Inputs and results are those of the model.

    Raises:
        RuntimeError: an input requires a gradient, or what the model raises for wrong inputs.

    Example:
        >>> frozen = cf.freeze(nn.Linear(4, 2), torch.randn(3, 4))
        >>> frozen(torch.randn(7, 4)).shape
        torch.Size([7, 2])
    """

    def __init__(self, model: nn.Module, plain: nn.Module | None, dtype: torch.dtype | None = None):
        super().__init__()
        self.training = False
        for name in _PARTS:
            self.__dict__[name] = model.__dict__[name]
        self.__dict__.update(
            _model=model, _plain=plain, _pieces=None, _dtype=dtype, _versions=[], _routes={},
            _cast_to=None if dtype is torch.int8 else dtype, _lock=threading.RLock(), why_not=[],
        )  # fmt: skip

    # ---- calls

    def forward(self, *args, **kwargs):
        """As the model's; the arguments are those of the model."""
        if self._cast_to is None:
            return self._run(args, kwargs)
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor:
            return self._run_rounded(args[0])
        leaves = pytree.tree_leaves((args, kwargs))
        given = next((leaf.dtype for leaf in leaves if _is_floating(leaf)), None)
        args, kwargs = _cast((args, kwargs), self._cast_to)
        results = self._run(args, kwargs)
        return results if given is None else _cast(results, given)

    def _run_rounded(self, x: Tensor) -> Any:
        """The call of one tensor. A program that rounds its input itself gets it as it is."""
        if not x.is_floating_point():
            return self._run((x,), {})
        key = _key_of(x)
        route = self._routes.get(key)
        if (
            isinstance(route, _RunRounding)
            and _may_run([x])
            and not (torch.is_grad_enabled() and x.requires_grad)
        ):
            with contextlib.suppress(RuntimeError):
                return _cast(route.version.results_of([x]), x.dtype)
        rounded = x.to(self._cast_to)
        results = _cast(self._run((rounded,), {}), x.dtype)
        route = self._routes.get(_key_of(rounded))
        if (
            type(route) is _Run
            and route.version.rounds_its_input
            and x.dtype is torch.float32
            and x.is_contiguous()
        ):
            self._routes[key] = _RunRounding(route.version)
        return results

    def _run(self, args: tuple, kwargs: dict) -> Any:
        key: Any
        try:
            if not kwargs and len(args) == 1 and type(args[0]) is Tensor:
                (x,) = args
                tensors, key = [x], (x.shape, x.stride(), x.dtype, x.device)
            else:
                leaves, spec = pytree.tree_flatten((args, kwargs))
                tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                key = (spec, *map(_key_of, leaves))
            route = self._routes.get(key)
        except (RuntimeError, TypeError):  # a tensor without strides, an argument without a hash
            return self._as_plain(args, kwargs)
        if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
            raise RuntimeError(_NO_GRADIENTS)
        if not _may_run(tensors):
            return self._as_plain(args, kwargs)
        if route is None:
            route = self._find_route(key, tensors, args, kwargs)
        return route(self, tensors, args, kwargs)

    def _as_plain(self, args: tuple, kwargs: dict) -> Any:
        """What the model itself does."""
        model = self._plain if self._pieces is None else self._pieces
        if model is None:
            raise RuntimeError(_NO_MODEL)
        with torch.no_grad():
            return model(*args, **kwargs)

    def _find_route(self, key: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> Route:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            route = self._routes.get(key)
            if route is None:
                route = self._route_for(tensors, args, kwargs)
                if len(self._routes) >= _MOST_ROUTES:
                    self._routes.clear()
                self._routes[key] = route
        return route

    def _route_for(self, tensors: list[Tensor], args: tuple, kwargs: dict) -> Route:
        """How calls of these sizes, dtypes and strides run."""
        if not _ext.loaded or not tensors or not all(t.device.type == "cpu" for t in tensors):
            return _AS_PLAIN
        if all(t.is_contiguous() for t in tensors):
            version = self._version_for(tensors, args, kwargs)
            return _AS_PLAIN if version is None else _Run(version)
        dense, dense_args, dense_kwargs = _contiguous(args, kwargs)
        version = self._version_for(dense, dense_args, dense_kwargs)
        if version is None:
            return _AS_PLAIN
        if self._plain is None:
            return _RunStrided(version, None)
        try:
            trial = Trial(self._plain, args, kwargs)
        except Exception:  # the model's own error is raised where the call runs as plain
            return _AS_PLAIN
        checked = _RunStrided(version.in_float32(), trial.results)
        # Copies cannot give what lies in the caller's memory, nor what the model decides by strides.
        gave = trial.gave(checked(self, trial.tensors, trial.args, trial.kwargs))
        return _RunStrided(version, trial.results) if gave else _AS_PLAIN

    def _version_for(self, tensors: list[Tensor], args: tuple, kwargs: dict) -> Version | None:
        """A program for a call, captured now where there is none."""
        signature = signature_of(*pytree.tree_flatten((args, kwargs)))
        shapes = [t.shape for t in tensors]
        for version in self._versions:
            values = version.checker.values(shapes) if version.signature == signature else None
            if values is None:
                continue
            broken = version.checker.broken(values)
            if broken <= version.broken:
                return version
            return version if self._holds(version, args, kwargs) else None
        if self._plain is None or len(self._versions) + len(self.why_not) >= _MOST_VERSIONS:
            return None
        with torch.random.fork_rng(devices=()):  # the call draws what it would have drawn
            return self._new_version(signature, *copied(args, kwargs))

    def _new_version(self, signature: Any, args: tuple, kwargs: dict) -> Version | None:
        try:
            version = make_version(self._model, self._state(), signature, args, kwargs)
            if not self._holds(version, args, kwargs):
                raise NotCaptured("its program gives other results than the model")
            self._try_sizes(version, args, kwargs)
            if self._dtype is torch.int8:
                version.quantize(self._state())
        except (NotCaptured, NotLowered) as error:
            self.why_not.append(str(error))
            return None
        except (RuntimeError, ValueError) as error:  # a node that cannot run as it was captured
            self.why_not.append(f"its program does not run: {str(error).splitlines()[0]}")
            return None
        self._versions.append(version)
        return version

    def _holds(self, version: Version, args: tuple, kwargs: dict) -> bool:
        """Whether a program does what the model does in this call."""
        if self._plain is None:
            return False
        try:
            trial = Trial(self._plain, args, kwargs)
            values = version.checker.values([t.shape for t in trial.tensors])
            holds = values is not None and trial.gave(version.in_float32().results_of(trial.tensors))
        except Exception:  # the model's own error is raised where the call runs as plain
            return False
        if holds and values is not None:
            version.broken |= version.checker.broken(values)
        return holds

    def _try_sizes(self, version: Version, args: tuple, kwargs: dict) -> None:
        """Try sizes that the examples do not have: one more, and the least that the model takes.

        Export takes sizes of 0 and 1 for special, so it is tried whether the program holds where they occur.

        Raises:
            NotCaptured: the model takes such a size and the program gives other results.
        """
        least, end = (args, kwargs), time.monotonic() + _SECONDS_TRIED
        for name in version.sizes.names():
            for size in (None, *range(1, _MOST_TRIED)):
                if time.monotonic() > end:  # calls of other sizes try them then
                    return
                tried = resized(version.sizes, name, size, args, kwargs)
                if tried is None:
                    continue
                tensors = [leaf for leaf in pytree.tree_leaves(tried) if isinstance(leaf, Tensor)]
                values = version.checker.values([t.shape for t in tensors])
                if values is None or not self._takes(*tried):
                    continue
                holds = self._holds(version, *tried)
                if not holds and not version.checker.broken(values):
                    raise NotCaptured(f"its program does not hold for other values of the size {name}")
                if size is not None:
                    least = resized(version.sizes, name, size, *least) or least
                    break
        tensors = [leaf for leaf in pytree.tree_leaves(least) if isinstance(leaf, Tensor)]
        if version.checker.values([t.shape for t in tensors]) is not None:
            self._holds(version, *least)

    def _takes(self, args: tuple, kwargs: dict) -> bool:
        """Whether the model runs such a call."""
        assert self._plain is not None
        try:
            Trial(self._plain, args, kwargs)
        except Exception:  # whatever a model raises
            return False
        return True

    def prepare(self, args: tuple, kwargs: dict | None = None) -> None:
        """Capture and plan a call ahead, as the first of its kind would.

        Args:
            args, kwargs: of the call.
        """
        args, kwargs = copied(args, kwargs or {})
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            self(*args, **kwargs)
            if not self._versions and self._plain is not None and self._pieces is None:
                with self._lock, torch.inference_mode(False):
                    pieces = freeze_pieces(self._plain, self._model, args, kwargs, _frozen_piece)
                    self.__dict__["_pieces"] = pieces
                    for piece in self._frozen_pieces() if self._dtype is torch.int8 else ():
                        piece._quantize()

    def cast(self, args: tuple) -> tuple:
        """The arguments of a call as the model's program takes them."""
        return args if self._cast_to is None else _cast(args, self._cast_to)

    def version_of(self, args: tuple) -> Version | None:
        """The program that runs a call, if one does."""
        args = self.cast(args)
        leaves, spec = pytree.tree_flatten((args, {}))
        key: Any = (spec, *map(_key_of, leaves))
        if len(args) == 1 and type(args[0]) is Tensor:
            key = _key_of(args[0])
        route = self._routes.get(key)
        return route.version if isinstance(route, _Run) else None

    # ---- weights

    def _state(self) -> dict[str, Tensor]:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return {**parameters, **dict(self._model.named_buffers(remove_duplicate=False))}

    def refresh(self) -> Frozen:
        """Take the weights as they are now; returns the frozen model."""
        with self._lock, torch.inference_mode(False):
            state = self._state()
            for version in self._versions:
                version.refresh(state)
            for module in self._frozen_pieces():
                module.refresh()
        return self

    def _quantize(self) -> None:
        """Compute in int8 from now on; programs were compared with the model before."""
        self.__dict__["_dtype"] = torch.int8
        for version in self._versions:
            version.quantize(self._state())

    def _frozen_pieces(self) -> list[Frozen]:
        return [] if self._pieces is None else [m for m in self._pieces.modules() if isinstance(m, Frozen)]

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As ``nn.Module.load_state_dict``; then :meth:`refresh`."""
        found = super().load_state_dict(state_dict, strict, assign)
        if assign and self._plain is not None:
            self.__dict__.update(_plain=for_calls(self._model), _pieces=None)
        self.refresh()
        return found

    def _apply(self, fn, recurse: bool = True):
        before = [(t.dtype, t.device) for t in self._state().values()]
        super()._apply(fn, recurse)
        if [(t.dtype, t.device) for t in self._state().values()] == before:
            return self.refresh()
        with self._lock:  # programs are of dtypes and devices
            self._versions.clear()
            self._routes.clear()
            self.why_not.clear()
            self.__dict__["_pieces"] = None
        return self

    def train(self, mode: bool = True) -> Frozen:
        """Raises a RuntimeError: a frozen model does not train. ``train(False)`` changes nothing."""
        if mode:
            raise RuntimeError(
                "a frozen model does not train: its weights are packed and its norms folded. Train the model "
                "that was frozen, then call refresh() of the frozen one"
            )
        return self

    def eval(self) -> Frozen:
        """Changes nothing: a frozen model is always in eval mode."""
        return self

    # ---- copies and files

    def save(self, path: Any) -> None:
        """Write the programs and the weights to a file, for :func:`cnnlstm_fast.load_frozen`.

        The file is in safetensors' format and holds no pickled objects.

        Args:
            path: of the file, which is replaced.

        Raises:
            ValueError: the model has no program, or one that a file cannot hold; the message says why.
        """
        archive.save(self, path)

    def stream(self, batch: int = 1) -> FrozenStream:
        """The model for sequences that come in chunks, as from a microphone or a sensor.

        Args:
            batch: how many sequences run side by side.

        Returns:
            A :class:`cnnlstm_fast.freeze.stream.FrozenStream`, which is called with chunks.

        Raises:
            ValueError: the model cannot run chunk by chunk; the message says why.
        """
        from cnnlstm_fast.freeze.stream import FrozenStream

        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"got batch={batch!r}, expected how many sequences run side by side")
        if not self._versions:
            why = "; ".join(self.why_not) or "it has not been called on the CPU"
            raise ValueError(f"this model cannot run as a stream, since it has no program: {why}")
        if self._cast_to is not None:
            raise ValueError("a model that was frozen with another dtype cannot run as a stream")
        return FrozenStream(self._versions[0], batch)

    def __deepcopy__(self, memo):
        model = copy.deepcopy(self._model, memo)
        twin = Frozen(model, None if self._plain is None else for_calls(model), self._dtype)
        memo[id(self)] = twin
        with self._lock:
            twin.why_not.extend(self.why_not)
            twin._versions.extend(version.copied(twin._state()) for version in self._versions)
        return twin

    def __reduce_ex__(self, protocol):
        raise TypeError("a frozen model is not pickled: save(path) keeps it, cf.load_frozen(path) loads it")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_model" not in self.__dict__:
                raise
            return getattr(self._model, name)


def _frozen_piece(module: nn.Module, args: tuple, kwargs: dict) -> Frozen | None:
    """A module frozen for such a call; None where it has no program."""
    frozen = Frozen(module, for_calls(module))
    with torch.no_grad():
        frozen(*args, **kwargs)
    return frozen if frozen._versions else None


# ---- how calls run


class Route(Protocol):
    """How calls of some sizes, dtypes and strides run."""

    def __call__(self, frozen: Frozen, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any: ...


class _AsPlain:
    def __call__(self, frozen: Frozen, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        return frozen._as_plain(args, kwargs)


_AS_PLAIN = _AsPlain()


class _Run:
    """A program runs; where it raises, the model says what is wrong."""

    def __init__(self, version: Version):
        self.version = version

    def __call__(self, frozen: Frozen, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        try:
            return self.version.results_of(tensors)
        except RuntimeError:
            if frozen._plain is None:
                raise
            return frozen._as_plain(args, kwargs)


class _RunRounding(_Run):
    """The same for an input in float32, which the program rounds."""


class _RunStrided(_Run):
    """The same for inputs that are not contiguous: copies go in, results get the strides of ``expected``."""

    def __init__(self, version: Version, expected: Any):
        super().__init__(version)
        leaves = pytree.tree_leaves(expected)
        self.strides = [leaf.stride() if isinstance(leaf, Tensor) else None for leaf in leaves]

    def __call__(self, frozen: Frozen, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        results = super().__call__(frozen, [t.contiguous() for t in tensors], args, kwargs)
        leaves, spec = pytree.tree_flatten(results)
        if len(leaves) != len(self.strides):
            return results
        return pytree.tree_unflatten(list(map(_with_strides, leaves, self.strides)), spec)


def _with_strides(value: Any, stride: tuple[int, ...] | None) -> Any:
    if stride is None or not isinstance(value, Tensor) or value.stride() == stride or 0 in stride:
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)


def _key_of(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _may_run(tensors: list[Tensor]) -> bool:
    """Whether programs can run these: no subclass, transform, tracer, autocast, mode or lazy negation."""
    return (
        all([type(t) is Tensor or type(t) is nn.Parameter for t in tensors])
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.compiler.is_compiling()
        and not any([t.is_neg() or t.is_conj() for t in tensors])
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda v: v.to(dtype) if _is_floating(v) else v, values)


def _contiguous(args: tuple, kwargs: dict) -> tuple[list[Tensor], tuple, dict]:
    args, kwargs = pytree.tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) else v, (args, kwargs))
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], args, kwargs
