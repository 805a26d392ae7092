"""Targets that cannot verify a block: each is found before it is trusted, decodes plainly and is named in one warning; and no sound one is taken for such."""

import contextlib
import copy
import gc
import logging

import pytest
import torch
import transformers
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, QuantizedCache
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.generation import verification
from hf_osd.policy.lookahead import Plan
from recipes.checks.recurrent import EXPERTS, FAMILIES, MAMBA, SIZES, random_model

from .models import OneLayer, one_layer

PROMPTS = torch.randint(3, 60, (2, 1, 7), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
DTYPES = [torch.float32, torch.bfloat16]


class Placed(OneLayer):
    """`OneLayer` with positions and, by `fault`, a way of its own to be wrong about several tokens, never about one."""

    fault = None

    def __init__(self, config):
        super().__init__(config)
        self.place = torch.nn.Embedding(256, config.hidden_size)
        self.soft = torch.nn.Embedding(2, config.hidden_size)
        self.fed, self.last = 0, None
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0, **_):
        fault, past, x = self.fault, past_key_values, self.embed(input_ids)  # (B, t, H)
        seen, t = past.get_seq_length(), x.shape[1]
        if not seen:
            self.fed, self.last = 0, torch.zeros_like(x[:, :1])
        places = torch.arange(seen, seen + t)
        if fault == "positions off by one after a crop" and self.fed > seen:
            places = places + 1
        self.fed, x = self.fed + t, x + self.place(places % 256)
        if fault == "states not cropped":  # a running mean, kept beside keys and values
            total = getattr(past, "total", 0) + x.cumsum(1)
            past.total = total[:, -1:]
            x = x + total / (places + 1)[:, None]
        if fault == "a convolution's window not cropped":
            shifted = torch.cat([self.last, x[:, :-1]], dim=1)
            self.last = x[:, -1:].clone()
            x = x + shifted
        added = 0
        if fault == "the prompt counted twice" and t > 1:
            x, added = torch.cat([self.soft.weight[None], x], dim=1), 2
        if fault == "several tokens refused" and t > 1 and seen:
            raise NotImplementedError("one token at a time")
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        k, v = past.update(k, v, 0)
        t, length = q.shape[2], k.shape[2]
        future = torch.full((t, length), -torch.inf, dtype=x.dtype).triu(length - t + 1)
        if fault == "the last row alone right" and seen:
            future = 0 * future.nan_to_num(neginf=0.0)
        y = ((q @ k.mT + future).softmax(-1) @ v)[:, 0]
        if fault == "two tokens at most" and seen:  # as experts with a capacity do
            y[:, 2:] = 0
        return CausalLMOutputWithPast(logits=self.head((x + y)[:, added:]), past_key_values=past)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        if self.fault == "the last token alone fed" and kwargs["past_key_values"].get_seq_length():
            return {"input_ids": input_ids[:, -1:], "past_key_values": kwargs["past_key_values"]}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Uncropped(DynamicCache):
    """Keeps what it is told to drop."""

    def crop(self, tokens_to_remove):
        pass


class Short(DynamicLayer):
    """Drops a token too few."""

    def crop(self, tokens_to_remove):
        super().crop(min(tokens_to_remove + 1, 0))


FAULTS = [
    "states not cropped",
    "the prompt counted twice",
    "positions off by one after a crop",
    "the last row alone right",
    "a convolution's window not cropped",
    "two tokens at most",
    "the last token alone fed",
    "several tokens refused",
]


def placed(fault=None, dtype=torch.float32, seed=0):
    plain = one_layer(vocab=64, hidden=32, scale=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Placed(copy.deepcopy(plain.config)).eval().to(dtype)
    model.fault = fault
    return model


def drafting(**config):
    """An assistant without a draft, whose suffix cache drafts from the second call of a prompt on."""
    return OnlineAssistant(lookahead="constant", **config)


def serve(target, assistant, caches=None, prompts=PROMPTS, **kwargs):
    """Whether each prompt's output, asked for twice, is that of the target alone; `caches()` makes one a call."""
    equal = []
    for prompt in prompts:
        for _ in range(2):
            given = [{} if caches is None else {"past_key_values": caches()} for _ in range(2)]
            asked = {"inputs": prompt, **GREEDY, **kwargs}
            plain = target.generate(**asked, **given[0])
            equal.append(torch.equal(plain, target.generate(**asked, **given[1], assistant_model=assistant)))
    return equal


def check_plain(target, caplog, why, caches=None, **kwargs):
    """Outputs are plain decoding's, nothing is drafted, and one warning says why."""
    assistant = drafting()
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert all(serve(target, assistant, caches, **kwargs))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_osd")]
    assert len(said) == 1
    assert why in said[0]
    assert type(target).__name__ in said[0] or kwargs
    assert assistant.stats.total.drafted == 0
    return assistant.stats.total


def check_drafted(target, caplog, **kwargs):
    """Outputs are plain decoding's, blocks are drafted, some of them in vain, and nothing is said."""
    assistant = drafting()
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert all(serve(target, assistant, **kwargs))
    assert not [record for record in caplog.records if record.name.startswith("hf_osd")]
    total = assistant.stats.total
    assert 0 < total.accepted < total.drafted
    assert total.plain_requests == 0
    return total


# Planted faults.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_target_is_found(caplog, fault, dtype):
    total = check_plain(placed(fault, dtype), caplog, "cannot verify a block")
    assert total.plain_requests == total.requests == 2 * len(PROMPTS)
    assert 0 < total.verification_forwards < 50


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["crop ignored", "crop one short"])
def test_a_fault_in_the_cache_is_found(caplog, kind, dtype):
    target = placed(dtype=dtype)

    def made():
        if kind == "crop ignored":
            return Uncropped(config=target.config)
        cache = DynamicCache(config=target.config)
        cache.layers = [Short()]
        return cache

    check_plain(target, caplog, "several tokens at once", made)
    caplog.clear()
    check_drafted(target, caplog)  # of this cache it was said, not of others


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_would_do_harm(fault):
    target = placed(fault)
    with contextlib.suppress(NotImplementedError, IndexError, RuntimeError):
        assert not all(serve(target, drafting(verify_target=False)))


def late(assistant, rounds=4):
    """`assistant`, but that it drafts nothing in the first rounds it is asked in."""
    plan, asked = assistant.lookahead.plan, []

    def wait(*args, **kwargs):
        asked.append(1)
        return Plan() if len(asked) <= rounds else plan(*args, **kwargs)

    assistant.lookahead.plan = wait
    return assistant


@pytest.fixture
def known(monkeypatch):
    """Targets of this file as though they were transformers' own: these are tried before the first block, others before the first token."""
    for kind in (Placed, Offset):
        monkeypatch.setattr(kind, "__module__", "transformers.models.placed")


def test_a_fault_found_in_mid_call_leaves_the_rest_of_it_plain(known, caplog):
    target, assistant = placed("states not cropped"), late(drafting())
    prompt = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])
    plain = target.generate(prompt, **GREEDY)
    assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **GREEDY))
    assistant.collect()
    total = copy.deepcopy(assistant.stats.total)
    assert (total.drafted, total.rounds, total.plain_requests) == (0, GREEDY["max_new_tokens"], 1)
    assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **GREEDY))
    assistant.collect()
    assert assistant.stats.total.plain_requests == 2
    assert assistant.stats.total.drafted == 0
    assert assistant.stats.total.verification_forwards == total.verification_forwards > 0
    assert len([record for record in caplog.records if "cannot verify" in record.getMessage()]) == 1


# What is left alone.


def test_it_is_tried_once_for_a_target_a_configuration_and_a_kind_of_cache(target):
    counts = []

    def count(model, **kwargs):
        assistant = drafting()
        serve(model, assistant, prompts=PROMPTS[:1], **kwargs)
        counts.append(assistant.stats.total.verification_forwards)

    target = copy.deepcopy(target)
    count(target)
    count(target)
    other = copy.deepcopy(target)
    count(other)
    other.set_attn_implementation("eager")
    count(other)
    few = counts[0]
    assert counts == [few, 0, few, few]
    assert 0 < few <= 10


def test_off_it_costs_nothing(target):
    assistant = drafting(verify_target=False)
    assert all(serve(copy.deepcopy(target), assistant))
    assert assistant.stats.total.verification_forwards == 0
    assert assistant.stats.total.accepted > 0


def test_nothing_of_the_call_is_changed(target, draft):
    """Neither what it draws, nor its output, nor what the draft learns from it."""
    found = []
    for tries in (True, False):
        model = copy.deepcopy(target)
        assistant = OnlineAssistant(draft, lookahead="constant", verify_target=tries, update_interval=10**6, seed=0)
        torch.manual_seed(7)
        output = model.generate(PROMPTS[0], assistant_model=assistant, **{**GREEDY, "do_sample": True})
        after = torch.rand(3)
        assistant.update()
        [feedback] = assistant.buffer.new()
        found.append((output, after, feedback.top_logps, feedback.prompt_rows.top_logps))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Offset(Placed):
    """Keeps in the module what it made of the call's prompt, as models that see do with their positions."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("counted", torch.zeros(1))

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        if not past_key_values.get_seq_length():
            self.offset = input_ids[0, 0] % 7
        self.counted += 1
        return super().forward(input_ids + self.offset * (input_ids < 50), past_key_values=past_key_values, **kwargs)


def test_what_a_module_keeps_of_the_prompt_is_put_back(known):
    """In the middle of an answer, where no prompt sets it again."""
    target = Offset(placed().config).eval()
    for prompt in PROMPTS:
        fresh = copy.deepcopy(target)
        plain = fresh.generate(prompt, **GREEDY)
        assistant = late(drafting())
        assistant.texts.for_tenant(None).add(plain[0].tolist())
        fresh.counted.zero_()
        assert torch.equal(plain, fresh.generate(prompt, assistant_model=assistant, **GREEDY))
        assistant.collect()
        total = assistant.stats.total
        assert total.verification_forwards > 0
        assert total.accepted > 0
        assert fresh.counted == total.rounds, "written in place"


def test_a_target_in_train_mode_is_not_tried(target):
    training = copy.deepcopy(target).train()
    assistant = drafting()
    assert all(serve(training, assistant))
    assert assistant.stats.total.verification_forwards == 0


def test_a_target_that_is_gone_is_forgotten(target):
    model, before = copy.deepcopy(target), len(verification._verdicts)
    serve(model, drafting(), prompts=PROMPTS[:1])
    assert len(verification._verdicts) == before + 1
    del model
    gc.collect()
    assert len(verification._verdicts) <= before


# No false alarms.

ARCHITECTURES = [
    "Llama", "Qwen2", "Qwen3", "Gemma3", "Mistral", "GPT2", "GPTNeoX", "Phi", "OPT", "Mixtral", "Qwen2Moe", "T5", "Bart", "Llava",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_sound_target_is_taken_for_one_that_cannot(tiny_model, caplog, name, dtype):
    for seed in range(2):
        target, assistant = tiny_model(name, seed=seed).to(dtype), drafting()
        with caplog.at_level(logging.WARNING, logger="hf_osd"):
            for _ in range(2):
                target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
        total = assistant.stats.total
        assert total.plain_requests == 0
        assert total.drafted > 0
        assert total.verification_forwards > 0
    assert not [record for record in caplog.records if "verify" in record.getMessage()]


def test_an_expert_chosen_by_a_hair_is_no_fault(caplog):
    """Where arithmetic is coarse, one text in which a row of a block differs for it, and others in which none does."""
    wavered = []

    class Wavering(Placed):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            block = input_ids.shape[1] > 1 and past_key_values.get_seq_length()
            output = super().forward(input_ids, past_key_values=past_key_values, **kwargs)
            if block and not wavered:
                wavered.append(1)
                output.logits[:, 0] = output.logits[:, 0].roll(1, -1)
            return output

    target = placed(dtype=torch.bfloat16)
    target.__class__ = Wavering
    total = check_drafted(target, caplog)
    assert wavered
    assert total.verification_forwards > 20


# What is true of the cache, and of the prompt.


def model_of(name, **values):
    """A random model with something to say."""
    kind = getattr(transformers, name)
    return random_model(kind, kind.config_class(**values))


def seeing(name, **values):
    """A target that sees, whose text model is of the config `name`."""
    text = getattr(transformers, name)(**SIZES, **values)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=63, image_seq_length=4, vision_feature_layer=-1
    )
    return random_model(LlavaForConditionalGeneration, config)


HYBRIDS = {
    "Qwen3_5TextConfig": FAMILIES["Qwen3_5ForCausalLM"],
    "Qwen3NextConfig": FAMILIES["Qwen3NextForCausalLM"],
    "GraniteMoeHybridConfig": FAMILIES["GraniteMoeHybridForCausalLM"],
    "BambaConfig": FAMILIES["BambaForCausalLM"],
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "num_experts": 1},
    "FalconH1Config": FAMILIES["FalconH1ForCausalLM"],
}


@pytest.mark.parametrize("name", [name for name in HYBRIDS if name != "JambaConfig"])
def test_a_target_that_sees_through_a_recurrent_text_model_is_served(caplog, name):
    check_drafted(seeing(name, **HYBRIDS[name]), caplog)


def test_one_whose_blocks_come_out_otherwise_decodes_plainly(caplog):
    check_plain(seeing("JambaConfig", **HYBRIDS["JambaConfig"]), caplog, "differ from those for one at a time")


LOOK_STATEFUL = {
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["attention"] * 4,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        **MAMBA,
    },
    "BambaForCausalLM": {"attn_layer_indices": [0, 1, 2, 3], **MAMBA},
    "JambaForCausalLM": {"attn_layer_period": 1, "attn_layer_offset": 0, "num_experts": 1},
    "NemotronHForCausalLM": {"layer_types": ["attention", "mlp"] * 2, "head_dim": 8},
    "Qwen3_5ForCausalLM": {"layer_types": ["full_attention"] * 4, "head_dim": 8},
    "Qwen3NextForCausalLM": {"layer_types": ["full_attention"] * 4, "head_dim": 8, **EXPERTS},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},  # convolutions can be cropped
}


@pytest.mark.parametrize("name", LOOK_STATEFUL)
def test_targets_that_only_look_stateful_are_served(caplog, name):
    check_drafted(model_of(name, **SIZES, **LOOK_STATEFUL[name]), caplog)


def test_a_draft_grown_from_a_target_that_only_looks_stateful_learns(serve_as_plain):
    target = model_of("Qwen3_5ForCausalLM", **SIZES, **LOOK_STATEFUL["Qwen3_5ForCausalLM"])
    served = serve_as_plain(target, grow_draft(target), PROMPTS, {"update_interval": 2})
    assert served.stats.total.tested > 0
    assert (served.stats.updates, served.stats.failed_updates) == (1, 0)


_PROPHET = {
    "vocab_size": 64, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128, "decoder_start_token_id": 2,
    "eos_token_id": None,
}  # fmt: skip
NO_CACHE = {
    "OpenAIGPTLMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "XLMWithLMHeadModel": {
        "n_words": 64, "vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128, "causal": True,
    },
    "XLNetLMHeadModel": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "CpmAntForCausalLM": {
        "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "num_hidden_layers": 2,
    },
    "ProphetNetForConditionalGeneration": _PROPHET,
    "ProphetNetForCausalLM": {**_PROPHET, "is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False},
    "MiniMaxForCausalLM": {**SIZES, "head_dim": 8, "num_local_experts": 2},
    "RecurrentGemmaForCausalLM": {**SIZES, "lru_width": 32, "block_types": ["attention"]},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CACHE)
def test_targets_without_a_cache_of_their_own_decode_plainly(caplog, name):
    check_plain(model_of(name, **NO_CACHE[name]), caplog, "cannot verify a block", eos_token_id=None)


@pytest.mark.parametrize("given", [False, True])
def test_a_quantised_cache_is_decoded_with_plainly(target, caplog, given):
    if given:
        caches = lambda: QuantizedCache(backend="fp8", config=target.config)  # noqa: E731
        total = check_plain(target, caplog, "Fp8QuantizedLayer", caches)
    else:
        total = check_plain(
            target, caplog, "Fp8QuantizedLayer", cache_implementation="quantized", cache_config={"backend": "fp8"}
        )
    assert total.verification_forwards == 0, "the cache tells"


def test_a_static_cache_inside_another_is_decoded_with_plainly(tiny_model, caplog):
    target = tiny_model("T5")

    def made():
        return EncoderDecoderCache(StaticCache(config=target.config, max_cache_len=64), DynamicCache())

    check_plain(target, caplog, "StaticLayer", made)


def learnt_prompts():
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    return {
        "tuned": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "encoded": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32),
    }


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("kind", ["tuned", "prefix", "encoded"])
def test_a_target_with_a_learnt_prompt_decodes_plainly(target, draft, caplog, kind, drafts):
    from peft import get_peft_model

    learnt = get_peft_model(copy.deepcopy(target), learnt_prompts()[kind]).eval()
    assistant = OnlineAssistant(draft, lookahead="constant") if drafts else drafting()
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for prompt in PROMPTS:
            plain = learnt.generate(input_ids=prompt, **GREEDY)
            for _ in range(2):
                assert torch.equal(plain, learnt.generate(input_ids=prompt, assistant_model=assistant, **GREEDY))
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("hf_osd")]
    assert "learnt prompt" in said
    base = learnt.get_base_model()
    assert all(serve(base, assistant)), "without its prompt it is drafted for"
    assert assistant.stats.total.drafted > 0


def test_scores_streamers_and_processors_of_a_plain_call_are_plain_decodings(target):
    """It is transformers' own loop that answers, with what the caller gave it."""

    class Heard(list):
        put, end = list.append, lambda self: self.append("end")

    asked = {
        "inputs": PROMPTS[0], **GREEDY, "cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "repetition_penalty": 1.3,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    plain, ours = [
        (heard := Heard(), target.generate(**asked, **extra, streamer=heard))
        for extra in ({}, {"assistant_model": drafting()})
    ]
    assert torch.equal(plain[1].sequences, ours[1].sequences)
    for name in ("scores", "logits"):
        assert torch.equal(torch.cat(getattr(plain[1], name)), torch.cat(getattr(ours[1], name)))
    assert [str(said) for said in plain[0]] == [str(said) for said in ours[0]]
