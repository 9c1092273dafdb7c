"""Every example runs as it stands, in its tiny form, and shows reference beside fast."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
#: Run by tests of their own, or not at all.
OTHERS = {"side_by_side.py", "distributed.py", "cartpole_memory.py"}
EXAMPLES = sorted(p.name for p in FOLDER.glob("*.py") if p.name not in OTHERS)

needs_aeon = pytest.mark.skipif(
    importlib.util.find_spec("aeon") is None,
    reason="the data: pip install --no-deps -r requirements-data.txt",
)


def run(name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, FOLDER / name, *args],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip


@pytest.mark.first
@pytest.mark.some(2)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_aeon) if n == "sensors.py" else n for n in EXAMPLES]
)
def test_an_example_runs(name):
    done = run(name, "--tiny")
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout and "fast" in done.stdout
    assert "nan" not in done.stdout


@pytest.mark.first
def test_distributed_gradients_are_those_of_one_process():
    done = run("distributed.py", "--tiny", "--seed", "5")
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+) +2 processes.*by at most (\S+) of", done.stdout, re.MULTILINE))
    assert set(found) == {"reference", "fast"}
    assert all(0 < float(error) < 1e-5 for error in found.values())


def test_distributed_notices_gradients_that_differ(tmp_path):
    """With a gate of nothing the exit status is 1. One process shows it: two differ by more than nothing."""
    text = (FOLDER / "distributed.py").read_text()
    assert text.count("ROUNDING = 1e-5") == 1
    (tmp_path / "distributed.py").write_text(text.replace("ROUNDING = 1e-5", "ROUNDING = 0.0"))
    (tmp_path / "side_by_side.py").write_text((FOLDER / "side_by_side.py").read_text())
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = run(tmp_path / "distributed.py", "--tiny", **alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.count("1 processes") == 2, done.stdout + done.stderr


@needs_aeon
def test_the_sensor_recordings_are_whole():
    sys.path.insert(0, str(FOLDER))
    try:
        import sensors

        for part in ("TRAIN", "TEST"):
            recordings, labels = sensors.load(part)
            assert recordings.shape == (40, 6, 100) and labels.bincount().tolist() == [10] * 4
            assert recordings.isfinite().all()
    finally:
        sys.path.remove(str(FOLDER))


def test_strips_hold_what_their_labels_say():
    """Every pixel of a strip comes from the digits that it is labelled with."""
    sys.path.insert(0, str(FOLDER))
    try:
        import ocr
        import torch

        scans = torch.rand(10, ocr.SIDE, ocr.SIDE) + torch.arange(10)[:, None, None] + 1
        images, targets, lengths = ocr.strips(scans, torch.arange(10), 20, torch.Generator())
        for image, target, length in zip(images[:, 0], targets, lengths.tolist(), strict=True):
            columns = image.amax(0)
            seen = torch.unique_consecutive(columns[columns > 0].floor().long())
            told = torch.unique_consecutive(target[:length])
            assert seen.tolist() == told.tolist() and not target[length:].any()
        read = ocr.read(torch.eye(11)[torch.tensor([[1, 0], [1, 3], [0, 3], [1, 0]])])
        assert read == [[0, 0], [2]]
    finally:
        sys.path.remove(str(FOLDER))
