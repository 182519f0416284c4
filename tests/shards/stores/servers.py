"""Fixtures: an S3 server in this process, and a pretended hub."""

import os
import uuid
from collections.abc import Iterator

import pytest
from fake_hub import FakeHub

from deltatok.shards.stores import store as stores

CLOUD = "pip install 'deltatok[cloud]'"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with the bucket `bucket`: moto's, or the one that the variable
    DELTATOK_TEST_S3 names, whose key is "key" and secret "secret"."""
    pytest.importorskip("obstore", reason=CLOUD)
    if another := os.environ.get("DELTATOK_TEST_S3"):
        yield another
        return
    server_module = pytest.importorskip("moto.server", reason=f"{CLOUD} moto[server]")
    boto3 = pytest.importorskip("boto3", reason=f"{CLOUD} moto[server]")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    client.create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://bucket/<a prefix of its own>, with the environment to reach it."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": s3_server,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "RETRY_S", 1.0)
    stores.forget_stores()
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the data set u/c."""
    with FakeHub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        stores.forget_stores()
        yield served
