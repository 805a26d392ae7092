"""The assistant: it learns from what it serves, serves what it learnt, ends calls however they end, and says what is wrong."""

import json
import logging
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft, record_answers
from hf_osd.distill.scoring import score

from .served import GREEDY, PROMPTS, in_threads, serve


class EachRound(BaseStreamer):
    """Calls `hook(tokens so far)` after each round: a streamer is told of a round once it is verified."""

    def __init__(self, hook):
        self.hook, self.tokens = hook, 0

    def put(self, value):
        prompt, self.tokens = not self.tokens, self.tokens + value.numel()
        if not prompt:
            self.hook(self.tokens)

    def end(self):
        pass


def same(one, other) -> bool:
    return all(torch.equal(p, other[name]) for name, p in one.items())


def at_once(draft, **config) -> OnlineAssistant:
    """What is learnt serves from the next call on, and however long learning takes here, all is learnt."""
    return OnlineAssistant(draft, **{"gate": False, "learning_rate": 1e-3, "learning_budget": 1.0, **config})


def test_it_learns_what_it_serves_and_the_output_never_changes(target, draft):
    held_back = record_answers(target, [p[0] for p in PROMPTS], 16)
    assistant = at_once(draft, update_interval=4, learning_rate=5e-3, seed=0)
    before = torch.cat(assistant.score(held_back)).mean()
    plain = [target.generate(p, **GREEDY) for p in PROMPTS]
    for _ in range(4):
        for ours, own in zip(serve(target, assistant), plain, strict=True):
            assert torch.equal(ours, own)
    assistant.flush()
    assert assistant.stats.updates == 12
    assert assistant.stats.failed_updates == 0
    # The same prompts over and over: learning that does anything at all learns them.
    assert torch.cat(assistant.score(held_back)).mean() > before + 0.3
    assert assistant.stats.draft_version == 12


def test_the_draft_that_was_passed_is_never_written(target, draft):
    before = {name: p.clone() for name, p in draft.named_parameters()}
    assistant = at_once(draft, update_interval=2)
    serve(target, assistant, PROMPTS[:6])
    assert assistant.stats.updates > 0
    assert all(torch.equal(p, before[name]) for name, p in draft.named_parameters())
    served = dict(assistant.serving.active.named_parameters())
    assert any(not torch.equal(served[name], p) for name, p in before.items())


def test_frozen_it_captures_nothing_and_learns_nothing(target, draft):
    assistant = OnlineAssistant(draft, learn=False)
    serve(target, assistant, PROMPTS[:3])
    assert not assistant.flush()
    assert (len(assistant.buffer), assistant.stats.updates, assistant.stats.draft_version) == (0, 0, 0)
    assert assistant.stats.total.requests == 3


def test_closed_it_goes_on_drafting_without_learning(target, draft):
    with OnlineAssistant(draft, update_interval=10**6) as assistant:
        serve(target, assistant, PROMPTS[:2])
    assistant.close()
    [output] = serve(target, assistant, PROMPTS[:1])
    assert torch.equal(output, target.generate(PROMPTS[0], **GREEDY))
    assert not assistant.flush()
    assert len(assistant.buffer) == 0
    assert assistant.stats.total.requests == 3


def test_the_last_call_is_learnt_by_flush(target, draft):
    assistant = at_once(draft, update_interval=10**6)
    serve(target, assistant, PROMPTS[:1])
    assert assistant.flush()
    assert assistant.stats.updates == 1
    assert not assistant.flush()  # nothing new


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_call_that_breaks_off_keeps_what_was_verified_and_gives_its_lease_back(target, draft, error):
    assistant = OnlineAssistant(draft, lookahead="constant", update_interval=10**6)

    def interrupt(tokens):
        if tokens >= 12:
            raise error

    with pytest.raises(type(error)) as caught:
        serve(target, assistant, PROMPTS[:1], streamer=EachRound(interrupt))
    # Its traceback still holds the generator: the next call of this thread must end it all the same.
    serve(target, assistant, PROMPTS[:1])
    del caught
    assistant.update()
    first, second = assistant.buffer.new()
    own = target.generate(PROMPTS[0], **GREEDY)[0]
    assert 5 <= len(first) < len(second)  # the round that broke off is told to the streamer before it is recorded
    assert torch.equal(first.tokens.long(), own[: len(first.tokens)])
    assert not assistant.serving._leases


def test_a_lease_holds_while_the_weights_change_from_another_thread(target, draft, noised_copy):
    """An update in mid-call goes into the other copy, and the call's own q stays what it drafted with."""
    assistant = OnlineAssistant(draft, lookahead="constant", update_interval=10**6)
    serve(target, assistant, PROMPTS[:1])
    leased, versions = [], []

    def refresh_elsewhere(tokens):
        leased.append(assistant.serving.active)
        thread = threading.Thread(target=assistant.refresh, args=(trained,))
        thread.start()
        thread.join()
        versions.append(assistant.serving.version)

    trained = grow_draft(target, (0, -1))
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.mul_(1.1)
    held = assistant.serving.active
    before = [p.clone() for p in held.parameters()]
    [output] = serve(target, assistant, PROMPTS[:1], streamer=EachRound(refresh_elsewhere))
    assert torch.equal(output, target.generate(PROMPTS[0], **GREEDY))
    assert versions == list(range(1, len(versions) + 1))
    assert len(versions) > 2
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), before, strict=True))


def test_statistics_may_be_read_in_mid_call(target, draft):
    """From a streamer, say: the running call must not be taken for one that is over."""
    assistant = OnlineAssistant(draft, lookahead="constant", update_interval=10**6)
    seen = []

    def read(tokens):
        seen.append((assistant.stats.total.requests, len(assistant.serving._leases)))

    [output] = serve(target, assistant, PROMPTS[:1], streamer=EachRound(read))
    assert set(seen) == {(0, 1)}
    assistant.update()
    [feedback] = assistant.buffer.new()
    assert torch.equal(feedback.tokens.long(), output[0])


def test_threads_share_one_assistant(target, draft):
    assistant = at_once(draft, update_interval=4, seed=0)
    plain = [target.generate(p, **GREEDY) for p in PROMPTS]

    def work():
        for ours, own in zip(serve(target, assistant), plain, strict=True):
            assert torch.equal(ours, own)

    assert in_threads(work, work, work) == []
    assistant.flush()
    assert assistant.stats.total.requests == 36
    assert assistant.stats.failed_updates == 0
    assert not assistant.serving._leases


def test_a_seeded_run_repeats_exactly(target, draft):
    def run():
        assistant = at_once(draft, update_interval=2, seed=7, draft_cost=0.2, replay_ratio=2.0)
        outputs = []
        for _ in range(2):
            torch.manual_seed(11)
            outputs += serve(target, assistant, PROMPTS[:5], do_sample=True, top_k=0)
        assert assistant.flush() or assistant.stats.updates > 4
        return outputs, [p.clone() for _, p in assistant.serving.weights()], assistant.stats.total

    (one, weights_one, stats_one), (two, weights_two, stats_two) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights_one, weights_two, strict=True))
    assert (stats_one.drafted, stats_one.accepted) == (stats_two.drafted, stats_two.accepted)


def test_learning_leaves_the_users_random_state_alone(target, draft):
    """Trainer calls set_seed: a user's sampling would start over after every update."""
    import random

    import numpy as np

    assistant = at_once(draft, update_interval=10**6)
    serve(target, assistant, PROMPTS[:2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert assistant.flush()
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_alpha_is_known_though_nothing_was_drafted(target, draft):
    """The floor drafts nothing while it does not pay; α is then estimated at learning time, before the request is learnt."""
    assistant = OnlineAssistant(draft, draft_cost=5.0, suffix_cache=False, update_interval=10**6)  # never pays
    serve(target, assistant, PROMPTS[:2])
    stats = assistant.stats
    assert (stats.total.drafted, stats.total.rounds) == (0, stats.total.new_tokens)
    assert stats.last.overlap_count == stats.last.new_tokens
    held = record_answers(target, [PROMPTS[1][0]], 16)
    assert stats.last.alpha == pytest.approx(float(assistant.score(held)[0].mean()))


def test_what_was_sampled_without_drafts_still_reopens_drafting(target, draft):
    """Else a floor that has closed on sampled traffic would stay closed, whatever the draft has learnt since."""
    assistant = OnlineAssistant(draft, draft_cost=5.0, suffix_cache=False, update_interval=10**6)
    before = assistant.lookahead.acceptance()[0]
    torch.manual_seed(0)
    serve(target, assistant, PROMPTS[:4], do_sample=True, top_k=0)
    assistant.update()
    assert assistant.stats.total.drafted == 0
    assert assistant.stats.total.overlap_count == 0  # α is of dense rows, of which there are none
    assert assistant.lookahead.acceptance()[0] != before


def test_a_draft_with_nothing_to_train_is_refused(target):
    frozen = grow_draft(target, (0,)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires gradients.*learn=False"):
        OnlineAssistant(frozen)
    OnlineAssistant(frozen, learn=False)


def test_error_positions_are_learnt_alone_under_the_papers_preset(target, draft):
    assistant = OnlineAssistant(draft, OnlineConfig.paper(seed=0))
    serve(target, assistant, PROMPTS[:8])
    assert assistant.update()
    rejected_or_bonus = assistant.stats.total.rounds
    stats = assistant.stats
    assert stats.updates == 1
    assert assistant.buffer.new() == [], "none is learnt again"
    # Every round ends in an error position, but for those that a draft's own EOS or last token ended.
    assert rejected_or_bonus - 8 <= stats.learned_tokens <= rejected_or_bonus
    assert assistant.learner.student.trainer.state.global_step == 1  # one optimizer step


def test_grad_mode_of_the_caller_does_not_matter(target, draft):
    with torch.inference_mode():
        assistant = at_once(draft, update_interval=2)
        serve(target, assistant, PROMPTS[:5])
        stats = assistant.stats
    assert (stats.updates, stats.failed_updates) == (2, 0)


def test_a_bfloat16_draft_learns_in_float32_masters(tiny_llama):
    target = tiny_llama(layers=3).to(torch.bfloat16)
    for learner_dtype in ("float32", "bfloat16"):
        draft = grow_draft(target, (0, -1))
        assistant = at_once(draft, learner_dtype=learner_dtype, update_interval=2, learning_rate=1e-5)
        serve(target, assistant, PROMPTS[:5])
        assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)
        assert {p.dtype for p in assistant.learner.student.weights().values()} == {torch.float32}
        assert {p.dtype for p in assistant.serving.active.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "OPT", "Qwen2", "Gemma3"])
def test_other_architectures_serve_and_learn(name):
    import transformers

    sizes = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    if name == "GPT2":
        config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **sizes)
    elif name == "OPT":
        config = transformers.OPTConfig(
            hidden_size=32, num_hidden_layers=3, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=32, **sizes
        )
    elif name == "Gemma3":
        config = transformers.Gemma3TextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **sizes,
        )  # fmt: skip
    else:
        kv = {"num_key_value_heads": 2} if name == "Qwen2" else {}
        config = getattr(transformers, f"{name}Config")(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, **kv, **sizes
        )
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    assistant = at_once(grow_draft(target, (0, -1)), update_interval=3, lookahead="constant", seed=0)
    for prompt in PROMPTS[:7]:
        kwargs = {**GREEDY, "pad_token_id": 0}
        assert torch.equal(
            target.generate(prompt, **kwargs), target.generate(prompt, assistant_model=assistant, **kwargs)
        )
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)


def test_past_the_drafts_window_the_target_goes_on_alone():
    """Learned positions end there: one token more is an index error in the middle of somebody's request."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2(positions, layers):
        torch.manual_seed(0)
        sizes = {
            "n_embd": 32,
            "n_layer": layers,
            "n_head": 4,
            "vocab_size": 64,
            "bos_token_id": 0,
            "eos_token_id": None,
        }
        return GPT2LMHeadModel(GPT2Config(n_positions=positions, **sizes)).eval()

    target, draft = gpt2(64, 3), gpt2(16, 1)
    assistant = at_once(draft, lookahead="constant", update_interval=1)
    for prompt in (
        PROMPTS[0],
        torch.cat([PROMPTS[1]] * 4, dim=-1),
    ):  # into the window's end, and past it from the start
        kwargs = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        plain = target.generate(prompt, **kwargs)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))
    assert assistant.stats.last.drafted == 0
    target.generate(PROMPTS[2], max_new_tokens=8, do_sample=False, pad_token_id=0, assistant_model=assistant)
    assert assistant.flush()  # a request within the window still teaches
    assert assistant.stats.failed_updates == 0


def test_requests_say_how_the_draft_does_before_they_are_learnt(target, draft):
    """And let through what was learnt; as figures and in words."""
    config = {"learning_rate": 5e-3, "learning_budget": 1.0, "warmup_steps": 0, "seed": 0}
    assistant = OnlineAssistant(draft, update_interval=4, **config)
    serve(target, assistant, PROMPTS[:4])
    assistant.collect()
    assert "alpha_prequential" not in assistant.stats.to_dict()
    for _ in range(5):  # the same over and over: all are learnt sooner or later
        serve(target, assistant)
    assistant.flush()
    stats, figures = assistant.stats, json.loads(json.dumps(assistant.stats.to_dict()))
    assert len(assistant.buffer) == 64
    estimate = stats.estimate
    assert estimate.requests == 64
    assert figures["alpha_prequential"] == estimate.alpha
    assert figures["alpha_static"] == estimate.gain.before
    assert figures["alpha_prequential_low"] <= estimate.alpha <= figures["alpha_prequential_high"]
    assert estimate.gain.low > 0.0
    assert figures["accepted_updates"] == stats.draft_version > 0
    assert figures["regret_vs_static"] < 0
    assert f"before it was learnt: alpha {estimate.alpha:.3f}" in str(stats)
    assert (
        f"On the last 64 requests, each before it was learnt, the draft had α = {estimate.alpha:.2f} ("
        in assistant.report()
    )
    # What it says of its draft is of the one that serves.
    [first] = record_answers(target, PROMPTS[0], 16)
    assert torch.equal(assistant.score([first])[0], score(assistant.serving.active, [first])[0])
    assert not same(assistant.learner.student.serving_weights(), dict(assistant.serving.weights()))


# What bad input gets.


def test_a_device_to_learn_on_that_is_not_here_is_named(draft):
    device = next(
        kind for kind in ("cuda:99", "mps:99") if kind[:3] != str(torch.accelerator.current_accelerator())[:3]
    )
    with pytest.raises(ValueError, match=f"`learner_device` is '{device}', where the draft cannot be put"):
        OnlineAssistant(draft, learner_device=device)


def test_unknown_overrides_are_named(draft):
    with pytest.raises(ValueError, match="no key 'learning_rat'"):
        OnlineAssistant(draft, learning_rat=1e-3)


def test_a_failed_update_leaves_the_serving_draft_and_warns(target, draft, monkeypatch, caplog):
    assistant = at_once(draft, update_interval=10**6)
    serve(target, assistant, PROMPTS[:2])
    assert assistant.flush()
    served = [p.clone() for _, p in assistant.serving.weights()]
    masters = {name: p.clone() for name, p in assistant.learner.student.weights().items()}
    serve(target, assistant, PROMPTS[:2])

    def diverge(requests):
        member = assistant.learner.student
        with torch.no_grad():
            next(iter(member.weights().values())).fill_(torch.nan)
        member.after_step()  # as the trainer tells it: the average that serves takes it in
        assistant.learner.refresh()

    monkeypatch.setattr(assistant.learner.student.trainer, "learn", diverge)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert not assistant.flush()
    assert "update failed" in caplog.text
    assert all(torch.equal(a, b) for (_, a), b in zip(assistant.serving.weights(), served, strict=True))
    assert all(torch.equal(p, masters[name]) for name, p in assistant.learner.student.weights().items())
    monkeypatch.undo()
    serve(target, assistant, PROMPTS[:2])
    assert not assistant.flush()  # it rests a turn
    serve(target, assistant, PROMPTS[:2])
    assert assistant.flush()  # and learning goes on
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 1)


# Coming and going.


def test_refresh_refuses_what_it_would_drop(target, draft):
    """Embeddings held fixed but trained elsewhere: serving the rest alone would be another model."""
    assistant = OnlineAssistant(draft)
    trained = grow_draft(target, (0, -1))
    changed = trained.get_input_embeddings().weight
    trained.get_input_embeddings().weight = torch.nn.Parameter(changed.detach() * 1.5)
    with pytest.raises(ValueError, match=r"embed_tokens.*freeze_embeddings=False"):
        assistant.refresh(trained)


def test_other_weights_are_tried_though_those_before_did_not_pay(target, draft):
    assistant = OnlineAssistant(draft, update_interval=10**6, draft_cost=0.1)
    assistant.lookahead.earnings.credit = -10.0
    serve(target, assistant, PROMPTS[:2])
    assert not assistant.lookahead.may_ask_draft
    assistant.refresh(grow_draft(target, (0, -1)))
    serve(target, assistant, PROMPTS[:1])
    assert assistant.lookahead.earnings.credit > 0


def test_stats_print_and_serialise(target, draft):
    assistant = OnlineAssistant(draft, lookahead="constant", update_interval=2)
    serve(target, assistant, PROMPTS[:3])
    text = str(assistant.stats)
    for word in ("alpha_live", "tokens a round", "draft s / target s", "updates", "buffer"):
        assert word in text
    figures = json.loads(json.dumps(assistant.stats.to_dict()))
    assert figures["total"]["requests"] == 3
    assert len(figures["last"]["acceptance_by_position"]) <= 5


def test_lora_drafts_serve_learn_and_share_their_base(target, draft):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(
        grow_draft(target, (0, -1)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    assistant = at_once(lora, update_interval=3, learning_rate=1e-2)
    plain = [target.generate(p, **GREEDY) for p in PROMPTS[:7]]
    assert all(torch.equal(a, b) for a, b in zip(serve(target, assistant, PROMPTS[:7]), plain, strict=True))
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)
    assert all("lora" in name for name in assistant.serving.trainable)
