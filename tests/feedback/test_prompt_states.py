"""`PromptStates`: what the target makes of a prompt teaches too: its own distributions, at no forward more, and each text once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from hf_osd import OnlineAssistant, grow_draft, record_answers
from hf_osd.feedback import prompt_states
from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.feedback.prompt_states import PromptStates, SeenTexts

PROMPT = torch.randint(2, 64, (9,), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(2, 64, (7,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=3)


def assistant_of(target, **config) -> OnlineAssistant:
    """It keeps all that it is taught, exactly, and drafts in every round."""
    settings = {
        "update_interval": 10**6,
        "gate": False,
        "learning_rate": 1e-3,
        "learning_budget": 1.0,
        "top_k": 64,
        "feedback_dtype": "float32",
        "lookahead": "constant",
    }
    return OnlineAssistant(config.pop("draft", None) or grow_draft(target), **settings | config)


def serve(target, assistant, prompt, **kwargs) -> torch.Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False}
    return target.generate(prompt[None], assistant_model=assistant, **settings | kwargs)[0]


def taught(assistant) -> list[Feedback]:
    assistant.collect()
    return assistant.buffer.new()


def check_rows(target, feedback: Feedback, count: int, start: int = 0):
    """The last `count` tokens of the prompt have the target's own distributions, by a fresh forward over what is read from `start` on."""
    prompt = feedback.tokens[start : feedback.prompt_length].long()
    with torch.no_grad():
        logits = target(prompt[None], use_cache=False).logits[0, -1 - count : -1]
    expected = SparseLogits.from_logits(logits, feedback.top_ids.shape[1], torch.float32)
    assert len(feedback.prompt_rows) == count
    by_id = [
        torch.zeros_like(logits).scatter(-1, rows.top_ids.long(), rows.top_logps)
        for rows in (expected, feedback.prompt_rows)
    ]
    torch.testing.assert_close(*by_id, atol=1e-4, rtol=1e-4)


def gpt2():
    """Its body is not called `model`, and its positions are learned ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, eos_token_id=1, bos_token_id=0)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"do_sample": True},
        {"repetition_penalty": 1.3},
        {"use_cache": True, "output_hidden_states": True, "return_dict_in_generate": True},
    ],
)
@pytest.mark.parametrize("lookahead", ["constant", "cost"])
def test_a_prompt_teaches_what_the_target_would_have_said_of_it(target, family, kwargs, lookahead):
    model = target if family == "llama" else gpt2()
    assistant = assistant_of(model, lookahead=lookahead)
    settings = {"max_new_tokens": 8, "do_sample": False}
    model.generate(PROMPT[None], assistant_model=assistant, **settings | kwargs)
    [feedback] = taught(assistant)
    check_rows(model, feedback, len(PROMPT) - 1)


def test_it_costs_the_target_no_forward_and_changes_no_output(target):
    forwards, outputs = [], []
    for positions in (0, 256):
        count = []
        handle = target.register_forward_hook(lambda *_, count=count: count.append(1))
        assistant = assistant_of(target, prompt_positions=positions)
        try:
            outputs.append(serve(target, assistant, PROMPT))
            [feedback] = taught(assistant)
        finally:
            handle.remove()
        forwards.append(len(count) - assistant.stats.total.verification_forwards)
        assert (feedback.prompt_rows is None) == (positions == 0)
    assert forwards[0] == forwards[1] > 0
    assert torch.equal(*outputs)


def test_the_last_positions_of_a_long_prompt_teach(target):
    assistant = assistant_of(target, prompt_positions=3)
    serve(target, assistant, PROMPT)
    check_rows(target, taught(assistant)[0], 3)


def test_a_follow_up_teaches_what_is_new_in_it(target):
    assistant = assistant_of(target)
    said = serve(target, assistant, PROMPT)
    serve(target, assistant, torch.cat([said, OTHER]))
    serve(target, assistant, PROMPT)
    first, second, again = taught(assistant)
    check_rows(target, first, len(PROMPT) - 1)
    check_rows(target, second, len(OTHER))
    assert again.prompt_rows is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_teaches_nothing(target, side):
    assistant, padding = assistant_of(target), torch.ones(3, dtype=torch.long)
    parts, masks = [padding, PROMPT], [torch.zeros(3, dtype=torch.long), torch.ones_like(PROMPT)]
    if side == "right":
        parts, masks = parts[::-1], masks[::-1]
    serve(target, assistant, torch.cat(parts), attention_mask=torch.cat(masks)[None])
    [feedback] = taught(assistant)
    if side == "left":
        check_rows(target, feedback, len(PROMPT) - 1)
    else:  # generate reads the padding after the prompt, and so what it says follows from that
        assert feedback.prompt_rows is None


def test_a_target_that_caps_its_logits_teaches_by_its_answers(caplog):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(
            Gemma2Config(vocab_size=64, **sizes, final_logit_softcapping=1.0, initializer_range=0.3)
        ).eval()
    assistant = assistant_of(model)
    for prompt in (PROMPT, OTHER):
        serve(model, assistant, prompt)
    assert [(feedback.prompt_rows, len(feedback) > 0) for feedback in taught(assistant)] == [(None, True)] * 2
    assert sum("prompts teach nothing" in message for message in caplog.messages) == 1


def test_heads_that_differ_by_padding_keep_what_both_have(tiny_llama):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")
    model = tiny_llama(vocab=80)
    assistant = assistant_of(model, draft=tiny_llama(vocab=64, layers=1))
    serve(model, assistant, PROMPT, tokenizer=words, assistant_tokenizer=words)
    [feedback] = taught(assistant)
    assert feedback.prompt_rows.top_ids.shape == (len(PROMPT) - 1, 64)
    assert feedback.prompt_rows.top_ids.max() < 64
    assistant.flush()
    assert assistant.stats.updates == 1


def test_a_target_that_drafts_for_itself_is_not_mistaken_for_the_draft(target):
    assistant = assistant_of(target, draft=target)
    serve(target, assistant, PROMPT)
    [feedback] = taught(assistant)
    if feedback.prompt_rows is not None:
        check_rows(target, feedback, len(PROMPT) - 1)


def test_nothing_listens_to_a_target_any_longer_than_it_must(target):
    def broken(input_ids, scores):
        raise RuntimeError("stop")

    body = target.base_model
    serve(target, assistant_of(target, learn="off"), PROMPT)
    serve(target, assistant_of(target).private(), PROMPT)
    assert not body._forward_hooks
    assistant = assistant_of(target)
    with pytest.raises(RuntimeError, match="stop"):
        serve(target, assistant, PROMPT, logits_processor=LogitsProcessorList([broken]))
    assert not body._forward_hooks, "the forward was over"

    handle = body.register_forward_pre_hook(lambda *_: broken(None, None))
    try:
        with pytest.raises(RuntimeError, match="stop"):
            serve(target, assistant, PROMPT)
    finally:
        handle.remove()
    assert taught(assistant) == []
    assert not body._forward_hooks, "the forward never was"


def test_each_thread_hears_its_own_forward(target):
    prefill = PromptStates(target, 256)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        pool.submit(target, OTHER[None]).result()
        logits = target(PROMPT[None]).logits[0]
    prefill.finish_prefill(0, logits[-1])
    rows = prefill.rows(256, 64, torch.float32)
    assert len(rows) == len(PROMPT) - 1
    assert torch.equal(rows.top_ids[:, 0], logits[:-1].argmax(-1).int())


def test_many_threads_teach_by_their_own_prompts(target):
    assistant, barrier = assistant_of(target), threading.Barrier(4)
    prompts = torch.randint(2, 64, (4, 8), generator=torch.Generator().manual_seed(3))

    def one(prompt):
        barrier.wait(timeout=60)
        serve(target, assistant, prompt)
        assistant.collect()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, prompts))
    requests = taught(assistant)
    assert len(requests) == 4
    for feedback in requests:
        check_rows(target, feedback, 7)


def test_a_head_that_fails_costs_the_prompt_alone(target, monkeypatch, caplog):
    assistant = assistant_of(target)
    serve(target, assistant, PROMPT)
    monkeypatch.setattr(PromptStates, "_logits", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    [feedback] = taught(assistant)
    assert feedback.prompt_rows is None
    assert len(feedback) == 8
    assert "teaches by its answer alone" in caplog.text


def test_once_a_head_was_found_to_match_no_pass_is_made_for_that_alone(tiny_llama):
    """The first call compares one position alone, later ones along with the others; and a target that begins to scale its logits is noticed."""
    model = tiny_llama(layers=3)
    assistant, passed, original = assistant_of(model), [], PromptStates._logits

    def logits(self, states):
        passed.append(len(states))
        return original(self, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptStates, "_logits", logits)
        for prompt in (PROMPT, OTHER):
            serve(model, assistant, prompt)
            [*_, feedback] = taught(assistant)
            check_rows(model, feedback, len(prompt) - 1)
        assert passed == [1, len(PROMPT) - 1, len(OTHER)]
        handle = model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits / 2))
        try:
            for prompt in (PROMPT.flip(0), OTHER.flip(0)):
                serve(model, assistant, prompt)
                assert taught(assistant)[-1].prompt_rows is None
        finally:
            handle.remove()
        assert passed[3:] == [len(PROMPT), 1]


@pytest.mark.parametrize("rows", [2, 3, 5, 64])
def test_a_prompt_teaches_the_same_in_parts(target, monkeypatch, rows):
    monkeypatch.setattr(prompt_states, "_ROWS_AT_ONCE", rows)
    monkeypatch.setattr(prompt_states, "_ROWS_REDUCED", max(rows // 2, 1))
    assistant = assistant_of(target)
    serve(target, assistant, PROMPT)
    [feedback] = taught(assistant)
    check_rows(target, feedback, len(PROMPT) - 1)


@pytest.mark.parametrize(
    "how", ["compiled forward", "compiled call", "one part", "no head", "tensor parallel", "ZeRO-3", "offloaded"]
)
def test_targets_whose_states_cannot_be_had_are_known(tiny_llama, how, monkeypatch):
    model = tiny_llama()
    assert PromptStates.can_capture(model)
    if how == "compiled forward":
        model.forward = torch.compile(model.forward)  # not run
    elif how == "compiled call":
        model.compile()
    elif how == "one part":
        monkeypatch.setattr(type(model), "base_model_prefix", "")
    elif how == "no head":
        monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    elif how == "tensor parallel":
        model._tp_size = 2
    elif how == "ZeRO-3":
        model.lm_head.weight.ds_id = 0
    else:
        model.lm_head.to("meta")
    assert not PromptStates.can_capture(model)


def test_recorded_prompts_have_all_their_rows(target):
    prompts = [PROMPT, OTHER, PROMPT[:4]]
    for feedback, prompt in zip(
        record_answers(target, prompts, 5, top_k=64, dtype=torch.float32, prompt_positions=256), prompts, strict=True
    ):
        check_rows(target, feedback, len(prompt) - 1)
    assert all(len(f.prompt_rows) == 3 for f in record_answers(target, prompts, 5, prompt_positions=3))
    assert all(f.prompt_rows is None for f in record_answers(target, prompts, 5))
    assert not target.base_model._forward_hooks


def test_more_is_learnt_of_requests_whose_prompts_teach(target):
    learnt = {}
    for positions in (0, 256):
        assistant = assistant_of(target, prompt_positions=positions, replay_ratio=0.0)
        serve(target, assistant, PROMPT)
        assistant.flush()
        assert assistant.stats.updates == 1
        learnt[positions] = assistant.stats.learned_tokens
    assert learnt[256] == learnt[0] + len(PROMPT) - 1


texts = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=4)


@given(known=texts, prompt=st.lists(st.integers(0, 2), max_size=6))
def test_what_a_prompt_shares_is_its_longest_known_beginning(known, prompt):
    memory = SeenTexts()
    for text in known:
        memory.add(torch.tensor(text, dtype=torch.int32))
    longest = max(
        (n for text in known for n in range(len(prompt) + 1) if text[:n] == prompt[:n] and len(text) >= n), default=0
    )
    assert memory.shared_prefix(torch.tensor(prompt, dtype=torch.int32)) == longest


def test_texts_are_forgotten_in_turn():
    memory = SeenTexts()
    for i in range(40):
        memory.add(torch.tensor([i, 0]))
    assert memory.shared_prefix(torch.tensor([39, 0])) == 2
    assert memory.shared_prefix(torch.tensor([0, 0])) == 0
