"""Whether the hub of models and data sets can be reached."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

_REACH_SECONDS = 5.0


def hub_problem() -> str:
    """Return why the hub cannot be asked, "" if it can: the libraries themselves try for half a
    minute, for each file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps from asking the hub"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:  # it answers
        return ""
    except OSError as error:
        return f"the hub cannot be reached ({getattr(error, 'reason', error)})"
    return ""


@contextmanager
def without_hub() -> Iterator[None]:
    """What HF_HUB_OFFLINE does for data sets: those in the cache are used, others fail at once."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
