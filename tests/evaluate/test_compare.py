"""deltatok-evaluate compare: pairing, differences and their intervals, refusals, the page."""

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.evaluate.compare import (
    CompareConfig,
    Comparison,
    result_lines,
    run_compare,
    tables,
)
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.evaluate.forecast.sequences import (
    Score,
    SequenceScores,
    read_sequences,
    sequences_jsonl,
)
from deltatok.pipeline.commands.evaluate import main
from deltatok.shards.errors import CacheMismatch, UsageError

ROW = Score("mid", "best", "feature_loss")
MakeReport = Callable[..., str]


@pytest.fixture
def made(tmp_path: Path) -> MakeReport:
    """Writes a report folder with one score, losses by seed (or of one) and sequence."""

    def make(
        name: str, *seeds: dict[str, float], score: Score = ROW, config: Any = None, **parts: Any
    ) -> str:
        scores = SequenceScores()
        for seed, losses in enumerate(seeds):
            for sequence, loss in losses.items():
                scores.windows[sequence] = 1
                scores.add(score, seed, sequence, loss, 1)
        settings = {"dataset": "d", "num_context": 4, "short_steps": 1, "mid_steps": 3}
        report = {
            "rows": [],
            "config": settings | {"num_samples": 20, "out": name} | (config or {}),
            "provenance": {"cache": {"fingerprint": "sha256:aa"}, "head": {"num_classes": 4}},
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(report | parts))
        (folder / "sequences.jsonl").write_bytes(sequences_jsonl(scores))
        return str(folder)

    return make


def compare(tmp_path: Path, *reports: str, **settings: Any) -> Comparison:
    return run_compare(CompareConfig(reports=reports, out=str(tmp_path / "out"), **settings))


def losses(seed: int, *, shift: float = 0.0, count: int = 40) -> dict[str, float]:
    """Sequences that differ much from one another; two seeds share what makes them differ."""
    hard = np.random.default_rng(7).uniform(0, 10, size=count)
    noise = np.random.default_rng(seed).normal(0, 0.1, size=count)
    return {f"clip {i}": float(hard[i] + noise[i] + shift) for i in range(count)}


def test_pairing_finds_a_difference_far_smaller_than_the_intervals(
    made: MakeReport, tmp_path: Path
) -> None:
    found = compare(tmp_path, made("a", losses(1)), made("b", losses(2, shift=-0.3)))
    (row,) = found.rows
    one, other, difference = row.values[0], row.values[1], row.differences[1]
    assert one is not None and other is not None and difference is not None
    assert one.low is not None and other.high is not None and one.low < other.high  # they overlap
    assert difference.verdict == "better"
    assert difference.low is not None and difference.high is not None
    assert -0.4 < difference.low < difference.value < difference.high < -0.2
    assert row.differences[0] is None


def test_the_interval_of_a_difference_is_that_of_the_paired_differences(
    made: MakeReport, tmp_path: Path
) -> None:
    one, other = losses(1, count=300), losses(2, count=300)
    found = compare(tmp_path, made("a", one), made("b", other))
    gaps = np.array([other[key] - one[key] for key in one])
    error = 1.96 * gaps.std() / 300**0.5
    difference = found.rows[0].differences[1]
    assert difference is not None
    assert difference.value == pytest.approx(gaps.mean())
    assert difference.low == pytest.approx(gaps.mean() - error, abs=error / 8)
    assert difference.high == pytest.approx(gaps.mean() + error, abs=error / 8)


def test_noise_alone_is_neither_better_nor_worse(made: MakeReport, tmp_path: Path) -> None:
    found = compare(tmp_path, made("a", losses(1)), made("b", losses(2)), made("c", losses(3)))
    verdicts = [d.verdict for d in found.rows[0].differences if d is not None]
    assert verdicts == ["unclear", "unclear"]


def test_more_is_better_where_a_metric_says_so(made: MakeReport, tmp_path: Path) -> None:
    score = Score("mid", "samples", "mode_recall")
    one = made("a", losses(1), score=score)
    found = compare(tmp_path, one, made("b", losses(2, shift=0.3), score=score))
    difference = found.rows[0].differences[1]
    assert difference is not None and difference.verdict == "better"


def test_values_are_means_over_seeds(made: MakeReport, tmp_path: Path) -> None:
    one = made("a", {"x": 1.0, "y": 3.0}, {"x": 2.0, "y": 4.0})
    found = compare(tmp_path, one, made("b", {"x": 1.0, "y": 1.0}))
    assert [value.value for value in found.rows[0].values if value] == [2.5, 1.0]


def test_sequences_that_one_report_lacks_are_left_out_and_named(
    made: MakeReport, tmp_path: Path
) -> None:
    one, other = {"x": 1.0, "y": 2.0, "z": 30.0}, {"x": 1.0, "y": 4.0, "only < b": 50.0}
    found = compare(tmp_path, made("a", one), made("b", other))
    assert found.num_paired == 2
    assert [run["missing"] for run in found.runs] == [["only < b"], ["z"]]
    assert [value.value for value in found.rows[0].values if value] == [1.5, 2.5]
    assert "only &lt; b" in (tmp_path / "out" / "compare.html").read_text()
    assert "Missing in b: z" in (tmp_path / "out" / "compare.md").read_text()


def test_a_row_that_one_report_lacks_has_no_difference(made: MakeReport, tmp_path: Path) -> None:
    other = made("b", losses(1), score=Score("mid", "discriminative", "feature_loss"))
    found = compare(tmp_path, made("a", losses(1)), other)
    assert [row.row for row in found.rows] == ["discriminative", "best"]
    for row in found.rows:
        assert row.differences == [None, None]


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ({"config": {"mid_steps": 4}}, "mid_steps is 4, but 3"),
        ({"config": {"num_samples": 5}}, "num_samples is 5, but 20"),
        ({"config": {"dataset": "e"}}, "dataset is 'e', but 'd'"),
        ({"config": {"num_context": 3}}, "num_context is 3, but 4"),
        ({"config": {"short_steps": 2}}, "short_steps is 2, but 1"),
        ({"config": {"mode_overlap": 0.7}}, r"mode_overlap is 0\.7, but None"),
        (
            {"provenance": {"cache": {"fingerprint": "sha256:bb"}, "head": {"num_classes": 4}}},
            "cache.fingerprint is 'sha256:bb'",
        ),
        (
            {"provenance": {"cache": {"fingerprint": "sha256:aa"}, "head": {"num_classes": 9}}},
            "num_classes is 9, but 4",
        ),
    ],
)
def test_reports_of_something_else_are_refused(
    made: MakeReport, tmp_path: Path, parts: dict[str, Any], field: str
) -> None:
    one, other = made("a", losses(1)), made("b", losses(2), **parts)
    with pytest.raises(CacheMismatch, match=field):
        compare(tmp_path, one, other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["windows", "labels"])
def test_reports_of_other_windows_or_labels_are_refused(
    made: MakeReport, tmp_path: Path, what: str
) -> None:
    one, other = made("a", losses(1)), made("b", losses(2))
    for folder, number in ((one, 1), (other, 2)):
        path = Path(folder) / "sequences.jsonl"
        lines = [json.loads(line) | {what: number} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CacheMismatch, match=rf"{what} of sequence 'clip \d+' differ"):
        compare(tmp_path, one, other)


def test_reports_without_a_common_sequence_are_refused(made: MakeReport, tmp_path: Path) -> None:
    with pytest.raises(CacheMismatch, match="no sequence is in all reports"):
        compare(tmp_path, made("a", {"x": 1.0}), made("b", {"y": 1.0}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reports": ("a",)}, "got 1 reports"),
        ({"reports": ("a", "b"), "names": ("one",)}, "wanted one for each of 2"),
        ({"reports": ("a", "b"), "names": ("one", "one")}, "the same name"),
        ({"reports": ("nowhere", "b")}, "cannot be read"),
    ],
)
def test_settings_of_no_use_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run_compare(CompareConfig(out="x", **settings))


def test_scores_cut_off_after_a_line_are_refused(made: MakeReport, tmp_path: Path) -> None:
    one, other = (made(name, losses(1), num_windows=40) for name in ("a", "b"))
    path = Path(other) / "sequences.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-3]))
    with pytest.raises(UsageError, match=r"has 37 windows, report\.json says 40"):
        compare(tmp_path, one, other)


def _twice(lines: list[dict[str, Any]]) -> None:
    lines.append(lines[0])


def _no_windows(lines: list[dict[str, Any]]) -> None:
    lines[0]["windows"] = 0


def _huge(lines: list[dict[str, Any]]) -> None:
    lines[0]["scores"]["mid"]["best"]["feature_loss"]["0"] = [[0, 1e200, 1]]


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_twice, "a second time"), (_no_windows, "0 windows"), (_huge, "sums or counts of best")],
)
def test_damaged_scores_are_refused_by_line(
    made: MakeReport, tmp_path: Path, damage: Callable[[list[Any]], None], words: str
) -> None:
    one, other = made("a", losses(1)), made("b", losses(1))
    path = Path(other) / "sequences.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    damage(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UsageError, match=rf"line \d+ is no sequence's scores.*{words}"):
        compare(tmp_path, one, other)


def test_the_result_is_said_first_in_words(made: MakeReport, tmp_path: Path) -> None:
    one, worse, same = made("a", losses(1)), made("b", losses(2, shift=0.3)), made("c", losses(3))
    compare(tmp_path, one, worse, same)
    text = (tmp_path / "out" / "compare.md").read_text()
    first = text.index("b worse than a")
    assert first < text.index("c not clearly other than a") < text.index("| row |")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.index("b worse than a") < page.index("<table")


def test_reports_that_are_alike_are_said_to_be(made: MakeReport, tmp_path: Path) -> None:
    compare(tmp_path, made("a", losses(1)), made("b", losses(1)))
    assert "No row differs" in (tmp_path / "out" / "compare.md").read_text()


def test_the_same_report_twice_is_refused(made: MakeReport, tmp_path: Path) -> None:
    one = made("a", losses(1))
    with pytest.raises(UsageError, match="twice"):
        compare(tmp_path, one, one)


def test_names_are_the_folders_as_far_as_they_differ(tmp_path: Path, made: MakeReport) -> None:
    for run in ("one", "two"):
        shutil.copytree(made(f"report-{run}", losses(1)), tmp_path / run / "report")
    folders = [str(tmp_path / run / "report") for run in ("one", "two")]
    found = compare(tmp_path, *folders)
    assert [run["name"] for run in found.runs] == ["one/report", "two/report"]


@pytest.fixture(scope="module")
def compared(shared_evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real reports, one with twice the noise, compared by the command."""
    root = tmp_path_factory.mktemp("compared")
    for name, scale in (("a", 1.0), ("b<i>", 2.0)):
        run_forecast(shared_evaluation.config(out=str(root / name), noise_scale=scale))
    words = ["compare", str(root / "a"), str(root / "b<i>"), "--out", str(root / "out")]
    assert main(words) == 0
    return root / "out"


def test_two_reports_of_one_tokenizer_differ_in_the_samples_only(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())
    assert found["num_paired"] == 3
    assert found["differing"]["config.noise_scale"] == [1.0, 2.0]
    assert "config.out" not in found["differing"]
    for row in found["rows"]:
        assert row["differences"][0] is None
        changed = row["differences"][1]["value"] != 0
        assert changed <= (row["row"] in ("best", "mean", "regressor_null", "samples"))


def test_values_are_those_of_the_reports(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())
    report = json.loads((compared.parent / "a" / "report.json").read_text())
    wanted = {
        (row["horizon"], row["row"], row["metric"]): row
        for row in report["rows"]
        if row["metric"] not in ("spread_skill", "outside_share")
    }
    assert len(found["rows"]) == len(wanted)
    for row in found["rows"]:
        expected = wanted[row["horizon"], row["row"], row["metric"]]
        assert row["values"][0]["value"] == pytest.approx(expected["value"], rel=1e-6)


def test_the_page_is_whole_and_fetches_nothing(compared: Path) -> None:
    text = (compared / "compare.html").read_text()
    opened: list[str] = []
    sources: list[str] = []

    class Page(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img", "source"):
                opened.append(tag)
            sources.extend(v or "" for k, v in attrs if k in ("src", "srcset", "href"))
            assert tag != "img" or dict(attrs)["alt"]

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    page = Page()
    page.feed(text)
    page.close()
    assert opened == []
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "b&lt;i&gt;" in text and "b<i>" not in text
    markdown = (compared / "compare.md").read_text()
    assert "| Best sample |" in markdown and "equal" in markdown


def test_mode_recall_and_precision_are_compared_as_a_pair(made: MakeReport, tmp_path: Path) -> None:
    folders = []
    for name, recall, precision in (("a", 0.25, 0.75), ("b", 0.5, 0.5)):
        folder = made(name, losses(1))
        scores = read_sequences(Path(folder))
        for sequence in scores.windows:
            for metric, number in (("mode_recall", recall), ("mode_precision", precision)):
                scores.add(Score("mid", "samples", metric), 0, sequence, number, 1)
        (Path(folder) / "sequences.jsonl").write_bytes(sequences_jsonl(scores))
        folders.append(folder)
    found = compare(tmp_path, *folders)
    assert result_lines(found)[1:] == [
        "All samples, mode recall | mode precision %, mid: b 50.0 | 50.0 against 25.0 | 75.0 of a: "
        "+25.0 better [25.0,\u00a025.0] | -25.0 worse [-25.0,\u00a0-25.0]"
    ]
    assert [title for title in tables(found) if title.startswith("mode")] == [
        "mode recall % ↑, mid",
        "mode precision % ↑, mid",
    ]


def test_the_command_ends_with_4_on_other_protocols(
    made: MakeReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = made("a", losses(1)), made("b", losses(2), config={"num_context": 2})
    assert main(["compare", one, other, "--out", str(tmp_path / "out")]) == 4
    assert "num_context is 2, but 4" in capsys.readouterr().err
