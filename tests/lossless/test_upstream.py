"""transformers' own cases of assisted generation, in our words, with an OnlineAssistant as the assistant (upstream: tests/generation/test_utils.py
and test_candidate_generator.py). What it never serves goes through the open seam untouched."""

import copy

import pytest
import torch
from transformers import BartForCausalLM, BartForConditionalGeneration, GenerationConfig, GPT2LMHeadModel
from transformers.generation import candidate_generator
from transformers.generation.utils import _speculative_sampling

import hf_osd
from hf_osd import OnlineAssistant

PROMPT = torch.tensor([[5, 9, 17, 3, 40]])
GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
ARCHITECTURES = ["Llama", "GPT2", "Gemma3", "T5", "Bart"]


def assist(draft, **config):
    return OnlineAssistant(draft, **{"lookahead": "constant", "num_assistant_tokens": 4, "seed": 0, **config})


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("draft_is", ["random", "same"])
def test_assisted_decoding_matches_greedy_search(tiny_model, name, draft_is):
    """With all that a dict return holds, as upstream compares it."""
    target = tiny_model(name)
    draft = target if draft_is == "same" else tiny_model(name, seed=1)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = target.generate(PROMPT, **asked)
    assisted = target.generate(PROMPT, assistant_model=assist(draft), **asked)
    assert torch.equal(plain.sequences, assisted.sequences)
    for field in ("scores", "logits"):
        torch.testing.assert_close(assisted[field], plain[field], atol=1e-4, rtol=1e-4)
    assert set(assisted.keys()) == set(plain.keys())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_assisted_decoding_sample(tiny_model, name):
    target = tiny_model(name)
    torch.manual_seed(0)
    output = target.generate(PROMPT, **{**GREEDY, "do_sample": True}, assistant_model=assist(tiny_model(name, seed=1)))
    start = 1 if target.config.is_encoder_decoder else PROMPT.shape[1]
    assert output.shape == (1, start + 16)
    if not target.config.is_encoder_decoder:
        assert torch.equal(output[:, :start], PROMPT)


@pytest.mark.parametrize(
    "limit", [{"max_new_tokens": 10}, {"max_length": 15}, {"min_new_tokens": 7, "max_new_tokens": 10}]
)
def test_generated_length(tiny_model, limit):
    target = tiny_model("Llama")
    eos = int(target.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] + 2])
    for ids in (None, eos):
        asked = {"do_sample": False, "pad_token_id": 0, "eos_token_id": ids, **limit}
        plain = target.generate(PROMPT, **asked)
        assert torch.equal(plain, target.generate(PROMPT, assistant_model=assist(target), **asked))
        if ids is None:
            assert plain.shape[1] == 15


def test_length_warnings_are_those_of_plain_decoding(tiny_model, recwarn):
    """A draft that generates by itself would warn of lengths that are not the user's."""
    target = tiny_model("Llama")
    asked = {"min_length": 10, "max_length": 20, "do_sample": False, "pad_token_id": 0}
    target.generate(PROMPT, **asked)
    plain = [str(warning.message) for warning in recwarn]
    recwarn.clear()
    target.generate(PROMPT, assistant_model=assist(tiny_model("Llama", seed=1)), **asked)
    assert [str(warning.message) for warning in recwarn] == plain


class Twisted:
    """Over a model: an argument that it does not have by itself, and that changes all it says."""

    def forward(self, *args, twist=False, **kwargs):
        output = super().forward(*args, **kwargs)
        if twist:
            output.logits = output.logits.flip(-1)
        return output


class Twisting(Twisted, GPT2LMHeadModel):
    def prepare_inputs_for_generation(self, *args, twist=False, **kwargs):
        return {**super().prepare_inputs_for_generation(*args, **kwargs), "twist": twist}


class TwistingBart(Twisted, BartForConditionalGeneration):
    def prepare_inputs_for_generation(self, *args, twist=False, encoder_outputs=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, encoder_outputs=encoder_outputs, **kwargs)
        return {**inputs, "twist": twist}


def of_class(kind, model):
    made = kind(copy.deepcopy(model.config)).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize(("name", "kind"), [("GPT2", Twisting), ("Bart", TwistingBart)])
def test_model_kwargs_reach_the_target(tiny_model, name, kind):
    target, draft = of_class(kind, tiny_model(name)), tiny_model(name, seed=1)
    untwisted = target.generate(PROMPT, **GREEDY)
    twisted = target.generate(PROMPT, twist=True, **GREEDY)
    assert not torch.equal(untwisted, twisted)
    for assistant in (assist(draft), assist(target)):  # one that knows the argument, too
        assert torch.equal(twisted, target.generate(PROMPT, twist=True, assistant_model=assistant, **GREEDY))


def test_token_type_ids(tiny_model):
    """Of the prompt's length, and longer by each new token."""
    target, assistant = tiny_model("GPT2"), assist(tiny_model("GPT2", seed=1))
    types = torch.tensor([[3, 3, 4, 4, 3]])
    plain = target.generate(PROMPT, token_type_ids=types, **GREEDY)
    assert not torch.equal(plain, target.generate(PROMPT, **GREEDY))
    assert torch.equal(plain, target.generate(PROMPT, token_type_ids=types, assistant_model=assistant, **GREEDY))


@pytest.mark.parametrize("given", ["tokens", "encoder outputs"])
def test_encoder_decoder_shared_encoder(tiny_model, given):
    target = of_class(TwistingBart, tiny_model("Bart"))
    decoder = BartForCausalLM(copy.deepcopy(target.config)).eval()
    asked = {"twist": True, **GREEDY}
    if given == "tokens":
        asked["inputs"] = PROMPT
    else:
        asked["encoder_outputs"] = target.get_encoder()(PROMPT)
    plain = target.generate(**asked)
    assert torch.equal(plain, target.generate(assistant_model=assist(decoder), **asked))


@pytest.mark.parametrize("schedule", ["heuristic", "heuristic_transient", "constant"])
def test_schedules_of_the_drafts_own_config_are_left_as_they_are(tiny_model, schedule):
    """Stock writes the length it ended with back into the draft's generation config."""
    target, draft = tiny_model("Llama"), tiny_model("Llama", seed=1)
    draft.generation_config = GenerationConfig(num_assistant_tokens=7, num_assistant_tokens_schedule=schedule)
    assistant = assist(draft)
    plain = target.generate(PROMPT, **GREEDY)
    for _ in range(2):
        assert torch.equal(plain, target.generate(PROMPT, assistant_model=assistant, **GREEDY))
    for config in (draft.generation_config, assistant.generation_config):
        assert (config.num_assistant_tokens, config.num_assistant_tokens_schedule) == (7, schedule)


def test_our_heuristic_schedule_follows_upstreams_rule(tiny_model):
    """-1 after a rejection, down to 1; +2 after a block accepted whole, up to what the config allows."""
    target, other = tiny_model("Llama"), tiny_model("Llama", seed=1)
    draft = copy.deepcopy(target)
    assistant = assist(draft, lookahead="heuristic", num_assistant_tokens=4)
    lengths, choose = [], assistant.lookahead.plan

    def plan(*proposal, **can):
        lengths.append((chosen := choose(*proposal, **can)).length)
        return chosen

    assistant.lookahead.plan = plan
    other.generate(PROMPT, assistant_model=assistant, **GREEDY)  # says other things than the draft
    assert lengths[:6] == [4, 3, 2, 1, 1, 1]
    lengths.clear()
    target.generate(PROMPT, assistant_model=assistant, **GREEDY)
    assert lengths[:4] == [1, 3, 4, 4]


def test_speculative_sampling():
    """Upstream's own case: with these probabilities tokens 1 and 4 are accepted, then one of 3 and 7 is drawn."""
    candidates = torch.tensor([[8, 0, 3, 9, 8, 1, 4, 5]])
    q = torch.full((1, 3, 10), -torch.inf)
    p = torch.full((1, 4, 10), -torch.inf)
    for j, token in enumerate((1, 4, 5)):
        q[0, j, token] = 10.0
    for j, tokens in enumerate(((1,), (4,), (3, 7), (8,))):
        p[0, j, list(tokens)] = 10.0
    said, matches = _speculative_sampling(candidates, q, 3, p)
    assert int(matches) == 2
    assert said[0, :2].tolist() == [1, 4]
    assert int(said[0, 2]) in (3, 7)


@pytest.mark.parametrize(
    ("kwargs", "generator"),
    [
        ({"assistant_early_exit": 2}, "EarlyExitCandidateGenerator"),
        ({"prompt_lookup_num_tokens": 3}, "PromptLookupCandidateGenerator"),
        ({"assistant_model": "plain model"}, "AssistedCandidateGenerator"),
    ],
)
def test_what_is_not_ours_goes_through_untouched(tiny_model, monkeypatch, kwargs, generator):
    """The same generator makes the same rounds, with the seam open and closed."""
    target = tiny_model("Llama")
    if "assistant_model" in kwargs:
        kwargs = {"assistant_model": tiny_model("Llama", layers=1)}
    made = []
    kind = getattr(candidate_generator, generator)
    propose = kind.get_candidates

    def noting(self, input_ids, *args, **more):
        proposed = propose(self, input_ids, *args, **more)
        made.append((type(self).__name__, proposed[0].tolist()))
        return proposed

    monkeypatch.setattr(kind, "get_candidates", noting)
    seen = []
    for switch in (hf_osd.disable, hf_osd.enable):
        switch()
        made.clear()
        output = target.generate(PROMPT, **GREEDY, **kwargs)
        seen.append((output.tolist(), list(made)))
    assert seen[0] == seen[1]
    assert {name for name, _ in made} == {generator}
    assert seen[0][0] == target.generate(PROMPT, **GREEDY).tolist()
