"""Pushes and loads folders on the Hub: in private repositories, in one commit, with retries where huggingface_hub has none, and errors that name the remedy."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The arguments of `from_pretrained` that decide from where and how files are downloaded.
FROM_WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download")

# Requests that huggingface_hub 2.4 does not retry. It retries the others itself: those that plan uploads, upload blobs and list files.
_SENT_ONCE = re.compile(
    r"/api/(repos/create|validate-yaml|models/[^/]+(/[^/]+)?(/revision/[^/]+)?|models/.+/commit/[^/]+)$"
)
_TEMPORARY = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # 409 and 412: somebody else commits
_WAITS = (1, 2, 4, 8, 8)  # seconds, those of huggingface_hub's `http_backoff`
_LONGEST_WAIT = 300  # seconds; the Hub counts requests in windows of five minutes

_REMEDIES = {
    401: "You are not logged in to the Hub: log in with `hf auth login`, or pass token=.",
    403: "Your token may not do that: give it write permission for this repository (https://huggingface.co/settings/tokens), or push to another.",
    404: "It does not exist, or your token may not see it: check the name and the token.",
    409: "Somebody else is changing it: push again.",
    412: "Somebody else is changing it: push again.",
    429: "These were too many requests: wait some minutes, and push again.",
}
_PUSH_LATER = "Push again later; what has been uploaded is not uploaded a second time."
_LOAD_LATER = "Load it again later; files that were downloaded whole are not downloaded again."


def open_repository(api: HfApi, repo_id: str, private: bool) -> str:
    """Make a repository unless it exists, and return its full name. It is private if `private` is set.

    Raises:
        OSError: if the Hub refuses to make it; the message names the remedy.
        ValueError: if `private` is set, and the repository exists and is public.
    """
    with _pushing(repo_id):
        repo_id = _retrying(lambda: api.create_repo(repo_id, private=private, exist_ok=True), _pushed_once).repo_id
        # The Hub does not change an existing repository.
        if private and not _retrying(lambda: api.repo_info(repo_id), _pushed_once).private:
            raise ValueError(
                f"{repo_id} exists and is public, so everybody could read what is pushed to it. Pass private=False if you mean that, make it private in its "
                "settings, or push to another repository."
            )
    return repo_id


def warn_of_push(logger: logging.Logger, what: str, repo_id: str, private: bool):
    """Warn, in the log of whoever pushes `what`, that its weights may reveal the traffic that they have learnt from."""
    memorised = "weights that learnt from traffic can have memorised some of it, and reveal it to whoever reads them"
    if private:
        logger.warning(
            "Pushing %s to %s: %s. The repository is private; think of who has access.", what, repo_id, memorised
        )
    else:
        logger.warning(
            "Pushing %s to %s FOR ALL TO READ: %s. Once public, they cannot be taken back. Push only what learnt from traffic that may be public.",
            what,
            repo_id,
            memorised,
        )


def push_folder(api: HfApi, repo_id: str, folder: Path, message: str, replaces: Collection[str]) -> str:
    """Push a folder in one commit, and return the commit's address. Files of the repository stay, except those that match a pattern in `replaces` and
    are not in the folder. If nothing has changed there is no commit, and the address is the last commit's.

    Raises:
        OSError: if the Hub refuses the push, retries included; the message names the remedy.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit():
        # Each attempt asks the Hub again which files it has, so that a commit whose answer was lost is not repeated.
        there = set(api.list_repo_files(repo_id)) - set(files)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(n) for n in sorted(there) if any(fnmatch(n, p) for p in replaces)]
        return api.create_commit(repo_id, operations, commit_message=message)

    with _pushing(repo_id):
        # huggingface_hub validates the card by a request whose answer it parses before it checks the status.
        return str(_retrying(commit, _pushed_once, json.JSONDecodeError).commit_url)


def license_of(api: HfApi, target: str) -> dict:
    """Read `license`, and `license_name` and `license_link` if there are any, from the target's card on the Hub. Returns `{}` if the card cannot be read: a
    card without a licence is better than a failed push."""
    import httpx2

    if os.path.exists(target):  # a local folder of that name is another model
        return {}
    try:
        card = api.model_info(target).card_data
    except (OSError, ValueError, httpx2.TransportError) as error:
        logger.info(
            "The licence of %s could not be read (%s); pass it in card={'license': …}.", target, type(error).__name__
        )
        return {}
    names = ("license", "license_name", "license_link")
    return {name: card[name] for name in names if card is not None and card.get(name) is not None}


def find_file(name: str | os.PathLike, file: str, **where) -> str | None:
    """Return the path of a file of a folder or repository, downloading it if need be; `None` if there is no such file, or, offline, none in the cache.

    Args:
        name, file: the folder or repository, and the file in it.
        **where: passed to transformers' `cached_file`: `revision`, `token`, `subfolder`, …

    Raises:
        OSError: if there is no such repository, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import is_offline_mode
    from transformers.utils import cached_file

    offline = is_offline_mode() or where.get("local_files_only", False)
    return cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=not offline,
        **where,
    )


def from_hub(name: str | os.PathLike, load: Callable[[], T]) -> T:
    """Call `load`, which reads from the repository or folder `name`, and return its result; failed connections are retried.

    Raises:
        OSError: if the Hub or the connection fails; the message names the cause and the remedy.
    """
    import httpx2

    try:
        # huggingface_hub retries look-ups that time out or meet a busy Hub, but not those whose connection breaks.
        return _retrying(load, lambda request: request.method == "HEAD")
    except httpx2.TransportError as error:
        raise ConnectionError(f"Loading {name}: the Hub {_broke_off(error)}. {_LOAD_LATER}") from error
    except OSError as error:
        # transformers reports these statuses as a Hub that cannot be reached.
        status = _status_behind(error)
        if status == 403:
            remedy = "Your token may not read it: give it that permission (https://huggingface.co/settings/tokens)."
        elif status == 429 or (status or 0) >= 500:
            remedy = _LOAD_LATER
        else:
            raise
        raise OSError(f"Loading {name}: the Hub answered with status {status}. {remedy}") from error


def _status_behind(error: BaseException | None) -> int | None:
    """Return the HTTP status that led to an error; `None` if there was no answer."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__ or error.__context__
    return None


def _retrying(request: Callable[[], T], sent_once: Callable[[httpx2.Request], bool], *temporary: type[Exception]) -> T:
    """Call `request` and return its result. Retry temporary failures of requests that huggingface_hub sends once, and errors of the types in `temporary`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    for wait in _WAITS:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code not in _TEMPORARY or not sent_once(error.response.request):
                raise
            asked = _seconds_asked_for(error.response.headers)
            reason, wait = f"status {error.response.status_code}", min(asked or wait, _LONGEST_WAIT)
        except httpx2.TransportError as error:
            if not sent_once(error.request):
                raise
            reason = type(error).__name__
        except temporary as error:
            reason = type(error).__name__
        logger.warning("The Hub: %s. Trying again in %d s.", reason, wait)
        time.sleep(wait)
    return request()


def _pushed_once(request: httpx2.Request) -> bool:
    """Tell whether huggingface_hub sends this request of a push only once."""
    return _SENT_ONCE.search(request.url.path) is not None


def _seconds_asked_for(headers: Mapping[str, str]) -> int | None:
    """Return the seconds after which the Hub asks to retry, if it does."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1  # it counts whole seconds
    after = headers.get("retry-after", "")
    return int(after) if after.isdigit() else None


def _broke_off(error: Exception) -> str:
    """Describe a failed connection."""
    return f"cannot be reached, or broke off ({error or type(error).__name__})"


@contextlib.contextmanager
def _pushing(repo_id: str) -> Iterator[None]:
    """Add the repository and the remedy to errors of the Hub, and raise errors of the connection as `ConnectionError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, httpx2.TransportError, RuntimeError, json.JSONDecodeError) as error:
        # huggingface_hub wraps errors of blobs in a RuntimeError.
        found = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(found, HfHubHTTPError):
            found.append_to_message(f"\n{repo_id}: {_REMEDIES.get(found.response.status_code, _PUSH_LATER)}")
            raise found from None
        if isinstance(found, httpx2.TransportError):
            what = _broke_off(found)
        elif isinstance(found, json.JSONDecodeError):
            what = "answers with something else than JSON"
        else:
            raise
        raise ConnectionError(f"Pushing to {repo_id}: the Hub {what}. {_PUSH_LATER}") from error
