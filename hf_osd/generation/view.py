"""`AssistantView`: an assistant as some calls see it: those of one tenant, or those of which nothing is to be kept. It shares everything else."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hf_osd.generation.candidates import OnlineCandidateGenerator
    from hf_osd.generation.request import GenerateRequest


class OpensCalls(Protocol):
    """What the seam asks of an assistant, and a view of its own."""

    def open_call(
        self, request: GenerateRequest, *, tenant: Hashable = None, private: bool = False
    ) -> OnlineCandidateGenerator: ...


class AssistantView:
    """Made by [`OnlineAssistant.tenant`] and [`OnlineAssistant.private`], and passed as `assistant_model` in its place. Whatever else is asked of it, the
    assistant answers.

    Args:
        assistant (`OnlineAssistant`): whose draft, learner and statistics these are.
        tenant (`Hashable`): whose text in the suffix cache these calls see; `None` for that of calls without a tenant.
        private (`bool`): keep nothing of these calls.
    """

    def __init__(self, assistant: OpensCalls, tenant: Hashable = None, private: bool = False):
        self._assistant, self._tenant, self._private = assistant, tenant, private

    def open_call(self, request: GenerateRequest) -> OnlineCandidateGenerator:
        return self._assistant.open_call(request, tenant=self._tenant, private=self._private)

    def tenant(self, name: Hashable) -> AssistantView:
        return AssistantView(self._assistant, name, self._private)

    def private(self) -> AssistantView:
        return AssistantView(self._assistant, self._tenant, private=True)

    def __getattr__(self, name: str):
        if name == "_assistant" or name.startswith("__"):  # of a half-made copy, which has no assistant to ask
            raise AttributeError(name)
        return getattr(self._assistant, name)
