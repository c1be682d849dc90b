"""An S3 server past our own code, and a store on it whose retries do not wait."""

from typing import Any

import obstore
from obstore.store import S3Store

from specx.storage.backends.retry import Retry
from specx.storage.backends.s3 import S3Place

QUICK = Retry(pause_s=0.001)


def place(url: str, **settings: Any) -> S3Place:
    return S3Place(url, **({"retry": QUICK} | settings))


def bucket(s3: str) -> S3Store:
    """The whole bucket, past our own code."""
    return S3Store(s3.removeprefix("s3://"), client_options={"allow_http": True})


def keys(s3: str) -> list[str]:
    return sorted(each["path"] for each in obstore.list(bucket(s3)).collect())
