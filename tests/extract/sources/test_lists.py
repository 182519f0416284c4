"""Lists name clips of their root, with class and split, and reach nothing outside of it."""

import logging
import tarfile
from pathlib import Path

import pytest

from deltatok.extract.sources.clip import FrameFolder, TarVideo
from deltatok.extract.sources.find import find_clips
from deltatok.shards.errors import UsageError

HEADER = "label,youtube_id,time_start,time_end,split\n"
ROWS = (
    "arm wrestling,aaaaaaaaaaa,1,11,train\nzumba,bbbbbbbbbbb,100,110,train\n"
    '"zumba",-c_ccccccccc,7,17,val\n'
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/one.mp4", "two.mp4", "list/here.mp4"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"123")
    (tmp_path / "outside.mp4").write_bytes(b"secret")
    return tmp_path / "root"


def test_csv_gives_paths_with_class_and_split(root: Path) -> None:
    (root / "list.csv").write_text("split,path,label\ntrain,a/one.mp4,run\n,two.mp4,\n")
    clips = find_clips([root / "list.csv"])
    assert [(c.key, c.label, c.split, c.size_bytes) for c in clips] == [
        ("a/one.mp4", "run", "train", 3),
        ("two.mp4", None, None, 3),
    ]


def test_jsonl_gives_paths_with_class_and_split(root: Path) -> None:
    lines = ['{"path": "two.mp4", "label": 7}', "", '{"path": "a/one.mp4", "split": "val"}']
    (root / "list.jsonl").write_text("\n".join(lines))
    clips = find_clips([root / "list.jsonl"])
    assert [(c.key, c.label, c.split) for c in clips] == [
        ("a/one.mp4", None, "val"),
        ("two.mp4", "7", None),
    ]


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.jsonl"])
@pytest.mark.parametrize("line", ["../outside.mp4", "a/../../outside.mp4", "/etc/hostname", "link"])
def test_no_list_leaves_its_root(root: Path, name: str, line: str) -> None:
    (root / "link").symlink_to(root.parent / "outside.mp4")
    text = {"txt": line, "csv": f"path\n{line}", "jsonl": f'{{"path": "{line}"}}'}
    (root / name).write_text(text[name.partition(".")[2]])
    with pytest.raises(UsageError, match=r"line \d: .* leaves .*root, .* pass --root"):
        find_clips([root / name])


@pytest.mark.parametrize("path", ["x" * 5000, "loop/x.mp4", "gone/x.mp4"])
def test_path_that_no_file_can_have_is_a_missing_video(root: Path, path: str) -> None:
    (root / "loop").symlink_to(root / "loop")
    (root / "list.txt").write_text(f"two.mp4\n{path}\n")
    assert [c.size_bytes for c in find_clips([root / "list.txt"]) if c.key != "two.mp4"] == [0]


def test_root_is_where_the_paths_of_a_list_start(root: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.txt").write_text(f"a/one.mp4\n{root}/two.mp4\n")
    clips = find_clips([tmp_path / "lists" / "all.txt"], root=root)
    assert [clip.key for clip in clips] == ["a/one.mp4", "two.mp4"]


def test_root_may_be_an_archive(tmp_path: Path, kinetics: Path) -> None:
    with tarfile.open(tmp_path / "k.tar", "w") as tar:
        tar.add(kinetics, arcname=".")
    (tmp_path / "k.csv").write_text(HEADER + ROWS)
    (tmp_path / "p.txt").write_text("val/zumba/-c_ccccccccc_000007_000017.mp4\n")
    rows = find_clips([tmp_path / "k.csv"], root=tmp_path / "k.tar")
    (line,) = find_clips([tmp_path / "p.txt"], root=tmp_path / "k.tar")
    assert [clip.key for clip in rows] == [clip.key for clip in find_clips([kinetics])]
    assert all(isinstance(clip.source, TarVideo) for clip in (*rows, line))
    assert line.key == rows[-1].key


def test_line_that_is_the_root_gives_all_of_it(root: Path) -> None:
    (root / "list.txt").write_text(".\n")
    assert [c.key for c in find_clips([root / "list.txt"])] == [c.key for c in find_clips([root])]


def test_list_names_a_frame_folder(root: Path) -> None:
    for name in ("f_0.0.jpg", "f_0.04.jpg"):
        (root / "clip").mkdir(exist_ok=True)
        (root / "clip" / name).write_bytes(b"12")
    (root / "list.txt").write_text("clip\n")
    (clip,) = find_clips([root / "list.txt"])
    assert (clip.key, clip.source, clip.size_bytes) == ("clip", FrameFolder(), 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("youtube_id,label,split\n", "lacks time_start, time_end: got the columns youtube_id, lab"),
        ("file,label\nx.mp4,y\n", r"lacks path: got the columns file, label; wanted path, or Kin"),
        ("", r"lacks path: got the columns \(none\)"),
        ("path\n\x00\n", "NUL|got the path|leaves"),
        ("path,label\n,run\n", "line 2: got the path '', wanted that of a video"),
        (HEADER + "run,../../x,1,2,train\n", "line 2: youtube_id is '../../x', wanted letters"),
        (HEADER + "run,xyz,1,later,train\n", "line 2: time_end is 'later', wanted whole seconds"),
        (HEADER + "run,xyz,,2,train\n", "line 2: time_start is '', wanted whole seconds"),
    ],
)
def test_bad_csv_is_refused_by_line(root: Path, text: str, words: str) -> None:
    (root / "bad.csv").write_text(text)
    with pytest.raises(UsageError, match=words):
        find_clips([root / "bad.csv"])


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"file": "x.mp4"}', '{"path": {"a": 1}}', r'{"path": "\ud800"}']
)
def test_bad_jsonl_is_refused_by_line(root: Path, line: str) -> None:
    (root / "bad.jsonl").write_text(f'{{"path": "two.mp4"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"bad\.jsonl: line 2: "):
        find_clips([root / "bad.jsonl"])


def test_kinetics_annotations_find_trimmed_names(kinetics: Path, tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text(HEADER + ROWS)
    clips = find_clips([tmp_path / "k.csv"], root=kinetics)
    assert [(clip.key, clip.label, clip.split) for clip in clips] == [
        ("train/arm wrestling/aaaaaaaaaaa_000001_000011.mp4", "arm wrestling", "train"),
        ("train/zumba/bbbbbbbbbbb_000100_000110.mp4", "zumba", "train"),
        ("val/zumba/-c_ccccccccc_000007_000017.mp4", "zumba", "val"),
    ]
    assert [c.key for c in find_clips([kinetics])] == [c.key for c in clips]


def test_kinetics_without_class_is_the_test_split(kinetics: Path) -> None:
    (kinetics / "test.csv").write_text("youtube_id,time_start,time_end\nbbbbbbbbbbb,100.0,110\n")
    (clip,) = find_clips([kinetics / "test.csv"])
    assert (clip.path.name, clip.label) == ("bbbbbbbbbbb_000100_000110.mp4", None)


def test_kinetics_video_that_is_gone_is_kept_for_the_quarantine(
    kinetics: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (kinetics / "k.csv").write_text(HEADER + ROWS + "run,gone,3,13,train\n")
    with caplog.at_level(logging.WARNING):
        clips = find_clips([kinetics / "k.csv"])
    (gone,) = (clip for clip in clips if clip.size_bytes == 0)
    assert (gone.key, gone.label) == ("gone_000003_000013.mp4", "run")
    assert "1 of 4 clips are not there" in caplog.text


def test_kinetics_name_in_two_folders_is_taken_by_class_and_split(kinetics: Path) -> None:
    other = kinetics / "replacement" / "bbbbbbbbbbb_000100_000110.mp4"
    other.parent.mkdir()
    other.write_bytes(b"")
    (kinetics / "k.csv").write_text(HEADER + "zumba,bbbbbbbbbbb,100,110,train\n")
    (clip,) = find_clips([kinetics / "k.csv"])
    assert clip.key == "train/zumba/bbbbbbbbbbb_000100_000110.mp4"
    (kinetics / "k.csv").write_text(HEADER + "surfing,bbbbbbbbbbb,100,110,test\n")
    with pytest.raises(UsageError, match="both have its name"):
        find_clips([kinetics / "k.csv"])


def test_kinetics_row_twice_is_one_clip_and_said(
    kinetics: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (kinetics / "k.csv").write_text(HEADER + ROWS + "surfing,aaaaaaaaaaa,1,11,train\n")
    with caplog.at_level(logging.WARNING):
        clips = find_clips([kinetics / "k.csv"])
    assert [clip.label for clip in clips] == ["arm wrestling", "zumba", "zumba"]
    assert "is arm wrestling and surfing: kept as the first" in caplog.text
    assert "1 of 4 rows name a clip again" in caplog.text


def test_root_that_is_not_there_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="check --root"):
        find_clips([root], root=root / "nowhere")
