"""Models of the lossless suite, and what may happen to them in mid-call."""

import copy
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast


class OneLayer(PreTrainedModel, GenerationMixin):
    """Attention and a head, nothing else: a forward of a tenth of a Llama's time, for tests that count thousands of calls."""

    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, logits_to_keep=0, **_
    ):
        x = self.embed(input_ids)  # (B, t, H)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        t, seen = q.shape[2], k.shape[2]
        future = torch.full((t, seen), -torch.inf).triu(seen - t + 1)
        x = x + ((q @ k.mT + future).softmax(-1) @ v)[:, 0]
        return CausalLMOutputWithPast(logits=self.head(x[:, -logits_to_keep:]), past_key_values=past_key_values)


def one_layer(vocab: int = 5, seed: int = 0, hidden: int = 8, scale: float = 0.5) -> OneLayer:
    """A random `OneLayer`, in eval mode."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        initializer_range=scale, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OneLayer(config).eval()


def with_logits(model: PreTrainedModel, change: Callable[[Tensor, Tensor], Tensor]) -> PreTrainedModel:
    """`model`, but that it answers `change(logits, positions)`: logits `(B, t, V)`, and `positions` `(t,)` of the tokens they predict."""

    def hook(module, inputs, kwargs, output):
        cache, n = output.past_key_values, output.logits.shape[1]
        seen = cache.get_seq_length() if cache is not None else kwargs["input_ids"].shape[1]
        output.logits = change(output.logits, torch.arange(seen - n, seen) + 1)
        return output

    model.register_forward_hook(hook, with_kwargs=True)
    return model


def retrained(draft: PreTrainedModel, scale: float, seed: int) -> PreTrainedModel:
    """A copy of `draft` whose weights were changed elsewhere, but for embeddings and head, which an assistant holds fixed."""
    model, random = copy.deepcopy(draft), torch.Generator().manual_seed(seed)
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) not in ends:
                p.add_(scale * p.std() * torch.randn(p.shape, generator=random))
    return model


class InMidCall(BaseStreamer):
    """Runs `act()` in a thread of its own, and waits for it, after each of the first `rounds` rounds of a call."""

    def __init__(self, act: Callable[[], object], rounds: int | None = None):
        self.act, self.rounds = act, rounds
        self.results: list[object] = []
        self._begun = False  # the prompt is put before the call begins

    def put(self, value):
        if not self._begun or (self.rounds is not None and len(self.results) >= self.rounds):
            self._begun = True
            return
        errors = []

        def work():
            try:
                self.results.append(self.act())
            except BaseException as error:  # of a test's own thread: raised below
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    def end(self):
        pass
