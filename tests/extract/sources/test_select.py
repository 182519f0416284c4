"""--exclude, --split, --limit and --shard-of take what they say, or say why not."""

from pathlib import Path

import pytest

from deltatok.extract.config import ExtractConfig
from deltatok.extract.sources.clip import Clip
from deltatok.extract.sources.select import clips_of, first_clips, of_split, without_excluded
from deltatok.shards.errors import UsageError
from deltatok.shards.running.parts import parse_shard_of

CLIPS = [
    Clip("train/arm wrestling/a_000001_000011.mp4", Path("a"), 1, label="arm wrestling"),
    Clip("train/zumba/b_000001_000011.mp4", Path("b"), 1, split="train"),
    Clip("train/zumba/c.webm", Path("c"), 1, split="val"),
    Clip("d_000001_000011.mp4", Path("d"), 1, label="zumba", split="val"),
]


def _excluded(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "exclude.txt").write_text(text)
    kept = without_excluded(CLIPS, tmp_path / "exclude.txt")
    return [str(clip.path) for clip in CLIPS if clip not in kept]


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("train/zumba/b_000001_000011.mp4", "b"),
        ("zumba/b_000001_000011.mp4", "b"),
        ("zumba/b_000001_000011", "b"),
        ("b_000001_000011", "b"),
        ("c", "c"),
        ("zumba/d_000001_000011.mp4", "d"),
        ("arm wrestling/a_000001_000011", "a"),
        ("arm_wrestling/a_000001_000011", "a"),
    ],
)
def test_excluded_clip_is_named_by_key_class_and_name_or_name(
    tmp_path: Path, line: str, path: str
) -> None:
    assert _excluded(tmp_path, f"# bad\n\n{line}\n") == [path]


@pytest.mark.parametrize("line", ["zumba", "umba/c", "x/c", "c.mp4.mp4"])
def test_excluded_name_that_is_no_clip_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UsageError, match=r"is no clip here \(1 of 2 lines name none\)"):
        _excluded(tmp_path, f"c\n{line}\n")


def test_excluding_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names all 4 clips"):
        _excluded(tmp_path, "\n".join(clip.key for clip in CLIPS))


def test_exclude_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--exclude .*gone.txt: cannot be read"):
        without_excluded(CLIPS, tmp_path / "gone.txt")


def test_split_is_taken_from_metadata_then_from_the_folder() -> None:
    assert [str(clip.path) for clip in of_split(CLIPS, "train")] == ["a", "b"]
    assert [str(clip.path) for clip in of_split(CLIPS, "val")] == ["c", "d"]


def test_split_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"--split test: .* train \(1 clips\), val \(2 clips\)"):
        of_split(CLIPS, "test")


def test_higher_limit_keeps_the_clips_of_a_lower_one() -> None:
    clips = [Clip(f"{i:02d}", Path("x"), 1) for i in range(20)]
    few, more = first_clips(clips, 5, seed=3), first_clips(clips, 9, seed=3)
    assert len(few) == 5
    assert set(few) < set(more)
    assert more == sorted(more, key=lambda clip: clip.key)
    assert first_clips(clips, 5, seed=4) != few
    assert first_clips(clips, 50, seed=3) == clips


def test_clips_are_excluded_before_they_are_counted(kinetics: Path, tmp_path: Path) -> None:
    (tmp_path / "exclude.txt").write_text("zumba/bbbbbbbbbbb_000100_000110\n")
    config = ExtractConfig(
        videos=(str(kinetics),),
        out="out",
        exclude=str(tmp_path / "exclude.txt"),
        split="train",
        limit=2,
    )
    assert [clip.path.stem for clip in clips_of(config)] == ["aaaaaaaaaaa_000001_000011"]


def test_shard_of_reads_i_of_n() -> None:
    assert parse_shard_of("2/4") == (2, 4)
    assert parse_shard_of(None) == (0, 1)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "0/0", ""])
def test_bad_shard_of_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"shard_of: got .*, wanted i/n with i from 0 to n - 1"):
        ExtractConfig(videos=("x",), out="out", shard_of=text)
