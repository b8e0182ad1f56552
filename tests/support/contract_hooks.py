"""For schemathesis: an idempotency key names one request, so each that may be one is replaced by one of its own."""

from __future__ import annotations

import re
import uuid
from typing import Any

import requests
import schemathesis

_NAME = "Idempotency-Key"
_KEY = re.compile(r'[\x21\x23-\x5b\x5d-\x7e]{1,255}|"[\x21\x23-\x5b\x5d-\x7e]{1,255}"')


def _of_its_own(request: requests.PreparedRequest) -> requests.PreparedRequest:
    key = request.headers.get(_NAME)
    if key is not None and _KEY.fullmatch(key):
        request.headers[_NAME] = str(uuid.uuid4())
    return request


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    # Not in the case itself: schemathesis takes one that was changed for another than it had made.
    kwargs["auth"] = _of_its_own
