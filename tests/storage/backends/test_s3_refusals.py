"""What a store on S3 refuses, and says: one clear line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from specx.storage.backends.retry import Retry
from specx.storage.backends.s3 import S3Place
from specx.storage.errors import StoreError, StoreMismatchError
from specx.storage.schema import DatasetInfo
from specx.storage.store import FeatureStore

Fill = Callable[..., FeatureStore]
Start = Callable[..., subprocess.Popen[str]]

QUICK = Retry(pause_s=0.001)


def place(url: str, **settings: Any) -> S3Place:
    return S3Place(url, **({"retry": QUICK} | settings))


def test_denied_access_is_one_line(s3: str, s3_faults: Any, info: DatasetInfo) -> None:
    s3_faults.answer("dataset.json", "403 Forbidden")
    with pytest.raises(
        StoreError, match=rf"^{s3}/store/dataset\.json: writing: access denied: .*403 Forbidden.*rights"
    ):
        FeatureStore.create(f"{s3}/store", info)
    assert s3_faults.lost == 1


def test_an_unreachable_endpoint_is_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError) as caught:
        FeatureStore.open(place(f"{s3}/store"))
    message = str(caught.value)
    assert message.startswith(f"{s3}/store/dataset.json: reading failed 6 times: ")
    assert "check the network and AWS_ENDPOINT_URL" in message
    assert "\n" not in message


def test_a_store_that_is_not_there_is_one_line(s3: str) -> None:
    with pytest.raises(StoreError, match=rf"^{s3}/store: no feature store here.*specx extract --store"):
        FeatureStore.open(f"{s3}/store")


@pytest.mark.parametrize("url", ["s3://no-such-bucket", "s3://no-such-bucket/store"])
def test_a_bucket_that_is_not_there_is_one_line(s3: str, info: DatasetInfo, url: str) -> None:
    for call in (FeatureStore.open, lambda url: FeatureStore.create(url, info)):
        with pytest.raises(StoreError, match=r"^s3://no-such-bucket: no such bucket\. Create it"):
            call(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///store", "s3://a b/store", "s3://Bucket/store", "s3://bucket/a/../b"])
def test_what_is_no_url_of_a_bucket_is_one_line(url: str) -> None:
    with pytest.raises(StoreError, match=r"not the name of a bucket|expected one inside the store"):
        FeatureStore.open(url)


def test_missing_credentials_are_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # As on a machine that is none of Amazon's.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1/169.254.169.254")
    with pytest.raises(StoreError, match=rf"^{s3}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        FeatureStore.open(place(f"{s3}/store"))


def test_missing_obstore_is_one_line() -> None:
    program = """
import sys
sys.modules["obstore"] = None
from specx import SpecxError
from specx.storage.store import FeatureStore
try:
    FeatureStore.open("s3://bucket/store")
except SpecxError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout == ("s3://bucket/store: stores on S3 need obstore. Install it with `pip install specx[s3]`.\n")


def test_a_forked_process_is_told_and_does_not_wait_for_ever(s3: str, start: Start, fill: Fill) -> None:
    fill(f"{s3}/store", 1, tokens_per_part=50)
    program = """
import os
from specx.storage.errors import StoreError
made["FeatureStore"].open(sys.argv[1])
if os.fork() == 0:
    try:
        made["FeatureStore"].open(sys.argv[1])
    except StoreError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    out, errors = start(program, f"{s3}/store").communicate(timeout=300)
    assert "Start processes by spawn instead" in out, errors


def test_a_local_store_does_not_need_obstore(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path / "store", 1, tokens_per_part=50)
    program = f"""
import sys
sys.modules["obstore"] = None
from specx.storage.store import FeatureStore
from specx.storage.ops.verify import verify
print(verify(FeatureStore.open({str(tmp_path / "store")!r})).sequences)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout == "1\n"


def test_a_prefix_with_other_things_is_not_made_a_store(s3: str, info: DatasetInfo) -> None:
    bucket = S3Store(s3.removeprefix("s3://"), client_options={"allow_http": True})
    obstore.put(bucket, "papers/thesis.txt", b"text")
    with pytest.raises(StoreError, match=rf"^{s3}/papers: not empty and not a feature store"):
        FeatureStore.create(f"{s3}/papers", info)
    assert [each["path"] for each in obstore.list(bucket).collect()] == ["papers/thesis.txt"]


def test_a_store_of_another_target_is_refused(s3: str, info: DatasetInfo) -> None:
    FeatureStore.create(f"{s3}/store", info)
    with pytest.raises(StoreMismatchError, match=rf"^{s3}/store: .*codec is lossless in the store"):
        FeatureStore.create(f"{s3}/store", info.model_copy(update={"codec": "none"}))
