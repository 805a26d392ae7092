"""Every family that transformers takes for stateful is served exactly, decodes plainly or is refused, also where no trial is made of it."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_osd import OnlineAssistant, grow_draft, grow_feature_draft
from hf_osd.generation.candidates import OnlineCandidateGenerator
from recipes.checks.recurrent import FAMILIES, SIZES
from recipes.checks.recurrent import model_of as target_of

from ..served import in_threads
from .test_recurrent import INCONSISTENT, N, assistant_of, check, prompts
from .test_verification import HYBRIDS, check_plain, model_of

_DELTA, _EXPERTS = FAMILIES["Qwen3_5ForCausalLM"], {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_TEXT = {**SIZES, **_DELTA}
_KIMI = FAMILIES["KimiLinearForCausalLM"]
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
_MINICPM = {
    "text_config": {"model_type": "qwen3_5_text", **_TEXT},
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "insert_layer_id": 0,
        "image_size": 56,
        "patch_size": 14,
    },
    "insert_layer_id": 0,
}
# Served beside `FAMILIES`; those that are conditional have a text model inside, and read text alone here.
MORE = {
    "ZayaForCausalLM": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 16},
    "Qwen4ExpForCausalLM": {
        **_DELTA,
        **_EXPERTS,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "Qwen3_5ForConditionalGeneration": {
        "text_config": _TEXT,
        "vision_config": {**_VISION, "deepstack_visual_indexes": []},
    },
    "Glm5NextForConditionalGeneration": {
        "text_config": {
            **{
                name: _KIMI[name] for name in ("layer_types", "linear_head_dim", "linear_num_heads", "mlp_layer_types")
            },
            **SIZES,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "index_topk": 64,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "index_kpool": 4,
            "hc_mult": 2,
        },
        "vision_config": {**_VISION, "projection_intermediate_size": 16},
    },
    "MiniCPMV4_6ForConditionalGeneration": {**_MINICPM, "image_size": 56},
    "MiniCPMV4_7ForConditionalGeneration": {**_MINICPM, "image_size": 56},
    "MiniCPMOcrForConditionalGeneration": _MINICPM,
}
SEEING = [name for name in MORE if name.startswith(("Qwen3_5", "MiniCPM"))]
_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_NEMOTRON = {"model_type": "nemotron_h", **SIZES, **INCONSISTENT["NemotronHForCausalLM"][0]}
# Not to be served even where no trial finds it out, and what is said of them.
UNSERVED = {
    "NemotronH_Omni_Reasoning_V3": (
        {
            "text_config": {**_NEMOTRON, "num_nextn_predict_layers": 0},
            "vision_config": {
                "model_type": "radio",
                **_SMALL,
                "image_size": 32,
                "patch_size": 16,
                "video_temporal_patch_size": 2,
            },
            "vision_hidden_size": 16,
            "projector_hidden_size": 16,
            "audio_config": None,
        },
        "limit the time step",
    ),
    "Nemotron3_5TranscribeForConditionalGeneration": (
        {
            "text_config": _NEMOTRON,
            "audio_config": {
                "asr_config": {**_SMALL, "num_mel_bins": 8},
                "diarization_config": {
                    "model_type": "nemotron3_diarization",
                    "audio_config": {**_SMALL, "num_mel_bins": 8},
                    "head_config": {"hidden_size": 8, "audio_hidden_size": 16},
                },
            },
            "word_timestamp_config": {**_SMALL, "vocab_size": 8, "blank_token_id": 7},
        },
        "limit the time step",
    ),
    "JambaForCausalLM": (HYBRIDS["JambaConfig"], "as if none came before them"),
    "ZambaForCausalLM": (
        {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2},
        "as if none came before them",
    ),
    "RecurrentGemmaForCausalLM": (
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 32},
        "returns no cache",
    ),
    "DeepseekV4ForCausalLM": (
        {
            "head_dim": 16,
            "num_key_value_heads": 1,
            "q_lora_rank": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 8,
            "sliding_window": 16,
            "hc_mult": 2,
            "num_nextn_predict_layers": 0,
        },
        "tokens cannot be taken back out of its cache (DeepseekV4CSACache, DeepseekV4HCACache)",
    ),
}
NO_CACHE = {
    "MambaForCausalLM": {"state_size": 4},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "FalconMambaForCausalLM": {"state_size": 4},
}
REFUSED = {
    "RwkvForCausalLM": {"attention_hidden_size": 32},
    "xLSTMForCausalLM": {"num_heads": 4, "num_blocks": 4},
}


def made(name, values):
    """Makes a tiny random model with weights so large that its answers do not repeat at once."""
    kind = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**(values if "text_config" in values else {**SIZES, **values}))).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.3)
    return model


def test_every_stateful_family_is_held_here_or_beside():
    folder = Path(transformers.__file__).parent / "models"
    stateful = {
        path.parent.name for path in folder.glob("*/modeling_*.py") if "_is_stateful = True" in path.read_text("utf-8")
    }
    names = {*FAMILIES, *INCONSISTENT, *MORE, *UNSERVED, *NO_CACHE, *REFUSED}
    held = {re.search(r"models\.(\w+)\.", getattr(transformers, name).__module__)[1] for name in names}
    assert stateful == held


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("tries", [True, False])
def test_more_families_are_served(name, tries):
    target = made(name, MORE[name])
    stats = check(target, assistant_of(verify_target=tries), prompts(3), min_new_tokens=N)
    assert stats.total.accepted > 0
    assert stats.total.refed_tokens > 0


@pytest.mark.parametrize("name", SEEING)
def test_a_feature_draft_learns_from_the_text_models_states(name):
    target = made(name, MORE[name])
    stats = check(target, assistant_of(grow_feature_draft(target, seed=0), learning_rate=2e-2), prompts(4))
    assert stats.updates >= 3
    assert stats.failed_updates == 0
    assert stats.total.drafted_by["draft"] > 0


@pytest.mark.parametrize("name", SEEING)
def test_a_draft_is_grown_from_the_text_models_attention_layers(name, caplog):
    target = made(name, MORE[name])
    with caplog.at_level("INFO", logger="hf_osd"):
        draft = grow_draft(target)
    assert "from layers [1, 3], the first with attention alone" in caplog.text
    assert set(draft.config.layer_types) == {"full_attention"}
    stats = check(target, assistant_of(draft), prompts(3), min_new_tokens=N)
    assert stats.updates >= 2
    assert stats.failed_updates == 0


def test_a_draft_with_recurrent_states_is_refused():
    with pytest.raises(ValueError, match="Choose a draft that is an attention model throughout"):
        OnlineAssistant(target_of("Qwen3_5ForCausalLM"))


@pytest.mark.parametrize("name", ["NemotronHForCausalLM", "Zamba2ForCausalLM"])
def test_without_a_limit_of_the_time_step_they_are_served(name):
    target = model_of(name, **{**SIZES, **INCONSISTENT[name][0]})
    for module in target.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    stats = check(target, assistant_of(), prompts(3), min_new_tokens=N)
    assert stats.total.refed_tokens > 0


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_known_to_be_wrong_decodes_plainly_without_a_trial(name, caplog):
    values, why = UNSERVED[name]
    target, assistant = made(name, values), OnlineAssistant(lookahead="constant", verify_target=False)
    with caplog.at_level("WARNING", logger="hf_osd"):
        for prompt in prompts(2):
            asked = {"max_new_tokens": N, "min_new_tokens": N, "do_sample": False}
            plain = target.generate(prompt, **asked)
            for _ in range(2):
                assert torch.equal(target.generate(prompt, assistant_model=assistant, **asked), plain)
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("hf_osd")]
    assert name in said
    assert why in said
    assert assistant.stats.total.drafted == 0


@pytest.mark.parametrize(
    "name", [name for name, (_, why) in UNSERVED.items() if "none came before" in why or "no cache" in why]
)
def test_the_trial_finds_the_same(name, caplog):
    check_plain(made(name, UNSERVED[name][0]), caplog, "several tokens at once")


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "JambaForCausalLM"])
def test_one_that_cannot_be_tried_in_train_mode_decodes_plainly(name, caplog):
    """A trial is left out in train mode, and nobody has asked to trust the target."""
    target = target_of(name) if name in FAMILIES else made(name, UNSERVED[name][0])
    check_plain(target.train(), caplog, "train mode")


def test_a_cache_that_cannot_be_copied_decodes_plainly(caplog):
    class Uncopied(DynamicCache):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    target = target_of("Qwen3_5ForCausalLM")
    config = target.config.get_text_config(decoder=True)
    check_plain(target, caplog, "cannot be copied", caches=lambda: Uncopied(config=config))


@pytest.mark.parametrize("name", NO_CACHE)
def test_states_in_no_cache_of_generates_decode_plainly(name, caplog):
    target, assistant = made(name, NO_CACHE[name]), assistant_of()
    [prompt] = prompts(1)
    with caplog.at_level("WARNING", logger="hf_osd"):
        output = target.generate(prompt, assistant_model=assistant, max_new_tokens=N, do_sample=False)
    assert torch.equal(output, target.generate(prompt, max_new_tokens=N, do_sample=False))
    assert f"{name} decodes plainly" in caplog.text
    assert "keeps no cache" in caplog.text
    assert assistant.stats.total.drafted == 0


@pytest.mark.parametrize("name", REFUSED)
def test_states_of_their_own_kind_are_refused_by_name(name):
    target = made(name, REFUSED[name])
    with pytest.raises(ValueError, match=rf"The target \({name}\).*in no cache.*Leave assistant_model out"):
        target.generate(prompts(1)[0], assistant_model=assistant_of(), max_new_tokens=4, do_sample=False)


# What else a call of a target with recurrent states is asked for.


def test_attentions_are_plain_decodings():
    target = target_of("Qwen3NextForCausalLM")
    target.set_attn_implementation("eager")
    asked = {"max_new_tokens": N, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    assistant = assistant_of()
    for prompt in prompts(2):
        plain = target.generate(prompt, **asked)
        for _ in range(2):
            output = target.generate(prompt, assistant_model=assistant, **asked)
            assert torch.equal(output.sequences, plain.sequences)
            assert len(output.attentions) == len(plain.attentions)
            for one, other in zip(output.attentions[1:], plain.attentions[1:], strict=True):
                for a, b in zip(one, other, strict=True):
                    assert (a is None) == (b is None)
                    assert a is None or torch.allclose(a, b, atol=1e-3, rtol=1e-3)
    assert assistant.stats.total.accepted > 0
    assert assistant.stats.total.refed_tokens > 0


def test_calls_of_other_threads_are_their_own():
    """Plain, assisted and stock calls on one target at a time: each has its own view, rollback and refusal."""
    target, texts, wrong = target_of("Qwen3_5ForCausalLM"), prompts(4), []
    asked = {"max_new_tokens": N, "do_sample": False}
    plain = [target.generate(prompt, **asked) for prompt in texts]
    assistant = assistant_of()

    def serve(extra):
        for prompt, expected in zip(texts * 2, plain * 2, strict=True):
            if not torch.equal(target.generate(prompt, **asked, **extra), expected):
                wrong.append(extra)

    def stock():
        for prompt in texts:
            try:
                target.generate(prompt, assistant_model=target, **asked)
                wrong.append("stock assisted generation went through")
            except ValueError as error:
                if "stateful" not in str(error):
                    wrong.append(error)

    assisted = partial(serve, {"assistant_model": assistant})
    assert in_threads(partial(serve, {}), assisted, assisted, stock) == []
    assert not wrong
    assert assistant.stats.total.requests == 16
    assert 0 < assistant.stats.total.accepted < assistant.stats.total.tested


def test_drafts_in_the_first_round_are_an_error_and_no_wrong_answer(monkeypatch):
    """Planted: a block before the prompt was read, where there is no state to go back to."""
    target, [prompt] = target_of("Qwen3_5ForCausalLM"), prompts(1)
    check(target, assistant_of(verify_target=False), [prompt])
    original = OnlineCandidateGenerator.__init__

    def begin(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._plain_first_round = False

    monkeypatch.setattr(OnlineCandidateGenerator, "__init__", begin)
    with pytest.raises((AssertionError, RuntimeError)):
        check(target, assistant_of(verify_target=False), prompts(4))


def test_the_report_says_how_much_was_read_again():
    assistant = assistant_of()
    stats = check(target_of("Qwen3_5ForCausalLM"), assistant, prompts(2))
    assert f"read {stats.rolling.refed_tokens} of " in assistant.report()
    assert stats.total.refed_tokens > 0
