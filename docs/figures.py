"""Draws the guides' pictures: bridges.png and architecture.png. Run as `python docs/figures.py`."""

import hashlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

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


def draw_bridges(path: Path):
    """Which axis of the map becomes time."""
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
    figure.savefig(path, dpi=110)
    plt.close(figure)


#: Each floor's name and colour; then what a block and what a recurrent layer passes there: nothing, one box
#: or two beside each other. A box is a file, which must exist (tests/test_docs.py), and what is called there.
FLOORS = (
    (
        "2 whole models", "#dadaeb",
        [None, ("cnnlstm_fast/accelerate.py", "accelerate")],
        [("cnnlstm_fast/models.py", "CNN_LSTM_Simple, ...")],
    ),
    (
        "3 modules", "#c6dbef",
        [("cnnlstm_fast/nn/sequential.py", "Sequential.forward"), None],
        [("cnnlstm_fast/nn/recurrent.py", "LSTM.forward, GRU.forward")],
    ),
    (
        "4 what is a block", "#c6dbef",
        [("cnnlstm_fast/fusion/match.py", "steps"), ("cnnlstm_fast/fusion/", "in a running program")],
        [],
    ),
    (
        "5 functions", "#c7e9c0",
        [("cnnlstm_fast/functional/conv_block.py", "conv_block: checks, make_spec")],
        [("cnnlstm_fast/functional/recurrent.py", "lstm, gru: checks")],
    ),
    (
        "6 planning", "#fdd0a2",
        [("cnnlstm_fast/planning/choose.py", "choose: support, costs, tuner")],
        [("cnnlstm_fast/planning/recurrent.py", "choose_recurrent")],
    ),
    (
        "7 ops", "#c7e9c0",
        [("cnnlstm_fast/ops/conv_block.py", "ConvBlockFunction")],
        [("cnnlstm_fast/ops/recurrent.py", "RecurrentLayerFunction")],
    ),
    (
        "8 kernels", "#fcbba1",
        [("csrc/conv_block.cpp", "CPU: checks, threads"), ("kernels/conv_block.py", "CUDA: launches")],
        [("csrc/recurrent.cpp", "CPU: checks, threads"), ("kernels/recurrent.py", "CUDA: launches")],
    ),
    (
        "arithmetic", "#fcbba1",
        [("csrc/cpu/conv_block/", "once per instruction set"), ("kernels/conv_block_kernels.py", "kernels")],
        [("csrc/cpu/recurrent/", "once per instruction set"), ("kernels/recurrent_kernels.py", "kernels")],
    ),
)  # fmt: skip
#: What every floor may use.
BELOW_ALL = (
    "cnnlstm_fast/spec.py",
    "cnnlstm_fast/reference.py",
    "cnnlstm_fast/errors.py",
    "cnnlstm_fast/limits.py",
)


BOX = 0.56  # height of a box


def draw_box(axes, centre: float, y: float, width: float, colour: str, title: str, text: str):
    look = {"facecolor": colour, "edgecolor": "#555", "lw": 0.8}
    axes.add_patch(
        FancyBboxPatch((centre - width / 2, y), width, BOX, "round,pad=0,rounding_size=0.08", **look)
    )
    axes.text(centre, y + 0.36, title, ha="center", va="center", fontsize=8.2, family="monospace")
    axes.text(centre, y + 0.15, text, ha="center", va="center", fontsize=7.8, color="#333")


def draw_way(axes, x: float, width: float, floors: list[list], gap: float = 0.15):
    """A column of boxes, floor by floor from the top, and arrows from each box to the next on its side."""
    half = (width - gap) / 2
    above: list[tuple[float, float] | None] = [None, None]  # height and centre of the last box on each side
    for level, boxes in zip(range(len(floors))[::-1], floors, strict=True):
        centres = (
            [x + half / 2, x + width - half / 2] if len(boxes) == 2 else [x + width / 2] * 2 * bool(boxes)
        )
        for side, centre in enumerate(centres):
            box = boxes[side if len(boxes) == 2 else 0]
            if box is None:
                continue
            if len(boxes) == 2 or side == 0:
                draw_box(axes, centre, level, width if len(boxes) == 1 else half, *box)
            if above[side]:
                height, start = above[side]
                at = x + (half / 2 if side == 0 else width - half / 2) if start != centre else centre
                axes.annotate(
                    "", (at, level + BOX), (at, height),
                    arrowprops={"arrowstyle": "-|>", "color": "#333", "lw": 1.3, "shrinkA": 0, "shrinkB": 0},
                )  # fmt: skip
            above[side] = (level, centre)
    back = x + width + 0.15
    axes.annotate(
        "", (back, len(floors) - 1.2), (back, 0.3), arrowprops={"arrowstyle": "-|>", "color": "#888"}
    )
    axes.text(
        back + 0.08,
        len(floors) / 2,
        "the result goes back",
        fontsize=8,
        color="#666",
        va="center",
        rotation=90,
    )


def architecture_source() -> str:
    """What architecture.png was drawn from, which the file holds."""
    return hashlib.sha256(repr((FLOORS, BELOW_ALL)).encode()).hexdigest()


def draw_architecture(path: Path):
    """The floors, and one block's and one recurrent layer's way down through them and back."""
    figure, axes = plt.subplots(figsize=(12.5, 8.2))
    width, columns = 5.2, (1.9, 7.6)
    for column, way, title in zip(columns, (2, 3), ("a block", "a recurrent layer"), strict=True):
        axes.text(column + width / 2, len(FLOORS) - 0.22, title, ha="center", fontsize=11, weight="bold")
        floors = [[box and (floor[1], *box) for box in floor[way]] for floor in FLOORS]
        draw_way(axes, column, width, floors)
    for level, (name, *_) in zip(range(len(FLOORS))[::-1], FLOORS, strict=True):
        axes.text(columns[0] - 0.15, level + BOX / 2, name, ha="right", va="center", fontsize=9.5)
    end = columns[1] + width
    axes.add_patch(
        Rectangle((columns[0], -0.85), end - columns[0], 0.5, facecolor="#eee", edgecolor="#555", lw=0.8)
    )
    axes.text(columns[0] - 0.15, -0.6, "below all", ha="right", va="center", fontsize=9.5)
    centre = (columns[0] + end) / 2
    axes.text(centre, -0.6, "   ".join(BELOW_ALL), ha="center", va="center", fontsize=8.2, family="monospace")
    axes.text(
        centre, -1.1,
        "Where no plan of ours is faster, floor 5 calls reference.py or PyTorch's layer: the way ends there.",
        ha="center", fontsize=8.5, style="italic",
    )  # fmt: skip
    axes.set_xlim(0, end + 0.6)
    axes.set_ylim(-1.3, len(FLOORS) + 0.1)
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100, metadata={"Source": architecture_source()})
    plt.close(figure)


def main(folder: Path = Path(__file__).parent):
    draw_bridges(folder / "bridges.png")
    draw_architecture(folder / "architecture.png")


if __name__ == "__main__":
    main()
