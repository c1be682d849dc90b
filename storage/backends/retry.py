"""Asking an object store again when it does not answer, and saying so when it never does."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from ..errors import StoreError

_log = logging.getLogger(__name__)

AnswerT = TypeVar("AnswerT")

_HOPELESS = {
    "NoSuchBucket": "no such bucket. Create it, or correct the URL.",
    "PermanentRedirect": "the bucket is in another region. Set AWS_REGION to the bucket's.",
    "AuthorizationHeaderMalformed": "the bucket is in another region. Set AWS_REGION to the bucket's.",
}
"""What an error says -> what the user is told at once, of the bucket."""

_EXPLAINED = {
    # Where an EC2 instance asks for credentials, once there are none in the environment.
    "169.254.169.254": "no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
}
"""The same, but after the last try."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often a request is repeated, and how long it is waited between."""

    tries: int = 6
    pause_s: float = 0.5
    """Before the second try; doubled before each further one."""
    longest_pause_s: float = 8.0

    def ask(self, what: str, bucket: str, request: Callable[[], AnswerT]) -> AnswerT:
        """Return what ``request`` gives; raise StoreError, one line, or FileNotFoundError for a missing object.

        ``what`` is the object's URL and what is done with it. A request that is repeated may have
        been carried out before.
        """
        pause = self.pause_s
        for number in range(1, self.tries + 1):
            try:
                return request()
            except (PermissionDeniedError, UnauthenticatedError) as error:
                raise StoreError(
                    f"{what}: access denied: {_reason(error)}. Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                    "and the rights they give."
                ) from error
            except (BaseError, FileNotFoundError) as error:
                known = _HOPELESS if number < self.tries else _HOPELESS | _EXPLAINED
                if told := next((told for sign, told in known.items() if sign in str(error)), None):
                    raise StoreError(f"{bucket}: {told}") from error
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{what}: no such object") from error
                if number == self.tries:
                    raise StoreError(
                        f"{what} failed {number} times: {_reason(error)}. What was finished before is kept: check "
                        "the network and AWS_ENDPOINT_URL, and rerun the same command."
                    ) from error
                _log.info("%s failed, trying again: %s", what, _reason(error))
            # Spread out, as others may have been refused at the same moment.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self.longest_pause_s)
        raise AssertionError("tries is at least 1")


def _reason(error: Exception) -> str:
    """Return an error's first line without the XML behind it."""
    return " ".join(str(error).partition("\n\n")[0].partition("<?xml")[0].split()).rstrip(": ")[:300]
