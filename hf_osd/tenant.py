"""`Tenant`: an assistant as one tenant sees it. It shares everything but the text in the suffix cache."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_osd.assistant import OnlineAssistant
    from hf_osd.candidates import OnlineCandidateGenerator


class Tenant:
    """Made by [`OnlineAssistant.tenant`], and passed as `assistant_model` in its place. Whatever else is asked of it, the assistant answers.

    Args:
        assistant (`OnlineAssistant`): whose draft, learner and statistics these are.
        name (`Hashable`): of the tenant.
    """

    def __init__(self, assistant: OnlineAssistant, name: Hashable):
        self._assistant, self._name = assistant, name

    def open_call(self, *args, **kwargs) -> OnlineCandidateGenerator:
        return self._assistant.open_call(*args, **kwargs, tenant=self._name)

    def __getattr__(self, name: str):
        if name == "_assistant" or name.startswith("__"):  # of a half-made copy, which has no assistant to ask
            raise AttributeError(name)
        return getattr(self._assistant, name)
