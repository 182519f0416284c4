"""Videos in stores: found with size and stamp, decoded from a copy of which nothing is left."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "shards" / "stores"))
from servers import hub, s3, s3_server

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.decoding import pool as pool_module
from deltatok.extract.decoding.clip import DecodedClip, decode_clip
from deltatok.extract.decoding.pool import DecodePool
from deltatok.extract.run import run_extraction
from deltatok.extract.sources.clip import Clip, StoredVideo
from deltatok.extract.sources.find import find_clips
from deltatok.pipeline.commands.extract import main as extract
from deltatok.shards import PatchShards
from deltatok.shards.errors import DeltatokError, UsageError
from deltatok.shards.plan import Plan
from deltatok.shards.records import Quarantined, read_done
from deltatok.shards.stores.store import new_file, open_store

__all__ = ["hub", "s3", "s3_server"]

REAL = Path(__file__).resolve().parents[4] / "shared" / "videos"
INTERRUPTED = Path(__file__).parents[1] / "interrupted_run.py"
STORES = pytest.mark.parametrize("address", ["s3", "hf"], indirect=True)
POLICY = ExtractConfig(videos=("videos",), out="out", num_frames=4).sampling_policy()

KILLED_ONCE = """
import os, signal, sys
from deltatok.extract.decoding import worker

def decode(request, starting):
    def step(name):
        starting(name)
        if name != "download" and request.decoder != "pyav":
            os.kill(os.getpid(), signal.SIGKILL)
    return worker.decode_request(request, step)

worker.main(sys.argv[1:], decode=decode)
"""
SLOW = """
import signal, sys
from deltatok.extract.decoding import worker

def decode(request, starting):
    starting("download")
    signal.sigtimedwait([], 1.5)
    return worker.decode_request(request, starting)

worker.main(sys.argv[1:], decode=decode)
"""

MakeConfig = Callable[..., ExtractConfig]


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """An empty place in a store of the kind `request.param`."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    request.getfixturevalue("hub")
    return "hf://datasets/u/c/videos"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def _put(folder: Path, address: str) -> None:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    open_store(address).create([new_file(folder, name) for name in sorted(names)])


def _pool(**changes: Any) -> DecodePool:
    return DecodePool(POLICY, num_workers=1, **({"timeout_s": 60.0} | changes))


def _assert_same_cache(ours: Path, theirs: Path) -> None:
    one, other = PatchShards(ours), PatchShards(theirs)
    assert one.keys == other.keys
    assert np.array_equal(one.load(), other.load())
    assert np.array_equal(one.table().crop, other.table().crop)
    plans = [[(e.key, e.size_bytes, e.shard) for e in Plan.open(out)] for out in (ours, theirs)]
    assert plans[0] == plans[1]
    bad = [[q.clip for q in read_done(out, 0).quarantined] for out in (ours, theirs)]
    assert bad[0] == bad[1]


@STORES
def test_store_gives_the_cache_that_the_folder_gives(
    finished: Path,
    clips: Path,
    make_config: MakeConfig,
    backbone: Backbone,
    temporary: Path,
    address: str,
) -> None:
    _put(clips, address)
    config = make_config(videos=(address,))
    run_extraction(config, backbone=backbone)
    _assert_same_cache(Path(config.out), finished)
    assert {e.source for e in Plan.open(config.out)} == {
        f"{address}/{path.name}" for path in clips.iterdir()
    }
    assert not list(temporary.iterdir())


def test_file_address_is_the_folder(
    finished: Path, clips: Path, make_config: MakeConfig, backbone: Backbone
) -> None:
    config = make_config(videos=(f"file://{clips}",))
    run_extraction(config, backbone=backbone)
    _assert_same_cache(Path(config.out), finished)
    with pytest.raises(UsageError, match="three slashes"):
        find_clips(["file://videos"])


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/videos is not there")
@STORES
@pytest.mark.filterwarnings("ignore:Use .content")  # of the hub's client, for large files
def test_real_videos_decode_as_from_the_disk(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("cot_cat.mp4", "decord_flipping_a_pancake.mkv", "decord_corrupted.mp4"):
        shutil.copy(REAL / name, folder / name)
    _put(folder, address)
    stored, local = find_clips([address]), find_clips([folder])
    assert [(c.key, c.size_bytes) for c in stored] == [(c.key, c.size_bytes) for c in local]
    with _pool() as pool:
        for ours, theirs in zip(pool.decode(stored), list(pool.decode(local)), strict=True):
            if isinstance(theirs, Quarantined):
                assert ours == theirs
                continue
            assert isinstance(ours, DecodedClip)
            assert (ours.key, ours.decoder, ours.windows) == (
                theirs.key,
                theirs.decoder,
                theirs.windows,
            )
            assert all(np.array_equal(ours.frames[n], f) for n, f in theirs.frames.items())


def test_killed_decoder_leaves_nothing_and_its_clip_is_tried_again(
    s3: str, clips: Path, temporary: Path
) -> None:
    _put(clips, s3)
    with _pool(worker_command=(sys.executable, "-P", "-c", KILLED_ONCE)) as pool:
        (result,) = pool.decode(find_clips([f"{s3}/c0.mp4"]))
    assert isinstance(result, DecodedClip)
    assert (result.key, result.decoder) == ("c0.mp4", "pyav")
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_run_that_is_terminated_leaves_nothing_and_goes_on(
    s3: str,
    clips: Path,
    finished: Path,
    make_config: MakeConfig,
    backbone: Backbone,
    temporary: Path,
    tmp_path: Path,
) -> None:
    _put(clips, s3)
    config = make_config(videos=(s3,))
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, str(INTERRUPTED), str(tmp_path / "config.json"), "terminate"]
    assert subprocess.run(command, check=False).returncode == 75
    assert not list(temporary.iterdir())
    run_extraction(config, backbone=backbone)
    _assert_same_cache(Path(config.out), finished)


@STORES
@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_video_that_is_not_there_any_more_is_quarantined(
    address: str, clips: Path, what: str
) -> None:
    _put(clips, address)
    found = find_clips([f"{address}/c0.mp4", f"{address}/c1.mp4"])
    if what == "replaced":
        other = bytearray((clips / "c0.mp4").read_bytes())
        other[-1] ^= 1
        open_store(address).replace("c0.mp4", bytes(other))
    elif address.startswith("s3"):
        open_store(address).delete("c0.mp4")
    else:
        found = [_renamed(clip) if clip.key == "c0.mp4" else clip for clip in found]
    with _pool() as pool:
        gone, there = pool.decode(found)
    assert isinstance(gone, Quarantined)
    assert gone.stage == "open"
    assert "is not there, or was replaced since it was found" in gone.reason
    assert isinstance(there, DecodedClip)


def _renamed(clip: Clip) -> Clip:
    assert isinstance(clip.source, StoredVideo)
    source = StoredVideo(clip.source.store, "videos/none.mp4", clip.source.stamp)
    return Clip(clip.key, clip.path, clip.size_bytes, source)


def test_store_that_fails_ends_the_run_and_quarantines_nothing(
    hub: Any, clips: Path, make_config: MakeConfig, backbone: Backbone
) -> None:
    address = "hf://datasets/u/c/videos"
    _put(clips, address)
    hub.is_down = True
    config = make_config(videos=(address,))
    with pytest.raises(DeltatokError, match="cannot be reached") as caught:
        run_extraction(config, backbone=backbone)
    assert caught.value.exit_code == 1
    hub.is_down = False
    assert run_extraction(config, backbone=backbone).quarantined == 1  # broken.mp4


def test_download_that_stalls_ends_the_run(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "DOWNLOAD_TIMEOUT_S", 0.5)
    with (
        _pool(worker_command=(sys.executable, "-P", "-c", SLOW)) as pool,
        pytest.raises(DeltatokError, match=r"download gave nothing for 0\.5 s"),
    ):
        list(pool.decode(find_clips([clips / "c0.mp4"])))


def test_download_does_not_count_as_decoding(clips: Path) -> None:
    with _pool(worker_command=(sys.executable, "-P", "-c", SLOW), timeout_s=1.0) as pool:
        (result,) = pool.decode(find_clips([clips / "c0.mp4"]))
    assert isinstance(result, DecodedClip)


def test_full_disk_for_temporary_files_is_no_fault_of_the_clip(
    s3: str, clips: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(clips, s3)
    (clip,) = find_clips([f"{s3}/c0.mp4"])
    usage = shutil.disk_usage(temporary)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DeltatokError, match=r"copy of s3:.*c0.mp4 \(TMPDIR\) takes"):
        decode_clip(clip, policy=POLICY)


def test_what_is_no_video_is_left_out(
    s3: str, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "videos"
    for name in ("a/c0.mp4", "a/B.MKV", ".hidden/c0.mp4", "a/.c1.mp4", "w.tar", "f/1_0.04.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips / "c0.mp4", folder / name)
    (folder / "read me.txt").write_text("c0.mp4")
    _put(folder, s3)
    with caplog.at_level(logging.WARNING):
        assert [clip.key for clip in find_clips([s3])] == ["a/B.MKV", "a/c0.mp4"]
    assert "2 archives or frames left out, first f/1_0.04.jpg" in caplog.text
    keys = [clip.key for clip in find_clips([f"{s3}/a/", clips / "c1.mp4"])]
    assert keys == ["a/B.MKV", "a/c0.mp4", "c1.mp4"]


LISTS: dict[str, Callable[[str], str]] = {
    "l.txt": lambda a: f"{a}/c1.mp4\n# none\n{a}/c0.mp4\n",
    "l.csv": lambda a: f"path,label\n{a}/c1.mp4,run\n{a}/c0.mp4,sit\n",
    "l.jsonl": lambda a: "".join(
        json.dumps({"path": f"{a}/{name}", "label": label}) + "\n"
        for name, label in (("c1.mp4", "run"), ("c0.mp4", "sit"))
    ),
}


@STORES
@pytest.mark.parametrize("kind", LISTS)
def test_list_of_addresses(address: str, clips: Path, tmp_path: Path, kind: str) -> None:
    _put(clips, address)
    (tmp_path / kind).write_text(LISTS[kind](address))
    below = find_clips([tmp_path / kind], root=address)
    assert [clip.key for clip in below] == ["c0.mp4", "c1.mp4"]
    assert [clip.size_bytes for clip in below] == [
        (clips / name).stat().st_size for name in ("c0.mp4", "c1.mp4")
    ]
    if kind != "l.txt":
        assert [clip.label for clip in below] == ["sit", "run"]
    stamps = {clip.origin: clip.source.stamp for clip in find_clips([address])}  # type: ignore[union-attr]
    assert all(clip.source.stamp == stamps[clip.origin] for clip in below)  # type: ignore[union-attr]
    scheme = address.partition("://")[2]
    keys = [clip.key for clip in find_clips([tmp_path / kind])]
    assert keys == [f"{scheme}/c0.mp4", f"{scheme}/c1.mp4"]


def test_list_of_names_below_an_address(s3: str, clips: Path, tmp_path: Path) -> None:
    _put(clips, s3)
    listed = tmp_path / "l.txt"
    listed.write_text("c0.mp4\nnone.mp4\n")
    there, missing = find_clips([listed], root=s3)
    assert (there.key, there.origin) == ("c0.mp4", f"{s3}/c0.mp4")
    assert (missing.key, missing.size_bytes) == ("none.mp4", 0)
    with _pool() as pool:
        (gone,) = pool.decode([missing])
    assert isinstance(gone, Quarantined)


def test_annotations_of_kinetics_below_an_address(s3: str, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "k/run").mkdir(parents=True)
    shutil.copy(clips / "c0.mp4", tmp_path / "k/run/abc_000001_000011.mp4")
    _put(tmp_path / "k", s3)
    rows = "label,youtube_id,time_start,time_end,split\nrun,abc,1,11,train\nsit,def,2,12,train\n"
    (tmp_path / "train.csv").write_text(rows)
    missing, there = find_clips([tmp_path / "train.csv"], root=s3)
    assert (there.key, there.label) == ("run/abc_000001_000011.mp4", "run")
    assert (missing.key, missing.size_bytes) == ("def_000002_000012.mp4", 0)


BAD_LINES = {
    "ftp://host/a.mp4": "l.txt: line 2: .*an address of ftp, wanted",
    "s3://bucket": "l.txt: line 2: got the address",
    "s3://bucket/a/../b.mp4": "l.txt: line 2: got the address",
    "s3://bucket/w.tar": "l.txt: line 2: .*only videos are taken",
    "s3://bucket/other.csv": "l.txt: line 2: .*only videos are taken",
    "file:///etc/a.mp4": "l.txt: line 2: .*leaves",
    "s3://bucket/none.mp4": "no such file, nor any other of the 1 listed",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_line_is_named(s3: str, tmp_path: Path, line: str) -> None:
    (tmp_path / "l.txt").write_text(f"\n{line}\n")
    with pytest.raises(UsageError, match=BAD_LINES[line]):
        find_clips([tmp_path / "l.txt"])


def test_line_that_leaves_its_address_is_named(s3: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(f"{s3}-other/c0.mp4\n")
    with pytest.raises(UsageError, match=r"line 1: .* leaves s3://.*--root"):
        find_clips([tmp_path / "l.txt"], root=s3)


BAD_PLACES = {
    "ftp://host/videos": "an address of ftp, wanted",
    "s3://nobucket/videos": "no such bucket",
    "s3://bucket/none": "no video found",
    "s3://bucket/none.mp4": "no such video",
    "s3://bucket/w.zip": "only videos are taken",
    "s3://bucket/l.txt": "only videos are taken",
}


@pytest.mark.parametrize("place", BAD_PLACES)
def test_bad_address_is_refused_with_exit_code_2(
    s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    arguments = ["--videos", place, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert extract(arguments) == 2
    assert BAD_PLACES[place] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
