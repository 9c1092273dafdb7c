"""Draws bridges.png: which axis of the map becomes time. Run as `python docs/figures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

ROWS, COLS, PLANES = 4, 5, 3
TIME = plt.get_cmap("viridis")

#: Title, which time step a place of the map belongs to, and what the steps hold.
BRIDGES = (
    ("locations\nT = H*W, F = C", lambda row, col: (row * COLS + col) / (ROWS * COLS - 1)),
    ("columns\nT = W, F = C*H", lambda row, col: col / (COLS - 1)),
    ("rows\nT = H, F = C*W", lambda row, col: row / (ROWS - 1)),
)


def draw_map(axes, step, origin=(0.0, 0.0), scale=1.0):
    """One map of PLANES channels, its places coloured by their time step (0 first, 1 last)."""
    for plane in reversed(range(PLANES)):
        for row in range(ROWS):
            for col in range(COLS):
                x = origin[0] + scale * (col + 0.45 * plane)
                y = origin[1] + scale * (ROWS - 1 - row + 0.45 * plane)
                axes.add_patch(
                    Rectangle((x, y), scale, scale, facecolor=TIME(step(row, col)), edgecolor="white", lw=0.8)
                )


def main():
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.4), gridspec_kw={"width_ratios": [1, 1, 1, 1.5]})
    for axes, (title, step) in zip(panels, BRIDGES, strict=False):
        draw_map(axes, step)
        axes.set_title(title, fontsize=11)
        axes.text(-0.3, ROWS / 2, "H", ha="right", va="center")
        axes.text(COLS / 2, -0.3, "W", ha="center", va="top")
        axes.text(COLS + 0.6, 0.35, "C", ha="left", va="center")
    frames = 4
    for t in range(frames):
        draw_map(panels[3], lambda row, col, t=t: t / (frames - 1), origin=(4.0 * t, 0.9), scale=0.55)
        panels[3].text(4.0 * t + 1.6, 0.5, f"t = {t}", ha="center", va="top", fontsize=9)
    panels[3].set_title("frames of a clip (TimeDistributed)\nT = frames, F = C*H*W", fontsize=11)
    for axes in panels:
        axes.set_aspect("equal")
        axes.autoscale_view()
        axes.axis("off")
    figure.suptitle("one colour = one time step of the LSTM, first dark, last bright", fontsize=10, y=0.04)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("bridges.png"), dpi=110)


if __name__ == "__main__":
    main()
