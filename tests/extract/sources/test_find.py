"""Paths become clips under keys that do not depend on where the videos lie."""

import logging
from pathlib import Path

import pytest

from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "train"
    for name in ("b/two.MP4", "a/one.mp4", "three.webm", "notes.md", ".hidden.mp4", ".git/x.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1234")
    return root


def _keys(*paths: Path) -> list[str]:
    return [clip.key for clip in find_clips(paths)]


def test_folder_gives_its_videos_by_path_inside_it(folder: Path) -> None:
    clips = find_clips([str(folder)])
    assert [clip.key for clip in clips] == ["a/one.mp4", "b/two.MP4", "three.webm"]
    assert clips[0].path == folder / "a" / "one.mp4"
    assert clips[0].size_bytes == 4


def test_keys_stay_when_the_folder_moves(folder: Path, tmp_path: Path) -> None:
    before = _keys(folder)
    assert _keys(folder.rename(tmp_path / "elsewhere")) == before


def test_file_is_known_by_its_name_whatever_it_ends_in(folder: Path) -> None:
    assert _keys(folder / "notes.md") == ["notes.md"]


def test_list_gives_its_lines(folder: Path) -> None:
    lines = ["# train", "", "a/one.mp4", f"{folder}/three.webm", "../train/b/two.MP4"]
    (folder / "list.txt").write_text("\n".join(lines))
    assert _keys(folder / "list.txt") == ["a/one.mp4", "b/two.MP4", "three.webm"]


def test_several_roots_prefix_the_keys(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "three.webm").write_bytes(b"")
    (tmp_path / "extra.txt").write_text("val/three.webm\n")
    keys = _keys(folder, tmp_path / "val", tmp_path / "extra.txt", folder / "notes.md")
    assert keys == [
        "extra/val/three.webm",
        "notes.md",
        "train/a/one.mp4",
        "train/b/two.MP4",
        "train/three.webm",
        "val/three.webm",
    ]


def test_two_files_with_one_key_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match=r"both would be clip 'one\.mp4'"):
        find_clips([tmp_path / "one.mp4", folder / "a" / "one.mp4"])


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no video found, wanted files that end in \.3gp \.avi"):
        find_clips([tmp_path])


def test_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        find_clips([tmp_path / "nowhere"])


def test_list_with_a_missing_file_keeps_it_for_the_quarantine(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "list.txt").write_text("a/one.mp4\na/gone.mp4\n")
    with caplog.at_level(logging.WARNING):
        clips = find_clips([folder / "list.txt"])
    assert [(clip.key, clip.size_bytes) for clip in clips] == [("a/gone.mp4", 0), ("a/one.mp4", 4)]
    assert "1 of 2 clips are not there" in caplog.text


def test_list_of_nothing_but_missing_files_is_refused(folder: Path) -> None:
    (folder / "list.txt").write_text("x.mp4\ny.mp4\n")
    with pytest.raises(UsageError, match=r"no such file, nor any other of the 2 listed"):
        find_clips([folder / "list.txt"])


def test_linked_folder_is_searched_and_a_loop_ends(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(folder)
    (folder / "b" / "loop").symlink_to(folder)
    assert _keys(tmp_path / "linked") == ["data/a/one.mp4", "data/b/two.MP4", "data/three.webm"]


@pytest.mark.parametrize("line", ["more.txt", "list.txt", "MORE.CSV", "more.jsonl"])
def test_list_in_a_list_is_refused(folder: Path, line: str) -> None:
    (folder / line).write_text("a/one.mp4\n")
    (folder / "list.txt").write_text(f"a/one.mp4\n{line}\n")
    with pytest.raises(UsageError, match=rf"line 2: {line} is a list itself.*cannot be nested"):
        find_clips([folder / "list.txt"])
