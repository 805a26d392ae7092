"""`Comparison`: decodes requests with an assistant and, to compare, plainly and by the suffix cache alone. It knows nothing of streams, learning or figures."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd import OnlineAssistant, OnlineConfig
from recipes.common.forwards import Forwards
from recipes.common.models import answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONLINE, PLAIN, CACHE = "online", "plain", "cache"
BESIDE = ("background", "process")  # values of `learn` with which learning runs while requests are decoded


class Comparison:
    """Decodes requests greedily with an assistant, and some in two ways more.

    The suffix cache alone is an assistant without a draft. It decodes the requests that are compared, and only observes the others. Its calls are private, so they leave nothing in
    its cache: before each request that has what the assistant's own has, the texts of all requests before, and not the answer to this one.

    Args:
        target (`PreTrainedModel`): decodes.
        assistant ([`OnlineAssistant`]): its config is the cache's too, but that the cache is on and nothing learns.
        max_new_tokens (`int`): length of the longest answer.
        tokenizers (`dict`): what `generate` needs with a draft of another vocabulary.
    """

    def __init__(self, target: PreTrainedModel, assistant: OnlineAssistant, max_new_tokens: int, tokenizers: dict):
        self._target, self._assistant, self._max_new_tokens = target, assistant, max_new_tokens
        self._tokenizers, self._warm = tokenizers, False
        config = assistant.osd_config.to_dict() | {"suffix_cache": True, "learn": "off"}
        self.alone = OnlineAssistant(None, OnlineConfig.from_dict(config))
        self._beside = assistant.osd_config.learn in BESIDE
        self.target_forwards = 0  # of the requests that the assistant has served

    def decode(self, prompt: Tensor, pair: int | None = None) -> dict[str, tuple[Tensor, float]]:
        """Serve a request.

        Args:
            prompt (`Tensor` int64 `(L,)`): the prompt.
            pair (`int`, *optional*): number of this request among those that are compared, from 0; left out, the assistant alone decodes it.

        Returns:
            `dict`: for `"online"`, and for `"plain"` and `"cache"` if it is compared, the output int64 `(L,)` and the seconds in `generate`.
        """
        found = {way: self._decode(way, prompt) for way in self._ways(pair)}
        output, _ = found[ONLINE]
        self.alone.texts.for_tenant(None).add(output.tolist())
        return found

    def _ways(self, pair: int | None) -> list[str]:
        """List the ways to decode a request, in an order that moves on from pair to pair. Where something learns beside serving, the assistant comes first, while
        that runs; the others wait for its end."""
        if pair is None:
            return [ONLINE]
        ways = [PLAIN, CACHE] if self._beside else [PLAIN, ONLINE, CACHE]
        turn = pair % len(ways)
        return [*([ONLINE] if self._beside else []), *ways[turn:], *ways[:turn]]

    def _decode(self, way: str, prompt: Tensor) -> tuple[Tensor, float]:
        if way == ONLINE:
            return self._serve(prompt)
        if self._beside and self._assistant.learner is not None:
            with contextlib.suppress(RuntimeError):  # there is no learner any more
                self._assistant.learner.state()  # waits for an update that runs
        if way == PLAIN:
            return self._generate(prompt)
        if not self._warm:  # the target's costs are then measured, as the assistant has them from its first request on
            self._warm = True
            self._generate(prompt, assistant_model=self.alone.private())
        found = self._generate(prompt, assistant_model=self.alone.private())
        self.alone.collect()
        return found

    def _serve(self, prompt: Tensor) -> tuple[Tensor, float]:
        tried = self._assistant.stats.total.verification_forwards
        with Forwards(self._target) as forwards:
            found = self._generate(prompt, assistant_model=self._assistant, **self._tokenizers)
        # Forwards that try whether the target can verify belong to no request.
        tried = self._assistant.stats.total.verification_forwards - tried
        self.target_forwards += forwards.count - tried
        return found

    def _generate(self, prompt: Tensor, **kwargs) -> tuple[Tensor, float]:
        start = time.perf_counter()
        output = answer(self._target, prompt, self._max_new_tokens, **kwargs)
        return output, time.perf_counter() - start
