"""A request is repeated while that may help, and then told in one line."""

from collections.abc import Callable

import pytest
from obstore.exceptions import BaseError, GenericError, PermissionDeniedError

from specx.storage.backends.retry import Retry
from specx.storage.errors import StoreError

WHAT = "s3://bucket/store/lse: reading"
QUICK = Retry(tries=4, pause_s=0.0)


def failing(times: int, error: Exception) -> tuple[Callable[[], str], list[int]]:
    """A request that fails some times before it answers, and the number of times it was made."""
    made: list[int] = []

    def request() -> str:
        made.append(1)
        if len(made) <= times:
            raise error
        return "answer"

    return request, made


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_request_that_fails_fewer_times_than_it_is_tried_is_answered(times: int) -> None:
    request, made = failing(times, GenericError("connection reset"))
    assert QUICK.ask(WHAT, "s3://bucket", request) == "answer"
    assert len(made) == times + 1


def test_a_request_that_always_fails_is_one_line_with_what_to_do() -> None:
    request, made = failing(99, GenericError("Generic S3 error: Error performing GET: reset\n\nDebug source:\nmore"))
    with pytest.raises(StoreError) as caught:
        QUICK.ask(WHAT, "s3://bucket", request)
    assert len(made) == 4
    assert str(caught.value) == (
        f"{WHAT} failed 4 times: Generic S3 error: Error performing GET: reset. What was finished before is kept: "
        "check the network and AWS_ENDPOINT_URL, and rerun the same command."
    )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionDeniedError("403 Forbidden"), StoreError, "lse: reading: access denied: 403.*AWS_SECRET_ACCESS_KEY"),
        (FileNotFoundError("<Code>NoSuchKey</Code>"), FileNotFoundError, "lse: reading: no such object"),
        (FileNotFoundError("<Code>NoSuchBucket</Code>"), StoreError, "^s3://bucket: no such bucket"),
        (GenericError("<Code>NoSuchBucket</Code>"), StoreError, "^s3://bucket: no such bucket"),
        (GenericError("<Code>PermanentRedirect</Code>"), StoreError, "another region. Set AWS_REGION"),
    ],
)
def test_what_will_not_get_better_is_told_at_once(error: Exception, kind: type[Exception], message: str) -> None:
    request, made = failing(99, error)
    with pytest.raises(kind, match=message):
        QUICK.ask(WHAT, "s3://bucket", request)
    assert len(made) == 1


def test_missing_credentials_are_told_only_after_the_last_try() -> None:
    error = GenericError("Error performing PUT http://169.254.169.254/latest/api/token")
    request, made = failing(99, error)
    with pytest.raises(StoreError, match=r"^s3://bucket: no credentials. Set AWS_ACCESS_KEY_ID"):
        QUICK.ask(WHAT, "s3://bucket", request)
    assert len(made) == 4
    request, _ = failing(3, error)
    assert QUICK.ask(WHAT, "s3://bucket", request) == "answer"


def test_our_own_errors_are_not_taken_for_the_network() -> None:
    request, made = failing(99, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        QUICK.ask(WHAT, "s3://bucket", request)
    assert len(made) == 1


def test_pauses_grow_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    request, _ = failing(5, BaseError("busy"))
    Retry().ask(WHAT, "s3://bucket", request)
    assert len(pauses) == 5
    for pause, longest in zip(pauses, [0.5, 1.0, 2.0, 4.0, 8.0], strict=True):
        assert longest / 2 <= pause <= longest
    assert Retry().tries == 6
