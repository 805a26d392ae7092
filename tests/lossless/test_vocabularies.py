"""Drafts of another vocabulary: padded heads, and other tokenizers. The target's output, feedback in the draft's own tokens, a draft that
stays whole."""

import itertools

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_osd import OnlineAssistant, record_answers
from hf_osd.drafting.vocab_mapping import VocabMapping
from hf_osd.feedback.feedback import UNTESTED

from .checks import SERVES_AT_ONCE

PROMPTS = [torch.randint(2, 60, (1, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
GREEDY = {"max_new_tokens": 20, "do_sample": False}
CONSTANT = {
    "lookahead": "constant",
    "num_assistant_tokens": 3,
    "top_k": 1000,
    "feedback_dtype": "float32",
} | SERVES_AT_ONCE


def tokenizer_of(words, split=None):
    """A token a word; with `split`, a token a match of it inside the words."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if split is not None:
        within = pre_tokenizers.Split(Regex(split), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), within])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(62))]


def renamed(model, rows):
    """`model` over other ids: row i of the result's embeddings and head is row `rows[i]` of the model's."""
    config = type(model.config)(**{**model.config.to_dict(), "vocab_size": len(rows)})
    copy = type(model)(config).eval()
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][rows]
    copy.load_state_dict(state)
    return copy


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=2, eos_token_id=None)


def pair(kind, target, tiny_llama):
    """Target, draft, their tokenizers. Each draft is its target, with ids renamed, lost or added."""
    words = tokenizer_of(WORDS)
    if kind == "draft has fewer rows":
        return tiny_llama(layers=2, vocab=72, eos_token_id=None), None, words, words
    if kind == "draft has more rows":
        return target, renamed(target, [*range(64), *range(8)]), words, words
    order = [1, 0, *torch.randperm(62, generator=torch.Generator().manual_seed(1)).add(2).tolist()]
    lost = order[:50]  # 14 of the target's words are none of the draft's
    return target, renamed(target, lost), words, tokenizer_of([WORDS[i] for i in lost])


KINDS = ["draft has fewer rows", "draft has more rows", "another tokenizer"]


def made(kind, target, tiny_llama):
    target, draft, *tokenizers = pair(kind, target, tiny_llama)
    draft = draft if draft is not None else renamed(target, list(range(64)))
    return target, draft, dict(zip(("tokenizer", "assistant_tokenizer"), tokenizers, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_output_is_the_targets_own_while_the_draft_learns(kind, target, tiny_llama, noised_copy):
    target, draft, tokenizers = made(kind, target, tiny_llama)
    assistant = OnlineAssistant(noised_copy(draft, 0.1), update_interval=2, learning_rate=1e-3, **CONSTANT)
    for prompt in PROMPTS:
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **tokenizers, **GREEDY))
    stats = assistant.stats
    assert 0 < stats.total.accepted < stats.total.tested
    assert (stats.updates, stats.failed_updates) == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_is_its_target_renamed_is_accepted_wherever_it_has_the_word(kind, target, tiny_llama):
    target, draft, tokenizers = made(kind, target, tiny_llama)
    assistant = OnlineAssistant(draft, update_interval=10**6, **CONSTANT)
    shared = set(assistant._make_mapping(target.config.vocab_size, tuple(tokenizers.values())).shared[0].tolist())
    seen = {True: 0, False: 0}
    for prompt in PROMPTS:
        # The whole text in words of both: until then, and from then on, the draft has read something else than the target.
        known = torch.tensor([[i if i in shared else min(shared) for i in prompt[0].tolist()]])
        output = target.generate(known, assistant_model=assistant, **tokenizers, **GREEDY)
        assistant.update()
        feedback, answer = assistant.buffer.new()[-1], output[0, known.shape[1] :].tolist()
        assert len(feedback) == len(answer)  # a word is one token in either
        until = next((i for i, token in enumerate(answer) if token not in shared), len(answer))
        tested = feedback.outcome[:until] != UNTESTED
        assert (feedback.drafted[:until][tested] == feedback.answer[:until][tested]).all()
        if until < len(answer):
            assert feedback.overlap[until] == 0.0 or feedback.overlap[until].isnan()
        seen[until == len(answer)] += int(tested.sum())
    assert sum(seen.values()) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_feedback_is_the_targets_word_in_the_drafts_tokens(kind, target, tiny_llama, noised_copy):
    target, draft, tokenizers = made(kind, target, tiny_llama)
    assistant = OnlineAssistant(noised_copy(draft, 0.1), update_interval=10**6, **CONSTANT)
    mapping = assistant._make_mapping(target.config.vocab_size, tuple(tokenizers.values()))
    ours, theirs = mapping.shared
    for prompt in PROMPTS[:3]:
        output = target.generate(prompt, assistant_model=assistant, **tokenizers, **GREEDY)
        assistant.update()
        feedback = assistant.buffer.new()[-1]
        assert int(feedback.tokens.max()) < draft.config.vocab_size
        assert feedback.tokens.tolist() == [i for ids in mapping.to_draft_ids(output[0].tolist()) for i in ids]
        with torch.no_grad():
            log_p = target(output).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)  # (N, V)
        assert set(feedback.top_ids[0].tolist()) == set(theirs.tolist())
        dense = torch.full((len(feedback), draft.config.vocab_size), torch.nan)
        dense.scatter_(-1, feedback.top_ids.long(), feedback.top_logps)
        torch.testing.assert_close(dense[:, theirs], log_p[:, ours], atol=1e-4, rtol=1e-4)
        # All that the target says in words of its own is tail.
        mass = 1 - log_p[:, ours].exp().sum(-1)
        torch.testing.assert_close(feedback.tail_logp.exp(), mass.clamp_min(1.2e-7), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_raises_alpha(kind, target, tiny_llama, noised_copy):
    target, draft, tokenizers = made(kind, target, tiny_llama)
    assistant = OnlineAssistant(noised_copy(draft, 0.4), update_interval=4, learning_rate=5e-3, seed=0, **CONSTANT)

    def alpha_of_a_pass():
        before = assistant.stats.total
        was = before.overlap_sum, before.overlap_count
        for prompt in PROMPTS[:4]:
            target.generate(prompt, assistant_model=assistant, **tokenizers, **GREEDY)
        assistant.flush()
        now = assistant.stats.total
        return (now.overlap_sum - was[0]) / (now.overlap_count - was[1])

    first = alpha_of_a_pass()
    for _ in range(6):
        last = alpha_of_a_pass()
    assert assistant.stats.failed_updates == 0
    assert last > first + 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_draft_stays_whole_and_can_be_saved(kind, sampled, target, tiny_llama, tmp_path):
    """Stock sampled universal decoding prunes the draft's head and wraps its embeddings for good."""
    target, draft, tokenizers = made(kind, target, tiny_llama)
    draft.generation_config.repetition_penalty = 1.0
    assistant = OnlineAssistant(draft, update_interval=2, learning_rate=1e-3, **CONSTANT)
    torch.manual_seed(0)
    for prompt in PROMPTS[:4]:
        target.generate(
            prompt,
            assistant_model=assistant,
            max_new_tokens=12,
            do_sample=sampled,
            repetition_penalty=1.2,
            **tokenizers,
        )
    assistant.flush()
    served = assistant.serving.active
    assert served.get_output_embeddings().weight.shape == served.get_input_embeddings().weight.shape
    assert served.get_output_embeddings().weight.shape[0] == draft.config.vocab_size == served.config.vocab_size
    assert served.generation_config.repetition_penalty == 1.0
    assistant.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, served(ids).logits)


def spelling(tiny_llama):
    """A target that says "ab", and a draft that spells a-b: the draft, both vocabularies, both tokenizers."""
    letters = list("cdefgh")
    words = ["<unk>", "</s>", *letters, *("".join(two) for two in itertools.product("ab", letters))]
    spelled = ["</s>", "<unk>", "b", "a", *reversed(letters)]
    tokenizers = {"tokenizer": tokenizer_of(words), "assistant_tokenizer": tokenizer_of(spelled, split=".")}
    target, draft = (
        tiny_llama(vocab=len(words), eos_token_id=None),
        tiny_llama(layers=1, vocab=len(spelled), seed=3),
    )
    return target, draft, tokenizers, words, spelled


def test_a_word_of_several_tokens_has_one_target_and_is_read_whole(tiny_llama):
    """The row that predicts "ab" belongs to the a, and the b has none."""
    target, draft, tokenizers, words, spelled = spelling(tiny_llama)
    letters = words[2:8]
    assistant = OnlineAssistant(draft, update_interval=2, learning_rate=5e-3, **CONSTANT)
    pieces = 0
    for seed in range(4):
        prompt = torch.randint(2, len(words), (1, 5), generator=torch.Generator().manual_seed(seed))
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **tokenizers, **GREEDY))
        assistant.collect()
        feedback = assistant.buffer.new()[-1]
        said = [[words[i]] if words[i] in spelled else list(words[i]) for i in plain[0].tolist()]
        assert [spelled[i] for i in feedback.tokens.tolist()] == [piece for word in said for piece in word]
        first = torch.tensor([i == 0 for word in said[prompt.shape[1] :] for i in range(len(word))])
        assert torch.equal(feedback.teaching_mask("all"), first)
        assert (feedback.outcome[~first] == UNTESTED).all()
        assert feedback.overlap[~first].isnan().all()
        with torch.no_grad():
            log_p = target(plain).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        own = [words.index(letter) for letter in letters]
        theirs = [spelled.index(letter) for letter in letters]
        dense = torch.full((int(first.sum()), len(spelled)), torch.nan)
        dense.scatter_(-1, feedback.top_ids[first].long(), feedback.top_logps[first])
        torch.testing.assert_close(dense[:, theirs], log_p[:, own], atol=1e-4, rtol=1e-4)
        pieces += int((~first).sum())
    assert pieces > 10
    assistant.flush()
    assert (assistant.stats.updates > 0, assistant.stats.failed_updates) == (True, 0)


@pytest.mark.parametrize("kind", [*KINDS, "words of several tokens"])
def test_recorded_answers_are_what_a_call_keeps(kind, target, tiny_llama):
    """Held-back and warm-up answers in batches, beside live calls whose draft does not change: what is scored of one was seen of the other."""
    if kind == "words of several tokens":
        target, draft, tokenizers, words, _ = spelling(tiny_llama)
    else:
        (target, draft, tokenizers), words = made(kind, target, tiny_llama), WORDS
    prompts = [p[:, : 3 + i].clamp_max(len(words) - 1) for i, p in enumerate(PROMPTS[:4])]
    assistant = OnlineAssistant(draft, update_interval=10**6, prompt_positions=4, **CONSTANT)
    for prompt in prompts:
        target.generate(prompt, assistant_model=assistant, **tokenizers, **GREEDY)
    assistant.collect()
    kept = assistant.buffer.new()
    recorded = record_answers(
        target,
        [prompt[0] for prompt in prompts],
        GREEDY["max_new_tokens"],
        top_k=CONSTANT["top_k"],
        dtype=torch.float32,
        prompt_positions=4,
        translation=VocabMapping.from_models(target, assistant, *tokenizers.values()),
    )
    for one, live, alpha in zip(recorded, kept, assistant.score(recorded), strict=True):
        assert one.tokens.tolist() == live.tokens.tolist()
        assert one.prompt_length == live.prompt_length
        taught = live.teaching_mask("all")
        assert torch.equal(one.teaching_mask("all"), taught)
        columns = live.top_ids[taught].sort().indices  # of likely equals any may come first
        for name in ("top_ids", "top_logps"):
            ours = getattr(one, name)[taught].gather(-1, one.top_ids[taught].sort().indices)
            torch.testing.assert_close(ours, getattr(live, name)[taught].gather(-1, columns), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.tail_logp, live.tail_logp, atol=1e-3, rtol=1e-3, equal_nan=True)
        assert (one.prompt_rows is None) == (live.prompt_rows is None) == (kind not in KINDS[:2])
        if one.prompt_rows is not None:
            new = live.prompt_rows  # those of a template are known already
            torch.testing.assert_close(one.with_prompt_rows(len(new)).prompt_rows.tail_logp, new.tail_logp)
        known = ~live.overlap.isnan()
        assert known.any()
        # A bound from below: where the draft's likeliest word is none of the target's, a call takes the next one.
        assert (alpha[known] <= live.overlap[known]).all()
        assert kind == "words of several tokens" or torch.equal(alpha[known], live.overlap[known])


def test_models_of_two_sizes_need_both_tokenizers(target, tiny_llama):
    with pytest.raises(ValueError, match=r"64 tokens, the draft 72, and `assistant_tokenizer` is None"):
        VocabMapping.from_models(target, tiny_llama(vocab=72), tokenizer_of(WORDS))
    assert VocabMapping.from_models(target, target).is_identity


@pytest.mark.parametrize("kind", ["draft has fewer rows", "another tokenizer"])
def test_sampling_is_exact(kind, tiny_llama, noised_copy):
    """χ² of the first two tokens over 1,500 calls."""
    words = ["<unk>", "</s>", *"cdefgh"]
    target = tiny_llama(layers=1, vocab=8, eos_token_id=None)
    kept = list(range(6)) if kind == "draft has fewer rows" else [1, 7, 4, 2, 0]
    other = tokenizer_of(words if kind == "draft has fewer rows" else [words[i] for i in kept])
    draft = noised_copy(renamed(target, kept), 0.4)
    tokenizers = {"tokenizer": tokenizer_of(words), "assistant_tokenizer": other}
    assistant = OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=2, learn=False)
    prompt = torch.tensor([[2, 5, 3]])
    with torch.no_grad():
        first = target(prompt).logits[0, -1].softmax(-1)
        second = target(torch.stack([torch.cat([prompt[0], torch.tensor([a])]) for a in range(8)])).logits[:, -1]
    expected = (first[:, None] * second.softmax(-1)).flatten()
    counts, calls = torch.zeros(64), 1500
    torch.manual_seed(0)
    for _ in range(calls):
        a, b = target.generate(
            prompt, assistant_model=assistant, max_new_tokens=2, do_sample=True, top_k=0, **tokenizers
        )[0, 3:].tolist()
        counts[8 * a + b] += 1
    total = assistant.stats.total
    assert 0 < total.accepted < total.tested
    often = expected * calls >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    due = torch.cat([expected[often], expected[~often].sum()[None]]) * calls
    chi2, freedom = ((seen - due) ** 2 / due).sum(), len(due) - 1
    assert torch.special.gammaincc(torch.tensor(freedom / 2), chi2 / 2) > 1e-4


def test_tokenizers_without_a_common_token_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"share no token.*grow_draft"):
        tiny_llama(vocab=5).generate(
            PROMPTS[0].clamp_max(4),
            assistant_model=OnlineAssistant(tiny_llama(vocab=4)),
            tokenizer=_bare("a b c d e"),
            assistant_tokenizer=_bare("f g h i"),
            **GREEDY,
        )


def _bare(words):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words.split())}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_two_tokenizers_of_one_size_are_refused_by_transformers(target):
    """It takes equal sizes for one tokenizer, and refuses the second one that it is given."""
    shuffled = tokenizer_of([*WORDS[:2], *reversed(WORDS[2:])])
    with pytest.raises(ValueError, match="`assistant_tokenizer` is not required"):
        target.generate(
            PROMPTS[0],
            assistant_model=OnlineAssistant(target),
            tokenizer=tokenizer_of(WORDS),
            assistant_tokenizer=shuffled,
            **GREEDY,
        )
