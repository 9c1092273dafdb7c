"""The way from a map to the sequence that a recurrent layer takes, as a module."""

from __future__ import annotations

from torch import Tensor, nn

from cnnlstm_fast import reference
from cnnlstm_fast.errors import WrongRank
from cnnlstm_fast.fusion import match
from cnnlstm_fast.spec import LAYOUTS

__all__ = ["ToSequence"]

#: Layouts that are sequences; the two of maps are not.
_SEQUENCES = tuple(name for name in LAYOUTS if not name.startswith("channels_"))


class ToSequence(nn.Module):
    """``(N, C, H, W)`` as a sequence; inside :class:`cnnlstm_fast.Sequential` the block before writes it.

    =========================  =============================  =========================
    layout                     result                         a step is
    =========================  =============================  =========================
    ``columns``                ``(N, W, C*H)``                an image column (OCR)
    ``rows``                   ``(N, H, C*W)``                a spectrogram frame
    ``locations``              ``(N, H*W, C)``                a location
    ``columns_channels_last``  ``(N, W, H*C)``                a column, channel fastest
    ``rows_channels_last``     ``(N, H, W*C)``                a row, channel fastest
    ``frames``                 ``(N / steps, steps, C*H*W)``  a frame of a clip
    =========================  =============================  =========================

    With ``_time_major`` appended the first two dimensions change places (a clip's frames then lie
    one time step after the other in N). A map ``(N, C, L)`` counts as one of height 1.

    Args:
        layout: a name of the table.
        steps: for ``frames`` only, how many frames a clip has.

    Shapes:
        ``(N, C, H, W)`` or ``(N, C, L)`` -> as in the table.

    Raises:
        ValueError: an unknown layout, ``steps`` missing, or given without need; an input that is no map.

    Example:
        >>> cf.ToSequence("columns")(torch.randn(8, 64, 16, 50)).shape
        torch.Size([8, 50, 1024])
        >>> cf.ToSequence("frames", steps=10)(torch.randn(40, 16, 14, 14)).shape
        torch.Size([4, 10, 3136])
    """

    def __init__(self, layout: str = "columns", steps: int | None = None):
        super().__init__()
        frames = layout in ("frames", "frames_time_major")
        if not frames and layout not in _SEQUENCES:
            raise ValueError(f"unknown layout {layout!r}, expected frames or one of {', '.join(_SEQUENCES)}")
        if frames != (steps is not None):
            raise ValueError(f"got layout={layout!r} and steps={steps}: frames need it, nothing else does")
        self.name = layout
        self.layout = "features" if frames else layout
        self.steps = steps

    def extra_repr(self) -> str:
        return f"{self.name!r}" + (f", steps={self.steps}" if self.steps is not None else "")

    def split_clips(self, y: Tensor) -> Tensor:
        """The result from a map in :attr:`layout`: for clips, N is split into clips and steps; a view."""
        if self.steps is None:
            return y
        return y.unflatten(0, (-1, self.steps) if self.name == "frames" else (self.steps, -1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4):
            raise WrongRank(f"got shape {tuple(x.shape)}, expected a map (N, C, H, W) or (N, C, L)")
        return self.split_clips(reference.to_layout(x, self.layout))


match.PARTS[ToSequence] = match.Part("flatten")
