"""Targets with recurrent states, each as its kind has them: output is plain decoding's, from every source of drafts and while they learn; and planted bugs of the rollback are
caught by these very checks."""

import logging
from collections import Counter

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from hf_osd import OnlineAssistant, grow_draft, grow_feature_draft
from hf_osd.generation import rollback as module
from hf_osd.generation.rollback import Rollback
from recipes.checks.recurrent import FAMILIES, SIZES
from recipes.checks.recurrent import model_of as target_of

from .checks import SERVES_AT_ONCE
from .reference import exact_distribution, p_value
from .test_verification import HYBRIDS, check_plain, model_of

# Families that transformers computes otherwise in blocks than token by token, and what is said of them.
INCONSISTENT = {
    "NemotronHForCausalLM": (
        {
            "layer_types": ["mamba", "attention", "mamba", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
        },
        "limit the time step",
    ),
    "Zamba2ForCausalLM": (
        {
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
        },
        "limit the time step",
    ),
    "JambaForCausalLM": (HYBRIDS["JambaConfig"], "differ from those for one at a time"),
}
FEW = ["Qwen3_5ForCausalLM", "FalconH1ForCausalLM"]
N = 24


def prompts(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 64, (1, 6 + i), generator=random) for i in range(count)]


def attention_draft(tiny_llama, target):
    return tiny_llama(vocab=target.config.get_text_config().vocab_size)


def assistant_of(draft=None, **settings):
    learns = {"update_interval": 2, "learning_rate": 5e-3, "seed": 0, **SERVES_AT_ONCE}
    return OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=3, **{**learns, **settings})


def check(target, assistant, texts, times=2, **kwargs):
    """Outputs are the target's own; blocks were drafted, and some of them accepted in part. Returns the statistics."""
    asked = {"max_new_tokens": N, "do_sample": False, **kwargs}
    forwards = []
    for prompt in texts:
        plain = target.generate(prompt, **asked)
        for _ in range(times):
            hook = target.register_forward_hook(lambda *_: forwards.append(1))
            output = target.generate(prompt, assistant_model=assistant, **asked)
            hook.remove()
            assert torch.equal(output, plain), (output, plain)
    total = assistant.stats.total
    assert total.plain_requests == 0
    assert 0 < total.tested <= total.drafted
    assert total.accepted < total.tested
    assert len(forwards) == total.rounds + total.verification_forwards, "no forward more than for other targets"
    return assistant.stats


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_alone_drafts(name, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        stats = check(target_of(name), assistant_of(), prompts(3))
    assert stats.total.accepted > 0
    assert not [record for record in caplog.records if record.name.startswith("hf_osd")]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["feature", "attention"])
def test_drafts_that_learn(tiny_llama, name, kind):
    target = target_of(name)
    draft = grow_feature_draft(target, seed=0) if kind == "feature" else attention_draft(tiny_llama, target)
    stats = check(target, assistant_of(draft, learning_rate=2e-2), prompts(4))
    assert stats.updates >= 3
    assert stats.failed_updates == 0
    assert stats.total.drafted_by["draft"] > 0


@pytest.mark.parametrize(
    "name", ["Qwen3_5ForCausalLM", "Qwen3NextForCausalLM", "GraniteMoeHybridForCausalLM", "BambaForCausalLM"]
)
def test_a_grown_draft_is_of_attention_layers(name):
    target = target_of(name)
    draft = grow_draft(target)
    stats = check(target, assistant_of(draft), prompts(3))
    assert stats.updates >= 2
    assert stats.failed_updates == 0


@pytest.mark.parametrize("name", INCONSISTENT)
def test_what_transformers_computes_in_two_ways_decodes_plainly(name, caplog):
    values, why = INCONSISTENT[name]
    check_plain(model_of(name, **{**SIZES, **values}), caplog, why)


@pytest.mark.parametrize("name", FEW)
def test_states_that_a_feature_draft_learns_from_are_the_targets(name):
    target = target_of(name)
    draft = grow_feature_draft(target, seed=0)
    assistant = assistant_of(draft, update_interval=100)
    for prompt in prompts(2):
        output = target.generate(prompt, assistant_model=assistant, max_new_tokens=N, do_sample=False)
        assistant.collect()
        feedback = assistant.buffer.new()[-1]
        with torch.no_grad():
            states = target(output[:, :-1], output_hidden_states=True).hidden_states
        layers = draft.config.recorded_layers
        expected = torch.cat([states[i][0] for i in layers], -1)[feedback.states.start :]
        assert len(feedback.states) == len(expected)
        assert (feedback.states.dense() - expected).abs().max() < 0.02 * expected.abs().max()
    assert assistant.stats.total.accepted > 0 or assistant.stats.total.drafted


class Bans(LogitsProcessor):
    """Bans the token said three before."""

    def __call__(self, input_ids, scores):
        return scores.scatter(-1, input_ids[:, -3:-2], -torch.inf)


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_and_processors(name, tokenizer):
    target = target_of(name)
    [prompt] = prompts(1)
    said = target.generate(prompt, max_new_tokens=N, do_sample=False)[0, prompt.shape[1] :].tolist()
    for eos in (said[5], said[11]):
        assistant = assistant_of()
        for _ in range(3):
            output = target.generate(
                prompt, assistant_model=assistant, max_new_tokens=N, do_sample=False, eos_token_id=eos
            )
            assert torch.equal(output, target.generate(prompt, max_new_tokens=N, do_sample=False, eos_token_id=eos))
    check(target, assistant_of(), prompts(2), logits_processor=LogitsProcessorList([Bans()]))
    check(target, assistant_of(), prompts(2), repetition_penalty=1.3)
    stop = {"stop_strings": [tokenizer.decode(said[7:8])], "tokenizer": tokenizer}
    assistant = assistant_of()
    for _ in range(2):
        output = target.generate(prompt, assistant_model=assistant, max_new_tokens=N, do_sample=False, **stop)
        assert torch.equal(output, target.generate(prompt, max_new_tokens=N, do_sample=False, **stop))


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_the_targets_distribution(name, tiny_llama):
    sizes = {"vocab_size": 5, "bos_token_id": 1, "pad_token_id": 0}
    target = target_of(name, **sizes)
    with torch.no_grad():
        target.get_output_embeddings().weight.mul_(0.3)  # else hardly anything is ever rejected
    prompt, asked = torch.tensor([[1, 2, 3]]), {"do_sample": True, "top_k": 0}
    exact = exact_distribution(target, prompt, 4, (), **asked)
    assistant, counts = assistant_of(tiny_llama(vocab=5), update_interval=16), Counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(160):
            output = target.generate(prompt, max_new_tokens=4, assistant_model=assistant, eos_token_id=None, **asked)
            counts[tuple(output[0, 3:].tolist())] += 1
    assert counts.keys() <= exact.keys()
    for length in range(1, 5):
        began, probabilities = Counter(), Counter()
        for answer, count in counts.items():
            began[answer[:length]] += count
        for answer, p in exact.items():
            probabilities[answer[:length]] += p
        assert p_value(began, probabilities) > 1e-4
    total = assistant.stats.total
    assert 0 < total.accepted < total.tested


def check_sampled_logits(name):
    target, assistant = target_of(name), assistant_of(verify_target=False)
    asked = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_logits": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for prompt in prompts(3):
            prompt = torch.cat([prompt] * 3, -1)  # for the cache to draft from
            output = target.generate(prompt, assistant_model=assistant, max_new_tokens=N, **asked)
            with torch.no_grad():
                fresh = target(output.sequences[:, :-1]).logits[0, prompt.shape[1] - 1 :]
            assert torch.allclose(torch.cat(output.logits), fresh, atol=1e-2, rtol=1e-3)
    assert assistant.stats.total.refed_tokens > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_that_are_sampled_from_are_a_fresh_forwards(name):
    """Sees an error of a state that χ² over short answers is too weak for."""
    check_sampled_logits(name)


@pytest.mark.parametrize("name", FEW)
def test_all_that_generate_returns_is_plain_decodings(name):
    target = target_of(name)
    target.set_attn_implementation("eager")
    asked = {"max_new_tokens": N, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    asked |= {"output_hidden_states": True, "output_scores": True}
    assistant = assistant_of()
    for prompt in prompts(2):
        plain = target.generate(prompt, **asked)
        for _ in range(2):
            output = target.generate(prompt, assistant_model=assistant, **asked)
            assert torch.equal(output.sequences, plain.sequences)
            for name_ in ("logits", "scores"):
                for one, other in zip(output[name_], plain[name_], strict=True):
                    assert torch.allclose(one, other, atol=1e-3, rtol=1e-3)
            assert len(output.hidden_states) == len(plain.hidden_states)
            for one, other in zip(output.hidden_states[1:], plain.hidden_states[1:], strict=True):
                assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(one, other, strict=True))
    assert assistant.stats.total.accepted > 0


def test_the_target_is_afterwards_as_it_was():
    target = target_of("Qwen3_5ForCausalLM")
    kind, attributes = type(target), dict(vars(target))
    [prompt] = prompts(1)
    assistant = assistant_of()
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    for _ in range(2):
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        target.generate(prompt, assistant_model=assistant, past_key_values=cache, max_new_tokens=N, do_sample=False)
    assert "crop" not in vars(cache)
    assert type(target) is kind
    assert vars(target) == attributes
    with pytest.raises(ValueError, match="stateful"):
        target.generate(prompt, assistant_model=target_of("Qwen3_5ForCausalLM"), max_new_tokens=N)


def test_no_draft_is_grown_where_all_layers_have_states():
    with pytest.raises(ValueError, match="grow_feature_draft"):
        grow_draft(target_of("FalconH1ForCausalLM"))


# Planted bugs of the rollback.


def state_not_put_back(monkeypatch):
    def restore(self, layer):
        for i, state in self.conv.items():
            layer.conv_states[i] = state.clone()

    monkeypatch.setattr(module._Copy, "restore", restore)


def window_off_by_one(monkeypatch):
    original = module._Copy.restore

    def restore(self, layer):
        original(self, layer)
        for i, state in self.conv.items():
            layer.conv_states[i] = state.roll(1, -1)

    monkeypatch.setattr(module._Copy, "restore", restore)


def fed_once_too_often(monkeypatch):
    original = Rollback.crop

    def crop(self, tokens_to_remove):
        original(self, tokens_to_remove)
        if not tokens_to_remove and self._block:
            self.carried = 1

    monkeypatch.setattr(Rollback, "crop", crop)


def copied_after_the_round(monkeypatch):
    original = Rollback.without_carried

    def without_carried(self, outputs):
        self.begin()
        return original(self, outputs)

    monkeypatch.setattr(Rollback, "without_carried", without_carried)


def carried_tokens_not_read(monkeypatch):
    def length(self, tokens):
        self._block = 0 if tokens is None else tokens - 1
        return tokens

    monkeypatch.setattr(Rollback, "length", length)


def attention_not_taken_back(monkeypatch):
    original = module._crop_attention

    def crop(self, tokens_to_remove):
        fed, rejected = self.carried + 1 + self._block, abs(tokens_to_remove)
        layers = [layer for layer in self._cache.layers if not hasattr(layer, "recurrent_states")]
        before = [layer.keys.clone() if layer.keys is not None else None for layer in layers]
        wrapped(self, tokens_to_remove)
        for layer, keys in zip(layers, before, strict=True):
            if rejected and keys is not None and self.carried > 1:
                layer.keys = torch.cat([layer.keys[:, :, 1:], keys[:, :, -fed : -fed + 1]], 2)

    wrapped = Rollback.crop
    assert original
    monkeypatch.setattr(Rollback, "crop", crop)


BUGS = [
    state_not_put_back,
    window_off_by_one,
    fed_once_too_often,
    copied_after_the_round,
    carried_tokens_not_read,
    attention_not_taken_back,
]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(monkeypatch, bug):
    """With the trial left out: by the outputs alone."""
    target = target_of("Qwen3_5ForCausalLM")
    check(target, assistant_of(verify_target=False), prompts(6))
    bug(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check(target, assistant_of(verify_target=False), prompts(6))


@pytest.mark.parametrize("bug", [state_not_put_back, window_off_by_one])
def test_a_planted_bug_is_caught_when_sampling(monkeypatch, bug):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check_sampled_logits("Qwen3_5ForCausalLM")


@pytest.mark.parametrize("bug", BUGS)
def test_the_trial_finds_a_planted_bug(monkeypatch, caplog, bug):
    bug(monkeypatch)
    check_plain(target_of("Qwen3_5ForCausalLM"), caplog, "")


def test_a_first_round_with_drafts_is_an_error(monkeypatch):
    """Before the prompt there is no state to go back to."""
    cache = DynamicCache()
    run = Rollback(cache)
    run.length(None)
    run._block = 2
    with pytest.raises(RuntimeError, match="nothing can be taken back"):
        run.crop(-1)
