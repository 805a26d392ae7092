"""What is refused: each error names the thing, its value and the mend, and nothing has run by then."""

import copy
import gc

import accelerate
import peft
import pytest
import torch
import transformers

from hf_osd import OnlineAssistant, grow_draft, grow_feature_draft
from hf_osd.generation import checks
from hf_osd.generation.checks import doubt_of_target
from hf_osd.generation.recorder import _warn_of_states

from ..served import GREEDY, PROMPTS


def test_bad_calls_are_refused_before_anything_runs(target, draft, tiny_llama):
    from transformers import DynamicCache

    assistant = OnlineAssistant(draft)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPTS[0], past_key_values=cache)
    cases = {
        r"batch has 2 prompts.*each prompt": {"inputs": torch.cat([PROMPTS[0], PROMPTS[1]])},
        r"`past_key_values` already holds 6 tokens.*crop\(-1\)": {"inputs": PROMPTS[0], "past_key_values": cache},
        r"[Ss]tatic": {"inputs": PROMPTS[0], "cache_implementation": "static"},
    }
    for message, kwargs in cases.items():
        with pytest.raises(ValueError, match=message):
            target.generate(assistant_model=assistant, **GREEDY, **kwargs)
    with pytest.raises(ValueError, match="tokenizer"):  # transformers' own check comes first
        target.generate(PROMPTS[0], assistant_model=OnlineAssistant(tiny_llama(vocab=80)), **GREEDY)
    assert assistant.stats.total.requests == 0
    assert not assistant.serving._leases


def test_what_would_change_the_output_is_refused(target, draft):
    assistant = OnlineAssistant(draft)
    for name, value in (("assistant_ensemble_weight", 0.5), ("guidance_scale", 1.5)):
        with pytest.raises(ValueError, match=rf"`{name}` is {value}.*Leave"):
            target.generate(PROMPTS[0], assistant_model=assistant, **{name: value}, **GREEDY)
    by_hand = [transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, target)]
    with pytest.raises(ValueError, match=r"`guidance_scale` is 2.0"):
        target.generate(PROMPTS[0], assistant_model=assistant, logits_processor=by_hand, **GREEDY)
    assert not assistant.serving._leases


def test_embeddings_need_their_tokens_beside_them(target, draft):
    embeds = target.get_input_embeddings()(PROMPTS[0]).detach()
    for tokens in (None, PROMPTS[0][:, :3]):
        with pytest.raises(ValueError, match=r"`inputs_embeds` holds 6 positions.*`input_ids`"):
            target.generate(tokens, inputs_embeds=embeds, assistant_model=OnlineAssistant(draft), **GREEDY)


def t5(vocab=64):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=vocab, **sizes, **special)).eval()


def test_encoder_decoder_drafts_are_for_encoder_decoder_targets(target):
    with pytest.raises(ValueError, match=r"draft is an encoder-decoder \(T5.*AutoModelForCausalLM"):
        target.generate(PROMPTS[0], assistant_model=OnlineAssistant(t5()), **GREEDY)


def test_an_encoder_of_the_drafts_own_needs_its_inputs():
    model = t5()
    encoded = model.get_encoder()(PROMPTS[0])
    with pytest.raises(ValueError, match=r"`encoder_outputs` came without.*`input_ids`"):
        model.generate(encoder_outputs=encoded, assistant_model=OnlineAssistant(model), **GREEDY)


def test_encoder_decoders_need_one_vocabulary():
    class Tokenizer:
        unk_token_id = pad_token_id = eos_token_id = None

        def get_vocab(self):
            return {}

    with pytest.raises(ValueError, match=r"encoder-decoder of 64 tokens and the draft has 80"):
        t5().generate(
            PROMPTS[0],
            assistant_model=OnlineAssistant(t5(80)),
            tokenizer=Tokenizer(),
            assistant_tokenizer=Tokenizer(),
            **GREEDY,
        )


def test_a_draft_that_cannot_draft_is_refused():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    headless = transformers.LlamaModel(transformers.LlamaConfig(**sizes, intermediate_size=64, num_attention_heads=4))
    for bad, message in (
        (headless, r"`draft` is a LlamaModel, which has no LM head.*AutoModelForCausalLM"),
        ("a name", r"`draft` is a str.*AutoModelForCausalLM"),
        (transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)), r"MambaForCausalLM, whose state"),
    ):
        with pytest.raises(ValueError, match=message):
            OnlineAssistant(bad)


def test_a_target_whose_embeddings_are_offloaded_is_refused_before_anything_runs(tiny_llama, draft):
    """transformers' assisted generation moves tokens to where its first weights are, which is nowhere."""
    accelerate.cpu_offload(target := tiny_llama(layers=3), execution_device="cpu")
    assistant = OnlineAssistant(draft)
    assert target.generate(PROMPTS[0], **GREEDY).shape[1] > PROMPTS[0].shape[1]
    with pytest.raises(
        ValueError, match=r"weights of the target \(LlamaForCausalLM\) are offloaded.*embeddings on a device"
    ):
        target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
    assert not assistant.serving._leases


def test_a_draft_made_for_another_target_of_the_same_sizes_is_served_with_a_warning(tiny_llama, caplog):
    target, other = (tiny_llama(layers=4, seed=seed) for seed in (0, 1))
    draft = grow_feature_draft(other)
    assistant = OnlineAssistant(draft)
    for _ in range(2):
        assert torch.equal(
            target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY), target.generate(PROMPTS[0], **GREEDY)
        )
    [warning] = [r.message for r in caplog.records if "made for another" in r.message]
    assert "load_feature_draft" in warning
    caplog.clear()
    rounded = copy.deepcopy(draft).bfloat16()  # as a checkpoint of another dtype is
    for own in (draft, rounded):
        other.generate(PROMPTS[0], assistant_model=OnlineAssistant(own), **GREEDY)
    assert not [r for r in caplog.records if "made for another" in r.message]


def test_an_adapter_on_a_feature_level_draft_is_refused(tiny_llama):
    draft = peft.get_peft_model(grow_feature_draft(tiny_llama(layers=4)), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"learns whole.*merge_and_unload"):
        OnlineAssistant(draft)
    OnlineAssistant(draft.merge_and_unload().requires_grad_(True))


@pytest.mark.parametrize("grow", [grow_draft, grow_feature_draft])
def test_no_draft_grows_from_what_is_no_model(grow):
    for bad in (None, "a-name"):
        with pytest.raises(ValueError, match=r"A model is needed.*AutoModelForCausalLM"):
            grow(bad)


def test_states_that_are_not_finite_are_named_once_and_not_kept(tiny_llama, caplog):
    target = copy.deepcopy(tiny_llama(layers=4))
    target.model.layers[1].register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([0]), torch.inf)
    )
    _warn_of_states.cache_clear()
    for do_sample in (False, True):
        asked = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": do_sample, "top_k": 0}
        assistant = OnlineAssistant(grow_feature_draft(target), suffix_cache=False, lookahead="constant")
        if not do_sample:
            ours = target.generate(PROMPTS[0], assistant_model=assistant, **asked)
            assert torch.equal(ours, target.generate(PROMPTS[0], **asked))
        assistant.update()
        assert all(request.states is None for request in assistant.buffer.requests())
    [warning] = [r for r in caplog.records if "not finite" in r.message]
    assert warning.levelname == "WARNING"


@pytest.fixture
def comparisons(monkeypatch):
    """What each comparison of embeddings found, in order."""
    found, are_alike = [], checks._are_alike
    monkeypatch.setattr(checks, "_are_alike", lambda *weights: found.append(are_alike(*weights)) or found[-1])
    return found


def written(weight, target):
    with torch.no_grad():
        weight.add_(1.0)


def moved(weight, target):
    weight.data = weight.detach() + 1.0


def loaded(weight, target):
    target.load_state_dict({name: tensor + 1.0 for name, tensor in target.state_dict().items()}, strict=False)


def assigned(weight, target):
    target.get_input_embeddings().weight = torch.nn.Parameter(weight.detach() + 1.0)


def trained(weight, target):
    weight.grad = -torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0).step()


@pytest.mark.parametrize("change", [written, moved, loaded, assigned, trained])
def test_a_pair_of_embeddings_is_compared_again_only_once_one_has_changed(tiny_llama, comparisons, change):
    target = tiny_llama(layers=4)
    draft = copy.deepcopy(grow_feature_draft(target))  # in storage of its own
    for _ in range(3):
        assert doubt_of_target(target, draft) is None
    assert comparisons == [True]
    change(target.get_input_embeddings().weight, target)
    for _ in range(3):
        assert "embeddings are not those of the target" in doubt_of_target(target, draft)
    assert comparisons == [True, False]
    other = copy.deepcopy(target)
    assert "embeddings are not those of the target" in doubt_of_target(other, draft)
    assert len(comparisons) == 3
    with torch.no_grad():
        draft.get_input_embeddings().weight.copy_(target.get_input_embeddings().weight)
    assert doubt_of_target(target, draft) is doubt_of_target(other, draft) is None
    assert len(comparisons) == 5


def train_fused(weight):
    weight.grad = -torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1.0, fused=True).step()


@pytest.mark.parametrize("write", [train_fused, lambda weight: weight.data.add_(1.0)])
def test_writes_that_torch_does_not_count_are_noticed_in_time(tiny_llama, comparisons, write):
    target = tiny_llama(layers=4)
    draft = copy.deepcopy(grow_feature_draft(target))
    assert doubt_of_target(target, draft) is None
    write(target.get_input_embeddings().weight)
    assert any(doubt_of_target(target, draft) for _ in range(checks._COMPARE_EVERY))
    assert comparisons == [True, False]


def test_embeddings_made_in_inference_mode_are_compared(tiny_llama, comparisons):
    target = tiny_llama(layers=4)
    draft = copy.deepcopy(grow_feature_draft(target))
    with torch.inference_mode():
        weight = torch.nn.Parameter(target.get_input_embeddings().weight.clone(), requires_grad=False)
        target.get_input_embeddings().weight = weight
    assert doubt_of_target(target, draft) is doubt_of_target(target, draft) is None
    assert comparisons == [True]


def test_comparing_keeps_no_model_alive(tiny_llama):
    target = tiny_llama(layers=4)
    draft = copy.deepcopy(grow_feature_draft(target))
    doubt_of_target(target, draft)
    embeddings = target.get_input_embeddings()
    assert len(checks._compared[embeddings]) == 1
    del draft
    gc.collect()
    assert len(checks._compared[embeddings]) == 0
    before = len(checks._compared)
    del target, embeddings
    gc.collect()
    assert len(checks._compared) < before
