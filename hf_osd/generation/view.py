"""`AssistantView` stands for an assistant in the calls of one tenant, or in calls of which nothing is kept. It shares everything else with it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hf_osd.generation.candidates import OnlineCandidateGenerator
    from hf_osd.generation.request import GenerateRequest


class OpensCalls(Protocol):
    """Types an assistant by the method that the seam calls on it."""

    def open_call(
        self, request: GenerateRequest, *, tenant: Hashable = None, private: bool = False
    ) -> OnlineCandidateGenerator: ...


class AssistantView:
    """Opens an assistant's calls for a tenant, or as private. Made by [`OnlineAssistant.tenant`] and [`OnlineAssistant.private`]; pass it as
    `assistant_model`. All other attributes are the assistant's.

    Args:
        assistant (`OnlineAssistant`): the assistant, which serves and learns.
        tenant (`Hashable`): the tenant whose text in the suffix cache these calls see; `None` for the text of calls without a tenant.
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
        if name == "_assistant" or name.startswith("__"):  # looked up on a half-made copy, which has no assistant yet
            raise AttributeError(name)
        return getattr(self._assistant, name)
