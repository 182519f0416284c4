"""Kill extractions into an object store with SIGKILL, over and over, and compare what lies there
with an undisturbed local cache:

    python tests/faults/kill_upload.py --kills 20 --folder F [--endpoint URL] [--json FILE]

The store is an S3 server of moto's in a process of its own (pip install 'deltatok[cloud]'
'moto[server]'), or the one at --endpoint, whose key is "key" and secret "secret". A run is killed
at a random moment and started again, every other time without its --cache-dir, as on another
machine, until the cache is finished; then the next address. At the end two runs, of different
--cache-dir, extract into one address at once.

Every cache in the store must hold the bytes of the local one. Prints figures as JSON; exits with 1
if one does not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import torch
from kill_extraction import LIMIT_S, little_clips, start

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone

BUCKET = "kill-upload"
SERVER = """\
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
time.sleep(1e6)
"""


class Store:
    """The S3 server, and what lies in it."""

    def __init__(self, endpoint: str | None) -> None:
        self._process = None
        if endpoint is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert self._process.stdout is not None
            endpoint = self._process.stdout.readline().decode().strip()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ENDPOINT_URL": endpoint,
        }
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._client.create_bucket(Bucket=BUCKET)

    def files(self, prefix: str) -> dict[str, bytes]:
        """Name -> bytes below the prefix."""
        found = {}
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
            for item in page.get("Contents", []):
                body = self._client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
                found[item["Key"].removeprefix(f"{prefix}/")] = body
        return found

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()


def extract(config: ExtractConfig, backbone: Backbone, cache_dir: Path) -> int:
    """The number of a new process that extracts."""
    environment = {"DELTATOK_CACHE_DIR": str(cache_dir)}
    return start(config, backbone, log=cache_dir.with_suffix(".log"), environment=environment)


def ended(child: int) -> int | None:
    """Its exit code, once it has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def local_files(folder: Path) -> dict[str, bytes]:
    """All that belongs to a cache."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "timings.jsonl"
    }


def disturbed(
    config: ExtractConfig, backbone: Backbone, cache_dir: Path, rng: random.Random, **about: Any
) -> tuple[int, int]:
    """Kills runs until one comes to its end; gives the kills, and the last exit code."""
    kills, end_s = 0, time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        child = extract(config, backbone, cache_dir)
        kill_s = time.monotonic() + rng.uniform(0.0, 0.6 * about["whole_s"])
        while (code := ended(child)) is None:
            if kills < about["most"] and time.monotonic() >= kill_s:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                if kills % 2:
                    shutil.rmtree(cache_dir, ignore_errors=True)
                break
            time.sleep(0.001)
        if code is not None:
            return kills, code
    return kills, -1


def main() -> int:
    """Runs the comparison; 0 if all caches are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most", type=int, default=5, help="kills of one cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="new or empty")
    parser.add_argument("--endpoint", help="of another S3 server, with no bucket of this name")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    store, rng = Store(arguments.endpoint), random.Random(arguments.seed)
    backbone_folder = make_tiny_backbone(TinyBackboneConfig(out=str(folder / "backbone")))
    config = ExtractConfig(
        videos=(little_clips(folder),),
        out=str(folder / "local"),
        backbone=str(backbone_folder),
        frame_size=64,
        frames_per_shard=32,
        batch_frames=16,
        num_windows=2,
        workers=1,
        max_quarantined=1.0,
    )
    backbone = Backbone.load(config.backbone)
    problems: list[str] = []
    begun_s = time.monotonic()
    if os.waitpid(extract(config, backbone, folder / "local-dir"), 0)[1]:
        sys.exit(f"the undisturbed run failed: see {folder / 'local-dir.log'}")
    wanted = local_files(folder / "local")
    begun_s = time.monotonic()
    first = replace(config, out=f"s3://{BUCKET}/first")
    if os.waitpid(extract(first, backbone, folder / "first-dir"), 0)[1]:
        sys.exit(f"the first run into the store failed: see {folder / 'first-dir.log'}")
    whole_s = time.monotonic() - begun_s
    if store.files("first") != wanted:
        problems.append("first: differs from the local cache")
    kills = caches = 0
    while kills < arguments.kills and not problems:
        name = f"killed-{caches}"
        done, code = disturbed(
            replace(config, out=f"s3://{BUCKET}/{name}"),
            backbone,
            folder / f"{name}-dir",
            rng,
            whole_s=whole_s,
            most=min(arguments.most, arguments.kills - kills),
        )
        kills, caches = kills + done, caches + 1
        if code != 0 or store.files(name) != wanted:
            problems.append(f"{name}: ended with {code}, or differs from the local cache")
    both = replace(config, out=f"s3://{BUCKET}/both")
    children = [extract(both, backbone, folder / f"both-{who}-dir") for who in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if store.files("both") != wanted or 0 not in codes:
        problems.append(f"both: ended with {codes}, or differs from the local cache")
    store.close()
    shown = {
        "kills": kills,
        "caches": caches,
        "shards": sum(name.endswith(".zarr.zip") for name in wanted),
        "two_at_once_ended_with": codes,
        "undisturbed_s": round(whole_s, 2),
        "problems": problems,
        "equal": not problems,
    }
    text = json.dumps(shown, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n")
    return 0 if not problems else 1


if __name__ == "__main__":
    sys.exit(main())
