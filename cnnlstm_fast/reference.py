"""Everything the package computes, in plain PyTorch: the oracle, the fallback and the explanation.

How to match a CNN's output to an LSTM's input
-----------------------------------------------
A CNN gives a map of shape ``(N, C, H, W)``; an LSTM with ``batch_first=True`` takes
``(B, S, F)``: batch, steps, features per step. Matching the two means deciding what a step is.

===================  ==========================================  =====================
A step is            the map becomes                             LSTM ``input_size``
===================  ==========================================  =====================
a location           ``(N, C, H, W) -> (N, H*W, C)``             ``C``
an image column      ``(N, C, H, W) -> (N, W, C*H)``             ``C * H``
a spectrogram row    ``(N, C, H, W) -> (N, H, C*W)``             ``C * W``
a frame of a clip    ``(B*T, C, H, W) -> (B, T, C*H*W)``         ``C * H * W``
===================  ==========================================  =====================

Two rules cover it all. Whenever a step's features come from an axis that is not already last,
the axes must be *moved* (``permute``/``transpose``); ``view`` alone would keep the sizes right and
mix the values up. And ``H`` and ``W`` are those after the pool: a 28x28 image pooled once by 2 is
14x14, so a frame of it has ``64 * 14 * 14 = 12544`` features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlstm_fast.errors import WrongRank, WrongShape, WrongType
from cnnlstm_fast.spec import (
    ACTIVATION_NUMBERS,
    ACTIVATIONS,
    ADD_STAGE,
    FIRST_ACTIVATION,
    LAYOUTS,
    NORM_STAGE,
    view_as_layout,
)

__all__ = [
    "CNN_LSTM_1DConv", "CNN_LSTM_Simple", "CNN_LSTM_TimeDistributed", "conv_block", "gru", "lstm",
    "to_layout",
]  # fmt: skip


def to_layout(y: Tensor, layout: str) -> Tensor:
    """Bring a map ``(N, C, H, W)`` or ``(N, C, L)`` into a named layout, contiguous as promised.

    ========================  ===========================  ==========================
    layout                    result                       a step is
    ========================  ===========================  ==========================
    ``channels_first``        ``(N, C, H, W)``             (for the next convolution)
    ``channels_last``         ``(N, C, H, W)``, C fastest  (for the next convolution)
    ``locations``             ``(N, H*W, C)``              a location
    ``locations_time_major``  ``(H*W, N, C)``              a location
    ``features``              ``(N, C*H*W)``               a frame of a clip
    ``columns``               ``(N, W, C*H)``              an image column
    ``columns_time_major``    ``(W, N, C*H)``              an image column
    ``rows``                  ``(N, H, C*W)``              a spectrogram frame
    ``rows_time_major``       ``(H, N, C*W)``              a spectrogram frame
    ========================  ===========================  ==========================

    ``columns_channels_last`` and ``rows_channels_last`` have features in the order H, C and W, C. They have
    ``..._time_major`` twins too.

    Args:
        y: the map; any strides. A map ``(N, C, L)`` counts as one of height 1.
        layout: a name of the table.

    Returns:
        A tensor of the table's shape, contiguous in that shape; ``channels_last`` in the sense of
        ``torch.channels_last``. It is a view where no element has to move.

    Raises:
        KeyError: an unknown layout.

    Example:
        >>> cf.reference.to_layout(torch.randn(8, 64, 16, 50), "columns").shape
        torch.Size([8, 50, 1024])
        >>> cf.reference.to_layout(torch.randn(8, 64, 100), "locations_time_major").shape
        torch.Size([100, 8, 64])
    """
    rank = y.dim()
    if rank == 3:
        y = y.unsqueeze(2)
    order = ["NCHW".index(axis) for axis in LAYOUTS[layout][0]]
    return view_as_layout(y.permute(order).contiguous(), layout, rank)


#: Names in ``torch.nn.functional`` that map one tensor to another of the same shape.
ACTIVATION_NAMES = frozenset(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu "
    "selu sigmoid silu softplus softshrink softsign tanh tanhshrink".split()
)


def apply_activation(y: Tensor, activation) -> Tensor:
    """Apply an activation given as a name in ``torch.nn.functional``, a module, or None."""
    if activation is None:
        return y
    if isinstance(activation, str):
        return getattr(F, activation)(y)
    return activation(y)


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    norm: nn.Module | None = None,
    activation="relu",
    pool: nn.Module | None = None,
    layout: str = "channels_first",
    plan: str = "auto",
) -> Tensor:
    """``layout(pool(activation(norm(conv(x)))))`` with PyTorch's own operators.

    Args:
        x, weight, bias, stride, padding, dilation, groups, norm, activation, pool, layout: as in
            :func:`cnnlstm_fast.functional.conv_block`.
        plan: ignored, since there is only one way here.

    Returns:
        As :func:`cnnlstm_fast.functional.conv_block`.

    Shapes:
        As :func:`cnnlstm_fast.functional.conv_block`.

    Raises:
        RuntimeError, TypeError, ValueError: what PyTorch's operators raise.

    Example:
        >>> x, weight = torch.randn(8, 1, 32, 100), torch.randn(64, 1, 3, 3)
        >>> args = dict(padding=1, pool=nn.MaxPool2d(2), layout="columns")
        >>> plain = cf.reference.conv_block(x, weight, **args)
        >>> torch.allclose(cf.functional.conv_block(x, weight, **args), plain, atol=1e-4)
        True
    """
    del plan
    conv = F.conv1d if weight.dim() == 3 else F.conv2d
    y = conv(x, weight, bias, stride, padding, dilation, groups)
    if norm is not None:
        y = norm(y)
    y = apply_activation(y, activation)
    if pool is not None:
        y = pool(y)
    if x.dim() == weight.dim():
        return to_layout(y, layout)
    return to_layout(y.unsqueeze(0), layout).squeeze(batch_dim(layout))


_BY_NUMBER = {
    ACTIVATIONS[name]: fn
    for name, fn in {
        None: lambda y: y, "relu": F.relu, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu, "elu": F.elu,
        "tanh": F.tanh, "sigmoid": F.sigmoid, "silu": F.silu, "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "softplus": F.softplus, "mish": F.mish,
        "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    }.items()
}  # fmt: skip


def conv_block_by_args(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv, activation, act, pool, order, *, norm=None
) -> Tensor:
    """The op ``cnnlstm_fast::conv_block`` in plain PyTorch; its file explains the arguments.

    ``norm`` is a batch norm's mean, variance (None: the batch's own), weight, bias and epsilon.
    """
    if conv[7:]:
        x = F.pad(x, (0, conv[8], 0, conv[7]))
    y = F.conv2d(x, weight, bias, conv[0:2], conv[2:4], conv[4:6], conv[6])
    if norm is not None:
        mean, var, gamma, beta, eps = norm
        y = F.batch_norm(y, mean, var, gamma, beta, mean is None, 0.0, eps)
    y = _BY_NUMBER[activation](y, *act)
    if pool:
        y = F.max_pool2d(y, pool[0:2], pool[2:4], pool[4:6], pool[6:8], bool(pool[8]))
    return y.permute(order).contiguous()


def epilogue_by_args(
    z: Tensor, gamma, beta, mean, var, added: Tensor | None, stages, numbers, eps: float
) -> Tensor:
    """The op ``cnnlstm_fast::epilogue`` in plain PyTorch; its file explains the arguments."""
    y = z
    for i, stage in enumerate(stages):
        if stage == NORM_STAGE:
            y = F.batch_norm(y, mean, var, gamma, beta, mean is None, 0.0, eps)
        elif stage == ADD_STAGE:
            assert added is not None
            y = torch.add(y, added, alpha=numbers[2 * i])
        else:
            number = stage - FIRST_ACTIVATION
            count = ACTIVATION_NUMBERS.get(number, 0)
            y = _BY_NUMBER[number](y, *numbers[2 * i : 2 * i + count])
    return y


def conv_backward_by_args(grad: Tensor, x: Tensor, weight: Tensor, conv, needs):
    """Gradients of a convolution's input, weight and bias, as ``needs`` asks, from that of its map.

    Plain PyTorch, differentiable in ``grad``, ``x`` and ``weight``.
    """
    after_h, after_w = conv[7:] or (0, 0)
    grad_x, *grads = torch.ops.aten.convolution_backward(
        grad,
        F.pad(x, (0, after_w, 0, after_h)) if conv[7:] else x,
        weight,
        [weight.shape[0]],
        conv[0:2],
        conv[2:4],
        conv[4:6],
        False,
        [0, 0],
        conv[6],
        needs,
    )
    if needs[0] and conv[7:]:
        grad_x = grad_x[:, :, : x.shape[2], : x.shape[3]]
    return grad_x, *grads


def batch_dim(layout: str) -> int:
    """Which dimension of a layout's result is the batch."""
    return 1 if layout.endswith("_time_major") else 0


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    proj_size: int = 0,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    plan: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A stack of LSTM layers, step by step.

    Args:
        x, hx, params: as in :func:`cnnlstm_fast.functional.lstm`.
        num_layers, bidirectional, batch_first, dropout, training, bias, proj_size, reset, lengths: as there.
        plan: ignored, since there is only one way here.

    Returns:
        As :func:`cnnlstm_fast.functional.lstm`.

    Shapes:
        As :func:`cnnlstm_fast.functional.lstm`.

    Raises:
        RuntimeError: what PyTorch's operators raise where shapes do not fit.

    Example:
        >>> layer = nn.LSTM(5, 7)
        >>> out, (h_n, c_n) = cf.reference.lstm(torch.randn(6, 3, 5), None, list(layer.parameters()))
        >>> out.shape, h_n.shape, c_n.shape
        (torch.Size([6, 3, 7]), torch.Size([1, 3, 7]), torch.Size([1, 3, 7]))
    """
    del plan
    options = (num_layers, bidirectional, batch_first, dropout if training else 0.0, reset, lengths)
    hidden = params[1].shape[0] // 4
    sizes = (proj_size or hidden, hidden)
    out, states = _stack(_lstm_step, x, hx, sizes, params, bias, *options)
    return out, (states[0], states[1])


def gru(
    x: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bias: bool = True,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    plan: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers, step by step.

    Args:
        x, hx, params, num_layers, bidirectional, batch_first, dropout, training, bias, reset, lengths: as in
            :func:`cnnlstm_fast.functional.gru`.
        plan: ignored, since there is only one way here.

    Returns:
        As :func:`cnnlstm_fast.functional.gru`.

    Shapes:
        As :func:`cnnlstm_fast.functional.gru`.

    Raises:
        RuntimeError: what PyTorch's operators raise where shapes do not fit.

    Example:
        >>> layer = nn.GRU(5, 7)
        >>> out, h_n = cf.reference.gru(torch.randn(6, 3, 5), None, list(layer.parameters()))
        >>> out.shape, h_n.shape
        (torch.Size([6, 3, 7]), torch.Size([1, 3, 7]))
    """
    del plan
    options = (num_layers, bidirectional, batch_first, dropout if training else 0.0, reset, lengths)
    sizes = (params[1].shape[0] // 3,)
    out, states = _stack(_gru_step, x, None if hx is None else (hx,), sizes, params, bias, *options)
    return out, states[0]


#: One step: (what the input contributes to the gates, state, recurrent parameters) -> next state,
#: whose first tensor is the output.
Step = Callable[..., tuple[Tensor, ...]]


def _lstm_step(from_x: Tensor, state, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None):
    h, c = state
    i, f, g, o = (from_x + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def _gru_step(from_x: Tensor, state, w_hh: Tensor, b_hh: Tensor | None, w_hr: None):
    (h,) = state
    r_x, z_x, n_x = from_x.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()  # the reset gate weighs W h + b, not h as in the paper
    return ((1 - z) * n + z * h,)


def _stack(
    step, x, hx, sizes, params, bias, num_layers, bidirectional, batch_first, dropout, reset, lengths
):  # fmt: skip
    """Layer by layer and direction by direction; returns (out, final states)."""
    if x.dim() == 2:  # one sequence without a batch
        batched = None if hx is None else [s.unsqueeze(1) for s in hx]
        reset, lengths = (None if t is None else t.unsqueeze(-1) for t in (reset, lengths))
        out, states = _stack(
            step, x.unsqueeze(1), batched, sizes, params, bias, num_layers, bidirectional, False, dropout,
            reset, lengths,
        )  # fmt: skip
        return out.squeeze(1), [s.squeeze(1) for s in states]
    if batch_first:
        x, reset = x.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
    time, batch = x.shape[:2]
    valid = None
    if lengths is not None:
        valid = torch.arange(time, device=x.device)[:, None] < lengths.to(x.device)  # (T, B)
        x = x.masked_fill(~valid[..., None], 0)  # so that nothing behind the end reaches a gradient
        reset = None if reset is None else reset & valid
    directions = 2 if bidirectional else 1
    if hx is None:
        hx = [x.new_zeros(num_layers * directions, batch, size) for size in sizes]
    per_direction = len(params) // (num_layers * directions)
    last_states = []
    for layer in range(num_layers):
        outs = []
        for reverse in range(directions):
            at = layer * directions + reverse
            weights = params[at * per_direction : (at + 1) * per_direction]
            out, state = _direction(
                step, x, [s[at] for s in hx], _named(weights, bias), reset, valid, bool(reverse)
            )
            outs.append(out)
            last_states.append(state)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout)
    return (
        x.transpose(0, 1).contiguous() if batch_first else x,
        [torch.stack(s) for s in zip(*last_states, strict=True)],
    )


def _named(weights: Sequence[Tensor], bias: bool) -> tuple[Tensor | None, ...]:
    """One direction's parameters as (w_ih, w_hh, b_ih, b_hh, w_hr), None where there are none."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if bias else (None, None)
    w_hr = rest[-1] if len(rest) % 2 else None
    return w_ih, w_hh, b_ih, b_hh, w_hr


def _direction(step: Step, x: Tensor, state, weights, reset, valid, reverse: bool):
    """One direction of one layer: x (T, B, I), state [(B, size)] -> (out (T, B, H), final state)."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    from_x = F.linear(x, w_ih, b_ih)
    outs: list[Tensor] = [x] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        if reset is not None:
            state = [s.masked_fill(reset[t, :, None], 0) for s in state]
        new = step(from_x[t], state, w_hh, b_hh, w_hr)
        if valid is None:
            state, outs[t] = new, new[0]
        else:
            alive = valid[t, :, None]
            state = [torch.where(alive, after, before) for after, before in zip(new, state, strict=True)]
            outs[t] = torch.where(alive, new[0], 0)
    return torch.stack(outs), state


class CNN_LSTM_Simple(nn.Module):
    """Image -> conv block -> every location a time step -> stacked LSTM -> class scores.

    Args:
        input_channels: channels of the image.
        lstm_hidden_size: hidden units of each LSTM layer.
        lstm_num_layers: stacked LSTM layers.
        num_classes: scores per image.

    Shapes:
        ``(B, input_channels, H, W)`` -> features ``(B, (H//2)*(W//2), 64)`` -> ``(B, num_classes)``.

    Raises:
        RuntimeError: an image of another shape; from the fast twin that error is a ``ValueError`` too.

    Example:
        >>> model = cf.CNN_LSTM_Simple(3, lstm_hidden_size=128, lstm_num_layers=2, num_classes=10)
        >>> x = torch.randn(8, 3, 28, 28)
        >>> model.features(x).shape, model(x).shape
        (torch.Size([8, 196, 64]), torch.Size([8, 10]))
        >>> plain = cf.reference.CNN_LSTM_Simple(3, 128, 2, 10)
        >>> plain.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """

    lstm_type: type[Any] = nn.LSTM

    def __init__(self, input_channels: int, lstm_hidden_size: int, lstm_num_layers: int, num_classes: int):
        super().__init__()
        self.cnn = nn.Conv2d(input_channels, 64, kernel_size=3, stride=1, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.lstm: nn.RNNBase = self.lstm_type(64, lstm_hidden_size, lstm_num_layers, batch_first=True)
        self.fc = nn.Linear(lstm_hidden_size, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What the LSTM gets: ``(B, C, H, W) -> (B, H'*W', 64)``."""
        y = self.pool(self.relu(self.cnn(x)))  # (B, 64, H', W')
        return y.flatten(2).transpose(1, 2)  # a view would mix channels into time steps

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(self.features(x))
        return self.fc(steps[:, -1])


class CNN_LSTM_1DConv(nn.Module):
    """Image -> conv block -> Conv1d along the locations -> stacked LSTM -> class scores.

    Args:
        input_channels: channels of the image.
        lstm_hidden_size: hidden units of each LSTM layer.
        lstm_num_layers: stacked LSTM layers.
        num_classes: scores per image.
        sequence_length: accepted for the tutorial's sake; the image's size decides the length.

    Shapes:
        ``(B, input_channels, H, W)`` -> features ``(B, (H//2)*(W//2), 64)`` -> ``(B, num_classes)``.

    Raises:
        RuntimeError: an image of another shape; from the fast twin that error is a ``ValueError`` too.

    Example:
        >>> model = cf.CNN_LSTM_1DConv(3, lstm_hidden_size=128, lstm_num_layers=2, num_classes=10)
        >>> x = torch.randn(8, 3, 28, 28)
        >>> model.features(x).shape, model(x).shape
        (torch.Size([8, 196, 64]), torch.Size([8, 10]))
        >>> plain = cf.reference.CNN_LSTM_1DConv(3, 128, 2, 10)
        >>> plain.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """

    lstm_type: type[Any] = nn.LSTM

    def __init__(
        self,
        input_channels: int,
        lstm_hidden_size: int,
        lstm_num_layers: int,
        num_classes: int,
        sequence_length: int | None = None,
    ):
        super().__init__()
        self.sequence_length = sequence_length
        self.cnn = nn.Sequential(
            nn.Conv2d(input_channels, 64, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )
        self.cnn_1d = nn.Conv1d(64, 64, kernel_size=3, stride=1, padding=1)
        self.lstm: nn.RNNBase = self.lstm_type(64, lstm_hidden_size, lstm_num_layers, batch_first=True)
        self.fc = nn.Linear(lstm_hidden_size, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What the LSTM gets: ``(B, C, H, W) -> (B, H'*W', 64)``."""
        y = self.cnn(x).flatten(2)  # (B, 64, H'*W')
        return self.cnn_1d(y).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(self.features(x))
        return self.fc(steps[:, -1])


class CNN_LSTM_TimeDistributed(nn.Module):
    """Clip -> the same conv block on every frame -> each frame a time step -> LSTM -> class scores.

    Args:
        input_channels: channels of a frame.
        lstm_hidden_size: hidden units of each LSTM layer.
        lstm_num_layers: stacked LSTM layers.
        num_classes: scores per clip.
        sequence_length: accepted for the tutorial's sake; the clip's length decides.
        image_size: (H, W) of a frame, which fixes the LSTM's input size.

    Shapes:
        ``(B, T, input_channels, H, W)`` -> features ``(B, T, 64*(H//2)*(W//2))`` -> ``(B, num_classes)``.

    Raises:
        ValueError: frames of another size than ``image_size``, or an input that is no batch of clips.
        TypeError: an input that is no tensor.

    Example:
        >>> model = cf.CNN_LSTM_TimeDistributed(3, 128, 2, 10, image_size=(28, 28))
        >>> clip = torch.randn(4, 10, 3, 28, 28)
        >>> model.features(clip).shape, model(clip).shape
        (torch.Size([4, 10, 12544]), torch.Size([4, 10]))
        >>> model(torch.randn(4, 10, 3, 32, 32))
        Traceback (most recent call last):
        ...
        cnnlstm_fast.errors.WrongShape: the LSTM expects 12544 features but the CNN gives 16384 = ...
    """

    lstm_type: type[Any] = nn.LSTM

    def __init__(
        self,
        input_channels: int,
        lstm_hidden_size: int,
        lstm_num_layers: int,
        num_classes: int,
        sequence_length: int | None = None,
        *,
        image_size: tuple[int, int] = (28, 28),
    ):
        super().__init__()
        self.sequence_length = sequence_length
        self.image_size = tuple(image_size)
        self.cnn = nn.Sequential(
            nn.Conv2d(input_channels, 64, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )
        pooled = 64 * (self.image_size[0] // 2) * (self.image_size[1] // 2)
        self.lstm: nn.RNNBase = self.lstm_type(pooled, lstm_hidden_size, lstm_num_layers, batch_first=True)
        self.fc = nn.Linear(lstm_hidden_size, num_classes)

    def check_frames(self, x: Tensor) -> None:
        """Raise a ``ValueError`` that names the mend if the frames do not fit the LSTM."""
        if not isinstance(x, Tensor):
            raise WrongType(f"got a {type(x).__name__}, expected clips (B, T, C, H, W)")
        if x.dim() != 5:
            raise WrongRank(
                f"got an input of shape {tuple(x.shape)}, expected a batch of clips "
                "(B, T, C, H, W): add the missing dimension, e.g. x.unsqueeze(0) for one clip"
            )
        h, w = x.shape[-2:]
        given = 64 * (h // 2) * (w // 2)
        expected = 64 * (self.image_size[0] // 2) * (self.image_size[1] // 2)
        if given != expected:  # not self.lstm.input_size: dynamo must not touch an nn.LSTM
            raise WrongShape(
                f"the LSTM expects {expected} features but the CNN gives {given} = "
                f"64 x {h // 2} x {w // 2} for {h}x{w} images (this model was made for "
                f"{self.image_size[0]}x{self.image_size[1]}): pass image_size=({h}, {w})"
            )

    def features(self, x: Tensor) -> Tensor:
        """What the LSTM gets: ``(B, T, C, H, W) -> (B, T, 64*H'*W')``."""
        self.check_frames(x)
        b, t = x.shape[:2]
        frames = x.flatten(0, 1)  # (B*T, C, H, W): the CNN sees a larger batch
        return self.cnn(frames).flatten(1).unflatten(0, (b, t))

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(self.features(x))
        return self.fc(steps[:, -1])
