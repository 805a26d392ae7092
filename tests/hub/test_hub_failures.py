"""The Hub refuses, is busy, breaks down or hangs up, at each step: what is tried again, what is said, and that nothing is done twice."""

import logging

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from hf_osd import OnlineAssistant, grow_draft

# Of a push: what is asked of the Hub, in this order.
STEPS = {
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", r"/api/models/me/draft$"),
    "files": ("GET", "/tree/"),
    "card": ("POST", "validate-yaml"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/info/lfs/"),
    "blob": ("PUT", "/storage/"),
    "commit": ("POST", "/commit/"),
}
FOR_EVER = 100


@pytest.fixture(scope="module")
def assistant(tiny_llama):
    return OnlineAssistant(grow_draft(tiny_llama(layers=3)), learn=False)


@pytest.fixture(params=STEPS)
def step(request):
    return STEPS[request.param]


@pytest.fixture(autouse=True)
def _no_token_is_ever_logged(hub, caplog):
    caplog.set_level(logging.DEBUG)
    yield
    for record in caplog.records:
        assert "hf_only" not in record.getMessage()


def weights(assistant):
    return dict(assistant.serving.active.named_parameters())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pushed_once(hub):
    return len(hub.commits["me/draft"]) == 2 and hub.count("PUT", "/storage/") >= 1 and len(hub.blobs) == 1


@pytest.mark.parametrize("outcome", [429, 500, "page", "cut"])
def test_what_passes_is_waited_for(hub, assistant, step, outcome, waits):
    hub.fail(*step, outcome, outcome)
    assistant.push_to_hub("me/draft")
    assert pushed_once(hub)
    assert len(waits) == 2
    # The wait that was asked for; huggingface_hub adds a second to it where it is the one that waits.
    assert set(waits) <= {7, 8} if outcome == 429 else sorted(waits) == [1, 2]


def test_a_page_in_place_of_an_answer_is_an_oserror_in_the_end(hub, assistant, waits):
    hub.fail(*STEPS["card"], *["page"] * FOR_EVER)
    with pytest.raises(ConnectionError, match=r"me/draft.*something else than JSON.*Push again later"):
        assistant.push_to_hub("me/draft")


@pytest.mark.parametrize("outcome", [500, "cut"])
def test_what_does_not_pass_ends_in_an_error_that_says_what_to_do(hub, assistant, step, outcome, waits):
    hub.fail(*step, *[outcome] * FOR_EVER)
    kind = HfHubHTTPError if outcome == 500 else ConnectionError
    with pytest.raises(kind, match=r"(?s)me/draft.*Push again later") as error:
        assistant.push_to_hub("me/draft")
    assert isinstance(error.value, OSError)
    assert "hf_only" not in str(error.value)
    assert waits == [1, 2, 4, 8, 8]
    hub.failures.clear()
    assistant.push_to_hub("me/draft")
    assert pushed_once(hub)


@pytest.mark.parametrize(("status", "mend"), [(401, "hf auth login"), (403, "write permission")])
def test_what_is_refused_is_not_tried_again(hub, assistant, step, status, mend, waits):
    hub.fail(*step, *[status] * FOR_EVER)
    if step == STEPS["create"]:  # where the client looks whether the repository is there
        hub.fail(*STEPS["info"], status)
    with pytest.raises(HfHubHTTPError, match=rf"(?s)me/draft.*{mend}") as error:
        assistant.push_to_hub("me/draft")
    assert "hf_only" not in str(error.value)
    assert waits == []


def test_a_token_that_the_hub_does_not_know_is_not_repeated_in_the_error(hub, assistant):
    with pytest.raises(HfHubHTTPError, match="hf auth login") as error:
        assistant.push_to_hub("me/draft", token="hf_onlyWrong")
    assert "hf_onlyWrong" not in str(error.value)
    assert hub.commits == {}


def test_a_repository_that_is_there_is_pushed_to(hub, assistant):
    """The Hub answers 409 to its creation."""
    hub.make("me/draft")
    assistant.push_to_hub("me/draft")
    assert len(hub.commits["me/draft"]) == 2


@pytest.mark.parametrize("status", [409, 412])
def test_while_somebody_else_commits_ours_waits(hub, assistant, status, waits):
    hub.fail(*STEPS["commit"], status, status)
    assistant.push_to_hub("me/draft")
    assert pushed_once(hub)
    assert waits == [1, 2]


def test_somebody_who_commits_for_ever_is_told_of(hub, assistant, waits):
    hub.fail(*STEPS["commit"], *[409] * FOR_EVER)
    with pytest.raises(HfHubHTTPError, match="Somebody else is changing it"):
        assistant.push_to_hub("me/draft")
    assert waits == [1, 2, 4, 8, 8]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, assistant, waits):
    hub.fail(*STEPS["commit"], "lost")
    address = assistant.push_to_hub("me/draft")
    assert pushed_once(hub)
    assert address.endswith(hub.commits["me/draft"][-1]["sha"])


def test_a_repeated_push_uploads_no_weights_again(hub, assistant, waits):
    hub.fail(*STEPS["commit"], *[500] * 6)
    with pytest.raises(HfHubHTTPError):
        assistant.push_to_hub("me/draft")
    assert hub.count("PUT", "/storage/") == 1
    assistant.push_to_hub("me/draft")
    assert hub.count("PUT", "/storage/") == 1
    assert pushed_once(hub)


def test_an_upload_that_was_cut_is_sent_whole(hub, assistant, waits):
    hub.fail(*STEPS["blob"], "cut", "lost")
    assistant.push_to_hub("me/draft")
    assert hub.count("PUT", "/storage/") == 3
    assert same(weights(OnlineAssistant.from_pretrained("me/draft", assistant.osd_config)), weights(assistant))


def test_a_wait_that_the_hub_asks_for_has_an_end(hub, assistant, waits, monkeypatch):
    from hf_osd.saving import hub as room

    monkeypatch.setattr(room, "_seconds_asked_for", lambda headers: 10**6)
    hub.fail(*STEPS["commit"], 429)
    assistant.push_to_hub("me/draft")
    assert waits == [300]


# Downloads.


@pytest.fixture
def pushed(hub, assistant):
    assistant.push_to_hub("me/draft")
    return hub


def test_a_download_that_was_cut_goes_on_where_it_was(pushed, assistant, waits, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what it holds of a cut answer
    pushed.fail("GET", "model.safetensors$", {"body": 1000}, {"body": 500})
    again = OnlineAssistant.from_pretrained("me/draft", assistant.osd_config)
    assert same(weights(again), weights(assistant))
    ranges = [headers.get("range") for headers in pushed.headers_of("GET", "model.safetensors$")]
    assert ranges == [None, "bytes=1000-", "bytes=1500-"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "osd_config.json"])
def test_a_download_that_failed_is_an_error_and_then_goes_on(pushed, assistant, name, waits):
    pushed.fail("GET", rf"/{name}$", *[500] * FOR_EVER)
    with pytest.raises(OSError, match="me/draft"):
        OnlineAssistant.from_pretrained("me/draft")
    pushed.failures.clear()
    before = pushed.count("GET", r"main/config.json$|/config.json$")
    again = OnlineAssistant.from_pretrained("me/draft")
    assert same(weights(again), weights(assistant))
    assert again.osd_config == assistant.osd_config
    if name != "config.json":
        assert pushed.count("GET", r"main/config.json$|/config.json$") == before, "what was there is not fetched again"


@pytest.mark.parametrize("outcome", [429, 500, "cut"])
def test_what_passes_is_waited_for_when_files_are_looked_up(pushed, assistant, outcome, waits):
    pushed.fail("HEAD", "/osd_config.json$", outcome, outcome)
    assert OnlineAssistant.from_pretrained("me/draft").osd_config == assistant.osd_config


@pytest.mark.parametrize(("token", "status"), [("hf_onlyWrong", 401), (None, 403)])
def test_a_draft_that_one_may_not_see_is_said_to_be_so(pushed, token, status):
    if status == 403:
        for method in ("GET", "HEAD"):
            pushed.fail(method, "me/draft", *[403] * FOR_EVER)
    with pytest.raises(OSError, match="me/draft") as error:
        OnlineAssistant.from_pretrained("me/draft", token=token)
    assert "hf_only" not in str(error.value)


def test_a_revision_that_is_not_there_is_said_to_be_so(pushed):
    with pytest.raises(OSError, match="abcdef0"):
        OnlineAssistant.from_pretrained("me/draft", revision="abcdef0")
