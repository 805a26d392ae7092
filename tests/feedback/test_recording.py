"""`record_answers`: batched and left-padded, and still each prompt's own greedy answer and the target's own distributions."""

import threading

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_osd import OnlineAssistant
from hf_osd.distill.scoring import score
from hf_osd.drafting.vocab_mapping import VocabMapping
from hf_osd.feedback.feedback import UNTESTED
from hf_osd.feedback.recording import record_answers

LENGTHS = [9, 3, 14, 3, 6]


@pytest.fixture
def prompts():
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 64, (length,), generator=random) for length in LENGTHS]


def plainly(target, prompt, most):
    """What `generate` answers to `prompt` alone."""
    ids = prompt[None]
    return target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0
    )[0]


def gpt2():
    """Positions are learned ones here: a padded prompt that counts its padding answers otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, eos_token_id=1, bos_token_id=0)).eval()


def encoder_decoder(family, seed=0):
    """T5 goes by distances, BART by positions that are counted from the first column."""
    tokens = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "t5":
            sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
            return T5ForConditionalGeneration(T5Config(**tokens, **sizes)).eval()
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
        heads |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "init_std": 0.3}
        config = BartConfig(**tokens, **heads, d_model=32, bos_token_id=2, forced_eos_token_id=None)
        return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_answer_is_the_greedy_one_of_its_prompt_alone(tiny_llama, prompts, family, batch_size):
    target = tiny_llama() if family == "llama" else gpt2()
    recorded = record_answers(target, prompts, max_new_tokens=12, batch_size=batch_size)
    assert len(recorded) == len(prompts)
    for feedback, prompt in zip(recorded, prompts, strict=True):
        assert feedback.prompt_length == len(prompt)
        assert feedback.tokens.tolist() == plainly(target, prompt, 12).tolist()


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_with_its_first_end_of_sequence_token(tiny_llama, prompts, several):
    target = tiny_llama()
    target.generation_config.eos_token_id = None
    free = [f.answer.tolist() for f in record_answers(target, prompts, max_new_tokens=12)]
    assert all(len(answer) == 12 for answer in free)
    ends = [free[0][4], free[2][7]] if several else [free[0][4]]
    target.generation_config.eos_token_id = ends if several else ends[0]
    cut = 0
    for feedback, prompt, answer in zip(record_answers(target, prompts, 12), prompts, free, strict=True):
        n = min([answer.index(end) + 1 for end in ends if end in answer], default=12)
        cut += n < 12
        assert feedback.answer.tolist() == answer[:n]
        assert feedback.tokens.tolist() == plainly(target, prompt, 12).tolist()
        assert len(feedback.top_ids) == len(feedback.tail_logp) == len(feedback.outcome) == n
    assert cut, "the case has an answer that ends early"


def fresh(target, feedback):
    """The target's log-probs at each position of the answer, by one forward without padding or cache."""
    with torch.no_grad():
        logits = target(input_ids=feedback.tokens[None].long(), use_cache=False).logits[0]
    return logits[feedback.prompt_length - 1 : -1].log_softmax(-1)


def check_distributions(target, feedback, k):
    dense = fresh(target, feedback)
    assert feedback.top_ids.shape == (len(feedback), k)
    # float32 sums in another order, padded or not: 1e-4 is some hundred units in the last place of a log-prob of 10.
    near = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(feedback.top_logps, dense.topk(k).values, **near)
    torch.testing.assert_close(dense.gather(-1, feedback.top_ids.long()), feedback.top_logps, **near)
    rest = dense.scatter(-1, feedback.top_ids.long(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(feedback.tail_logp, rest, **near)


def test_distributions_are_those_of_a_fresh_forward(tiny_llama, prompts):
    target = tiny_llama()
    for feedback in record_answers(target, prompts, max_new_tokens=9, batch_size=3, top_k=8, dtype=torch.float32):
        check_distributions(target, feedback, k=8)


def test_sampled_answers_are_draws_and_their_distributions_the_raw_ones(tiny_llama, prompts):
    """Whatever the target's settings would cut off, and whatever the temperature."""
    target = tiny_llama(eos_token_id=None)
    target.generation_config.update(top_k=1, top_p=0.1)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(record_answers(target, prompts, 9, batch_size=3, top_k=8, dtype=torch.float32, temperature=2.0))
    greedy = [feedback.answer.tolist() for feedback in record_answers(target, prompts, 9)]
    one, two = ([feedback.answer.tolist() for feedback in each] for each in drawn)
    assert one == two, "by the process's random numbers"
    assert all(answer != likeliest for answer, likeliest in zip(one, greedy, strict=True))
    for feedback in drawn[0]:
        assert feedback.sampled
        check_distributions(target, feedback, k=8)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(tiny_llama, prompts, temperature):
    with pytest.raises(ValueError, match="`temperature` is"):
        record_answers(tiny_llama(), prompts, 2, temperature=temperature)


def test_distributions_are_raw_where_the_targets_own_settings_change_scores(tiny_llama, prompts):
    """Qwen's instruct models come with a repetition penalty: p is the distribution before it, the answer is the one after it."""
    target = tiny_llama()
    target.generation_config.repetition_penalty = 1.8
    recorded = record_answers(target, prompts, max_new_tokens=9, batch_size=3, top_k=8, dtype=torch.float32)
    penalised = 0
    for feedback, prompt in zip(recorded, prompts, strict=True):
        check_distributions(target, feedback, k=8)
        assert feedback.tokens.tolist() == plainly(target, prompt, 9).tolist()
        penalised += (feedback.answer != feedback.top_ids[:, 0]).sum()
    assert penalised > 0, "the case has a token that the penalty changed"


def test_padding_does_not_count_as_a_repetition(tiny_llama, prompts):
    """Padded with EOS, a short prompt's answer would be penalised for ending."""
    target = tiny_llama()
    target.generation_config.eos_token_id = None
    free = record_answers(target, prompts, max_new_tokens=1)
    target.generation_config.eos_token_id = int(free[1].answer[0])  # what a prompt of 3 tokens answers at once
    target.generation_config.repetition_penalty = 5.0
    recorded = record_answers(target, prompts, max_new_tokens=6)
    assert recorded[1].tokens.tolist() == plainly(target, prompts[1], 6).tolist()
    assert len(recorded[1]) == 1


def test_a_target_that_serves_another_thread_meanwhile_is_not_overheard(tiny_llama, prompts):
    target, others = tiny_llama(), []

    def meanwhile(module, inputs, output):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(target(input_ids=torch.arange(2, 9)[None]).logits))
            thread.start()
            thread.join()

    handle = target.model.register_forward_hook(meanwhile)
    recorded = record_answers(target, prompts, max_new_tokens=4, top_k=8, dtype=torch.float32)
    handle.remove()
    assert len(others) == 4
    for feedback in recorded:
        check_distributions(target, feedback, k=8)


def test_nothing_was_drafted_and_all_positions_teach(tiny_llama, prompts):
    for feedback in record_answers(tiny_llama(), prompts, max_new_tokens=5):
        assert (feedback.outcome == UNTESTED).all()
        assert (feedback.drafted == -1).all()
        assert feedback.teaching_mask("error").all()
        assert not feedback.sampled
        assert feedback.top_logps.dtype == torch.float16


def test_it_tells_how_many_prompts_each_batch_had(tiny_llama, prompts):
    told = []
    record_answers(tiny_llama(), prompts, max_new_tokens=2, batch_size=2, on_batch=told.append)
    assert told == [2, 2, 1]


def test_no_prompts_give_no_answers(tiny_llama):
    assert record_answers(tiny_llama(), [], max_new_tokens=2) == []


def test_recording_leaves_no_trace_on_the_target(tiny_llama, prompts):
    target = tiny_llama()
    before = target.generation_config.to_dict()
    record_answers(target, prompts, max_new_tokens=2)
    assert target.generation_config.to_dict() == before
    assert not target._forward_hooks


def test_long_prompts_come_in_batches_of_their_own(tiny_llama, prompts, monkeypatch):
    """A batch is padded to its longest prompt: a few long ones would make one of dozens take gigabytes."""
    import hf_osd.feedback.recording as recording

    target = tiny_llama(layers=2)

    expected = [feedback.answer.tolist() for feedback in record_answers(target, prompts, max_new_tokens=6)]
    monkeypatch.setattr(recording, "_BATCH_TOKENS", 2 * max(map(len, prompts)) - 1)
    sizes, generate = [], target.generate

    def watched(input_ids, **kwargs):
        sizes.append(input_ids.shape)
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(target, "generate", watched)
    told = []
    recorded = record_answers(target, prompts, max_new_tokens=6, on_batch=told.append)
    assert [feedback.answer.tolist() for feedback in recorded] == expected
    assert sum(told) == len(prompts)
    assert len(sizes) > 1
    assert all(count == 1 or count * length < 2 * max(map(len, prompts)) for count, length in sizes)
    assert sizes[-1][0] == 1  # the longest is alone


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_reads_the_prompt_and_the_decoder_answers(prompts, family):
    """In batches, beside calls of one prompt with a draft of the same kind: tokens and distributions are what such a call keeps."""
    target, draft = (encoder_decoder(family, seed) for seed in (0, 1))
    assistant = OnlineAssistant(draft, update_interval=10**6, top_k=8, feedback_dtype="float32", lookahead="constant")
    recorded = record_answers(target, prompts, 9, batch_size=3, top_k=8, dtype=torch.float32, prompt_positions=4)
    for one, prompt in zip(recorded, prompts, strict=True):
        ids = prompt[None]
        mask = torch.ones_like(ids)
        target.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, assistant_model=assistant)
        assistant.collect()
        live = assistant.buffer.new()[-1]
        for name in ("tokens", "source"):
            assert getattr(one, name).tolist() == getattr(live, name).tolist()
        assert one.prompt_length == live.prompt_length
        assert one.prompt_rows is None
        for name in ("top_logps", "tail_logp"):
            torch.testing.assert_close(getattr(one, name), getattr(live, name), atol=1e-4, rtol=1e-4)
    for overlap, one in zip(assistant.score(recorded), recorded, strict=True):
        assert overlap.shape == (len(one),)
        assert overlap.isfinite().all()
    assert all(overlap.tolist() == [1.0] * len(overlap) for overlap in score(target, recorded))


def test_a_draft_of_another_vocabulary_for_an_encoder_decoder_is_refused(prompts):
    with pytest.raises(ValueError, match=r"encoder-decoder of 64 tokens and the draft has 72"):
        record_answers(encoder_decoder("t5"), prompts, 2, translation=VocabMapping.from_sizes(64, 72))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_states_are_those_of_their_positions_and_layers(tiny_llama, prompts, family, batch_size):
    """Layer i is the i-th hidden state of a plain forward, whatever the padding; an off-by-one would be learnt without a sign."""
    target, layers = (tiny_llama(layers=3) if family == "llama" else gpt2()), [2, 0, 1]
    recorded = record_answers(
        target, prompts, max_new_tokens=6, batch_size=batch_size, prompt_positions=4, states_of=layers
    )
    without = record_answers(target, prompts, max_new_tokens=6, batch_size=batch_size, prompt_positions=4)
    for one, plain in zip(recorded, without, strict=True):
        assert one.states.start == 0
        assert len(one.states) == len(one.tokens) - 1
        for name, tensor in plain.tensors().items():
            assert torch.equal(getattr(one, name).nan_to_num(), tensor.nan_to_num()), name
        assert plain.states is None
        with torch.no_grad():
            hidden = target(input_ids=one.tokens[None].long(), output_hidden_states=True).hidden_states
        expected = torch.stack([hidden[i][0, :-1] for i in layers], 1)  # (L-1, 3, H)
        error = (one.states.dense().unflatten(1, (3, -1)) - expected).abs().amax(-1)
        assert (error <= expected.abs().amax(-1) / 127 + 1e-5).all()
    assert not target._forward_pre_hooks


def test_of_a_layer_it_is_what_that_layer_gives(tiny_llama):
    """The count of `output_hidden_states` given as a list has changed between releases of transformers: 0 is the embeddings, and i what layer i-1 gives."""
    target, prompt, given = tiny_llama(layers=4), torch.arange(2, 9), []
    target.model.layers[1].register_forward_hook(lambda layer, inputs, output: given.append(output))
    [one] = record_answers(target, [prompt], max_new_tokens=1, states_of=[2])
    dense = one.states.dense()
    layer = given[0][0] if given[0].ndim == 3 else given[0]
    assert (dense - layer).abs().max() <= layer.abs().max() / 127
    [one] = record_answers(target, [prompt], max_new_tokens=1, states_of=[0])
    table = target.get_input_embeddings().weight[prompt]
    assert (one.states.dense() - table).abs().max() <= table.abs().max() / 127


def test_of_a_long_prompt_the_last_states_are_kept(tiny_llama):
    target, random = tiny_llama(layers=3), torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 64, (n,), generator=random) for n in (270, 400, 5)]
    for most, start in ((0, 400 - 258), (300, 400 - 302)):
        recorded = record_answers(target, prompts, max_new_tokens=3, prompt_positions=most, states_of=[1])
        assert [one.states.start for one in recorded] == [270 - 258 if not most else 0, start, 0]
        assert [one.states.stop for one in recorded] == [len(one.tokens) - 1 for one in recorded]
        for one in (
            recorded
        ):  # whatever has a target can be learnt, but for the second token of a text, before which there is one alone
            second = most >= one.prompt_length
            assert one.num_teaching("all", states=True) == one.num_teaching("all") - second


def test_states_that_there_are_not_are_refused(tiny_llama, prompts):
    target = tiny_llama(layers=3)
    for layers in ([4], [-1], []):
        with pytest.raises(ValueError, match=r"0 \(its embeddings\) to 3"):
            record_answers(target, prompts, max_new_tokens=2, states_of=layers)
    with pytest.raises(ValueError, match="leave it out"):
        record_answers(target, prompts, 2, states_of=[1], translation=VocabMapping.from_sizes(64, 60))
    with pytest.raises(ValueError, match="leave it out"):
        record_answers(encoder_decoder("t5"), prompts, 2, states_of=[1])
