"""Makers of tiny random models and of random feedback: every test builds what it needs, and nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import gc
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback, SparseLogits

VOCAB = 64

gc.disable()  # until all is imported, see `pytest_collection_finish`

# Deadlines are timing assertions; and what a test draws must not differ from run to run.
settings.register_profile("hf_osd", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("hf_osd")


def pytest_collection_finish(session):
    """Half a million objects of imported libraries stay for good: the garbage collector need not look at them again and again, which takes a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and the threads take the cores of others. Each test begins so, for a recipe may have set another number; and a forked
    child that computes with more than one hangs."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable:
    """`tiny_llama(layers=2, vocab=64, seed=0, **config)`: a random Llama of hidden size 32, in eval mode, on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers: int = 2, vocab: int = VOCAB, seed: int = 0, **config):
        settings = {
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,  # the usual 0.02 makes nearly flat distributions, and greedy answers that repeat
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()

    return make


@pytest.fixture(scope="module")
def target(tiny_llama):
    """What a file serves that asks for no other."""
    return tiny_llama(layers=3)


@pytest.fixture(scope="module")
def draft(target):
    """The file's draft, grown from its target."""
    from hf_osd import grow_draft

    return grow_draft(target, (0, -1))


@pytest.fixture(scope="session")
def make_feedback() -> Callable:
    """`make_feedback(n=12, prompt=5, vocab=64, k=16, seed=0, ...)`: a random request whose fields agree with each other.

    The target's logits and the draft's are random; greedy answers are the target's argmax; rounds of `gamma` drafts give the outcomes.
    """

    def make(
        n: int = 12,
        prompt: int = 5,
        vocab: int = VOCAB,
        k: int = 16,
        seed: int = 0,
        sampled: bool = False,
        gamma: int = 3,
        dtype: torch.dtype = torch.float16,
        created: float | None = None,
        prompt_rows: int = 0,
    ) -> Feedback:
        random = torch.Generator().manual_seed(seed)
        target = 3 * torch.randn(n, vocab, generator=random)
        draft = target + 2 * torch.randn(n, vocab, generator=random)
        p, log_q = target.softmax(-1), draft.log_softmax(-1)
        if sampled:
            answer = torch.multinomial(p, 1, generator=random).squeeze(-1) if n else torch.zeros(0, dtype=torch.long)
        else:
            answer = target.argmax(-1)
        guesses = draft.argmax(-1)
        drafted, outcome = torch.full((n,), -1), torch.full((n,), UNTESTED)
        in_block = 0
        for i in range(n):
            if in_block == gamma:  # the bonus token, for which nothing was drafted
                in_block = 0
                continue
            drafted[i] = guesses[i]
            accepted = guesses[i] == answer[i]
            outcome[i] = ACCEPTED if accepted else REJECTED
            in_block = in_block + 1 if accepted else 0
        tested = outcome != UNTESTED
        overlap = torch.minimum(p, log_q.exp()).sum(-1) if sampled else (guesses == answer).float()
        rows = SparseLogits.from_logits(target, k, dtype)
        draft_logps = log_q.gather(-1, rows.top_ids.long())
        drafted_logp = log_q.gather(-1, guesses[:, None]).squeeze(-1)
        nan = torch.tensor(torch.nan)
        prompt_ids = torch.randint(vocab, (prompt,), generator=random)
        of_prompt = SparseLogits.from_logits(3 * torch.randn(prompt_rows, vocab, generator=random), k, dtype)
        return Feedback(
            tokens=torch.cat([prompt_ids, answer]).to(torch.int32),
            prompt_length=prompt,
            top_ids=rows.top_ids,
            top_logps=rows.top_logps,
            tail_logp=rows.tail_logp,
            draft_logps=torch.where(tested[:, None], draft_logps, nan).to(dtype),
            drafted=drafted.to(torch.int32),
            drafted_logp=torch.where(tested, drafted_logp, nan).to(dtype),
            outcome=outcome.to(torch.int8),
            overlap=torch.where(tested, overlap, nan),
            sampled=sampled,
            created=time.monotonic() if created is None else created,
            prompt_rows=of_prompt if prompt_rows else None,
        )

    return make


@pytest.fixture(scope="session")
def answer_of() -> Callable:
    """`answer_of(model, prompt, n, k=16, dtype=torch.float32)`: what `model` says greedily after `prompt`, as feedback of a target
    that answered alone. A plain loop without a cache, with EOS like any other token."""

    def make(model, prompt: torch.Tensor, n: int, k: int = 16, dtype: torch.dtype = torch.float32) -> Feedback:
        tokens, logits = prompt, []
        with torch.no_grad():
            for _ in range(n):
                logits.append(model(input_ids=tokens[None], use_cache=False).logits[0, -1])
                tokens = torch.cat([tokens, logits[-1].argmax()[None]])
        rows = SparseLogits.from_logits(torch.stack(logits), k, dtype)
        return Feedback.from_target(tokens, len(prompt), rows)

    return make


@pytest.fixture(scope="session")
def noised_copy() -> Callable:
    """`noised_copy(model, scale)`: a draft that agrees with `model` on some tokens and not on others; on all of them at scale 0."""
    import copy

    def make(model, scale: float, seed: int = 0):
        noised, random = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in noised.parameters():
                p.add_(scale * p.std() * torch.randn(p.shape, generator=random))
        return noised

    return make


@pytest.fixture(scope="session")
def answers_with_states() -> Callable:
    """`answers_with_states(target, count, n, layers, prompt=6, **how)`: what `target` says after `count` random prompts, with its states after `layers`, as `record_answers` records it."""
    from hf_osd import record_answers

    def make(target, count: int, n: int, layers: list[int], prompt: int = 6, **how) -> list[Feedback]:
        random = torch.Generator().manual_seed(0)
        prompts = [torch.randint(2, 64, (prompt,), generator=random) for _ in range(count)]
        return record_answers(target, prompts, n, states_of=layers, **how)

    return make
