"""Drop-ins for ``nn.LSTM`` and ``nn.GRU``, with resets and lengths.

They are ``nn.RNNBase`` and not ``nn.LSTM``: dynamo breaks the graph at every instance of the latter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cnnlstm_fast.functional import recurrent as functional
from cnnlstm_fast.nn.leaf import Leaf
from cnnlstm_fast.nn.stream import Stream

# ``reset`` and ``lengths`` are meant as keywords. They are not keyword-only, because PyTorch's
# TorchScript-based ONNX exporter passes every default by position.

__all__ = ["GRU", "LSTM"]


class _Recurrent(Leaf, nn.RNNBase):
    """The common part of LSTM and GRU: all but the form of a state."""

    #: The module that this one stands in for.
    twin: ClassVar[type[nn.RNNBase]]
    _cell: ClassVar[functional.Cell]

    @classmethod
    def like(cls, module: nn.RNNBase):
        """A fast layer that shares the parameters, the mode and the options of a plain ``module``.

        Args:
            module: an ``nn.LSTM`` or ``nn.GRU``.

        Raises:
            TypeError: ``module`` is not exactly the type that this class stands in for.
        """
        if type(module) is not cls.twin:
            raise TypeError(f"got a {type(module).__name__}, expected an nn.{cls.twin.__name__}")
        return _retyped(module, cls)

    def _parameters_in_order(self) -> list[Tensor]:
        """The weights as attributes, which parametrizations set, and not as ``_flat_weights``."""
        return [getattr(self, name) for name in self._flat_weights_names]

    def _stack(self) -> functional.Stack:
        return functional.Stack(
            self.num_layers, self.bidirectional, self.batch_first, self.dropout, self.training, self.bias,
            self.proj_size,
        )  # fmt: skip

    def stream(self, batch: int = 1, hx=None) -> Stream:
        """The layer as it is now, to be fed one step at a time with little latency.

        Fed step by step, a stream gives what the layer gives for the whole sequence.

        Args:
            batch: how many sequences go side by side.
            hx: initial state as ``forward`` takes it; zeros if None.

        Returns:
            A :class:`cnnlstm_fast.nn.stream.Stream`: ``y = stream(x)`` takes one step, returns its output and
            keeps the state.

        Raises:
            ValueError: the layer is bidirectional, or ``hx`` does not fit.
        """
        return Stream(self._cell, self._stack(), self._parameters_in_order(), batch, hx)

    def _run(self, input, hx: Sequence[Tensor] | None, reset: Tensor | None, lengths):
        stack, params = self._stack(), self._parameters_in_order()
        if not isinstance(input, PackedSequence):
            return functional.run(self._cell, input, hx, params, stack, reset, lengths)
        if reset is not None or lengths is not None:
            raise ValueError(
                "got a PackedSequence and reset or lengths: unpack it with torch.nn.utils.rnn."
                "pad_packed_sequence, and pass the padded tensor with its lengths"
            )
        return functional.run_packed(self._cell, input, hx, params, stack)

    def __prepare_scriptable__(self) -> nn.RNNBase:
        """The plain module, which TorchScript can compile."""
        return _retyped(self, self.twin)


def _retyped(module: nn.RNNBase, cls: type[nn.RNNBase]) -> nn.RNNBase:
    """``module`` as another class; it shares parameters and hooks, and has registries of its own."""
    other = cls.__new__(cls)
    for name, value in module.__dict__.items():
        other.__dict__[name] = copy.copy(value) if isinstance(value, (dict, list, set)) else value
    return other


class LSTM(_Recurrent):
    """An ``nn.LSTM`` with the same parameters, keys and results, but fused; and with resets and lengths.

    The constructor, the attributes and the results are those of :class:`torch.nn.LSTM`.

    Args:
        args, kwargs: what :class:`torch.nn.LSTM` takes: ``input_size``, ``hidden_size``, ``num_layers``,
            ``bias``, ``batch_first``, ``dropout``, ``bidirectional``, ``proj_size``, ``device``, ``dtype``.

    Shapes:
        ``(T, B, input_size)`` -> ``(T, B, D * H_out)``, or ``(B, T, ...)`` with ``batch_first``, or
        ``(T, ...)`` for one sequence. ``D`` is 2 if bidirectional, else 1; ``H_out`` is ``proj_size`` or,
        where that is 0, ``hidden_size``. States are ``(num_layers * D, B, H_out)`` and
        ``(num_layers * D, B, hidden_size)``.

    Raises:
        ValueError, TypeError: as :func:`cnnlstm_fast.functional.lstm`. Where ``nn.LSTM`` raises a
            ``RuntimeError`` for a shape, the ``ValueError`` is one as well.

    Example:
        >>> layer = cf.LSTM(64, 128, batch_first=True)
        >>> x, done = torch.randn(8, 81, 64), torch.rand(8, 81) < 0.05
        >>> out, (h_n, c_n) = layer(x, reset=done)  # the state is zero wherever an episode began
        >>> out.shape, h_n.shape
        (torch.Size([8, 81, 128]), torch.Size([1, 8, 128]))
        >>> out, (h_n, c_n) = layer(x, lengths=torch.randint(1, 82, (8,)))  # no packing
    """

    twin = nn.LSTM
    _cell = functional.LSTM
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    # The state of an LSTM is a pair. nn.LSTM overrides nn.RNNBase in the same way.
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layers over whole sequences.

        Args:
            input: a tensor, or a ``PackedSequence`` (then without ``reset`` and ``lengths``).
            hx: the initial state ``(h_0, c_0)`` as ``nn.LSTM`` takes it; zeros if None.
            reset, lengths: as in :func:`cnnlstm_fast.functional.lstm`; pass them by name.

        Returns:
            ``(out, (h_n, c_n))`` as ``nn.LSTM``.

        Raises:
            ValueError, TypeError: as the class says.
        """
        functional.check_pair(hx)
        out, (h_n, c_n) = self._run(input, hx, reset, lengths)
        return out, (h_n, c_n)


class GRU(_Recurrent):
    """An ``nn.GRU`` with the same parameters, keys and results, but fused; and with resets and lengths.

    The constructor, the attributes and the results are those of :class:`torch.nn.GRU`.

    Args:
        args, kwargs: what :class:`torch.nn.GRU` takes: ``input_size``, ``hidden_size``, ``num_layers``,
            ``bias``, ``batch_first``, ``dropout``, ``bidirectional``, ``device``, ``dtype``.

    Shapes:
        ``(T, B, input_size)`` -> ``(T, B, D * H)``, or ``(B, T, ...)`` with ``batch_first``, or
        ``(T, ...)`` for one sequence. ``D`` is 2 if bidirectional, else 1; ``H`` is ``hidden_size``. The
        state is ``(num_layers * D, B, H)``.

    Raises:
        ValueError, TypeError: as :func:`cnnlstm_fast.functional.gru`. Where ``nn.GRU`` raises a
            ``RuntimeError`` for a shape, the ``ValueError`` is one as well.

    Example:
        >>> layer = cf.GRU(64, 128, batch_first=True)
        >>> x, done = torch.randn(8, 81, 64), torch.rand(8, 81) < 0.05
        >>> out, h_n = layer(x, reset=done)  # the state is zero wherever an episode began
        >>> out.shape, h_n.shape
        (torch.Size([8, 81, 128]), torch.Size([1, 8, 128]))
        >>> out, h_n = layer(x, lengths=torch.randint(1, 82, (8,)))  # no packing
    """

    twin = nn.GRU
    _cell = functional.GRU

    def __init__(self, *args, **kwargs):
        if "proj_size" in kwargs:
            raise ValueError("got proj_size for a GRU: only an LSTM has projections")
        super().__init__("GRU", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run the layers over whole sequences.

        Args:
            input: a tensor, or a ``PackedSequence`` (then without ``reset`` and ``lengths``).
            hx: the initial state ``h_0`` as ``nn.GRU`` takes it; zeros if None.
            reset, lengths: as in :func:`cnnlstm_fast.functional.gru`; pass them by name.

        Returns:
            ``(out, h_n)`` as ``nn.GRU``.

        Raises:
            ValueError, TypeError: as the class says.
        """
        out, (h_n,) = self._run(input, None if hx is None else (hx,), reset, lengths)
        return out, h_n
