"""README's and docs' tables and pictures are those of the committed result files."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

from benchmarks import growth, publish, results
from benchmarks.publish import PAGES, ROOT, Committed, render
from benchmarks.race import Spread

COMMITTED = Committed.here()
MARK = "<!-- measured: {} -->\n"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_was_measured(name):
    page = ROOT / name
    assert page.read_text() == render(page, COMMITTED), "run: python -m benchmarks publish"


def test_every_block_is_shown_once():
    shown = re.findall(r"<!-- measured: (\w+) -->", "".join((ROOT / name).read_text() for name in PAGES))
    assert sorted(shown) == sorted(publish._BLOCKS)


@pytest.mark.parametrize("name", publish.pictures(COMMITTED))
def test_a_picture_is_of_the_run_that_is_quoted(name):
    date, _ = publish.pictures(COMMITTED)[name]
    assert f"Source\0{date}".encode() in (ROOT / "docs" / name).read_bytes(), (
        "run: python -m benchmarks publish"
    )


def test_pictures_are_drawn(tmp_path):
    for name, (date, draw) in publish.pictures(COMMITTED).items():
        draw(tmp_path / name)
        assert f"Source\0{date}".encode() in (tmp_path / name).read_bytes()


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "ROOT", tmp_path)

    def write(block: str):
        (tmp_path / "docs").mkdir(exist_ok=True)
        path = tmp_path / "docs" / "page.md"
        path.write_text(f"before\n{MARK.format(block)}old\n<!-- end -->\nafter\n")
        return path

    return write


def test_a_changed_figure_changes_the_page(page):
    path, report = COMMITTED.with_any("memory")
    changed = [dataclasses.replace(m, bytes=77 << 20) for m in report.memory]
    found = render(page("memory"), Committed({path: dataclasses.replace(report, memory=changed)}))
    assert found.startswith(f"before\n{MARK.format('memory')}|") and found.endswith("\n<!-- end -->\nafter\n")
    assert "| 77 | 77 |" in found and f"(../benchmarks/results/{path.name})" in found and "old" not in found


def test_what_is_not_measured_is_said(page):
    for block in publish._BLOCKS:
        assert "Not measured yet" in render(page(block), Committed({})), block


def test_growth_says_where_the_line_is_left(page):
    def point(n: int, ms: float) -> growth.Point:
        s = Spread(ms, ms, ms)
        data, ratio = 2**20 * n, Spread(3, 3, 3)
        return growth.Point("batch", n, 10**9 * n, data, 2**21, s, s, ratio, data, data // 10, 0.0)

    points = [point(2**i, 0.05 + 2.0**i * (10 if i < 5 else 20)) for i in range(9)]
    path, report = next(iter(COMMITTED.reports.items()))
    found = render(page("growth"), Committed({path: dataclasses.replace(report, growth=points)}))
    assert "| batch, 1 to 256 | 50 | 100 | at 32, to 50 GFLOP/s (weights 2.0, data 32.0 MiB) | 0.10" in found
    assert "(growth.png)" in found


def test_growth_is_explained_with_its_own_limit():
    assert f"within {growth.STRAIGHT_MS:.0%} of it" in (ROOT / "docs" / "performance.md").read_text()


def test_the_youngest_file_is_quoted(tmp_path):
    path, report = COMMITTED.with_any("races")
    older, younger = tmp_path / f"b-{publish.DEVICE}.json", tmp_path / f"a-{publish.DEVICE}.json"
    shutil.copy(path, older)
    dataclasses.replace(report, date="2999-01-01T00:00:00+00:00", races=report.races[:1]).write(younger)
    (tmp_path / "other-machine.json").write_text("not read")
    found = Committed.here(tmp_path)
    assert list(found.reports) == [younger, older]
    sources = {result.case: path for path, _, result in found.races(lambda case: True)}
    assert sources.pop(report.races[0].case) == younger and set(sources.values()) == {older}


def test_committed_files_are_named_by_kind_and_device():
    report = results.Report.begin("full")
    assert report.path == results.FOLDER / f"full-{report.device.slug}.json"
