"""A feature-level draft: what it computes, step by step and unrolled; and what it is grown from."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_osd import grow_feature_draft
from hf_osd.models import feature_growth
from hf_osd.models.copies import copy_draft
from hf_osd.models.feature_draft import FeatureDraft, FeatureDraftConfig
from hf_osd.models.feature_growth import default_aux_layers

TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SHAPE = TOKENS | {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 128}
GATED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SEES |= {"image_size": 16, "patch_size": 4}
EXPERTS = {"num_experts_per_tok": 1, "num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 16}

CONFIGS = {
    "llama": lambda: LlamaConfig(**GATED, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama_tied": lambda: LlamaConfig(**GATED, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**GATED),
    "qwen3": lambda: Qwen3Config(**GATED, head_dim=12),
    "gemma3": lambda: Gemma3TextConfig(**GATED, head_dim=8),
    "gemma3_that_sees": lambda: Gemma3Config(
        text_config=GATED | {"head_dim": 8}, vision_config=SEES, mm_tokens_per_image=4, image_token_id=62
    ),
    "mistral": lambda: MistralConfig(**GATED),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=5, n_head=4, n_positions=128),
    "phi": lambda: PhiConfig(**SHAPE, intermediate_size=48, partial_rotary_factor=0.5),
    "mixtral": lambda: MixtralConfig(**GATED | EXPERTS),
    "qwen3_moe": lambda: Qwen3MoeConfig(**GATED | EXPERTS, head_dim=8),
}
COLUMNS, STEPS = 9, 3


def target_of(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms of 1 would hide what is missing
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=CONFIGS)
def target(request):
    return target_of(CONFIGS[request.param]())


def draft_of(seed=0, dtype=torch.float32, **config):
    """A random draft, in which nothing is zero or one."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 10, "aux_layers": [1, 2, 3]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = FeatureDraft(FeatureDraftConfig(**shape | config)).eval()
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return draft.to(dtype)


def inputs(draft, texts=1, columns=COLUMNS, seed=0):
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(draft.config.vocab_size, (texts, columns), generator=random)
    return ids, torch.randn(texts, columns, draft.config.states_size, generator=random)


@torch.no_grad()
def drafted(draft, ids, states, true: int, steps: int):
    """The logits `(steps, V)` after `true` columns of a text that read true states, and after each of those after them, by a cache."""
    cache, rows = DynamicCache(config=draft.config), []
    out = draft(ids[:, :true], features=states[:, :true], past_key_values=cache, use_cache=True)
    for column in range(true, true + steps):
        rows.append(out.logits[0, -1])
        if column < ids.shape[1]:
            fed = out.states[:, -1:]
            out = draft(ids[:, column : column + 1], features=fed, past_key_values=cache, use_cache=True)
    return torch.stack(rows)


VARIANTS = [
    {},
    {"fc_norm": False},
    {"fc_norm": False, "norm_before_fc": True},
    {"norm_before_residual": True},
    {"norm_output": True},
    {"target_hidden_size": 24},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_unrolled_it_predicts_what_drafting_with_a_cache_does(config):
    draft = draft_of(**config)
    ids, states = inputs(draft, texts=3)
    lengths = (COLUMNS, COLUMNS - 2, 3)
    mask = torch.stack([torch.arange(COLUMNS) >= COLUMNS - length for length in lengths]).long()
    unrolled = draft(ids, attention_mask=mask, features=states, unroll=STEPS).logits.detach()
    assert unrolled.shape == (STEPS, 3, COLUMNS, 64)
    assert unrolled.isfinite().all()
    for row, length in enumerate(lengths):
        text, read = ids[row : row + 1, -length:], states[row : row + 1, -length:]
        for true in range(1, length + 1):
            steps = min(STEPS, length - true + 1)
            expected = drafted(draft, text, read, true, steps)
            first = COLUMNS - length + true - 1  # the column of the last true state
            got = torch.stack([unrolled[k, row, first + k] for k in range(steps)])
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_steps_differ():
    """Else the test above would say little."""
    ids, states = inputs(draft := draft_of())
    logits = draft(ids, features=states, unroll=STEPS).logits
    gaps = [(logits[i, :, STEPS:] - logits[j, :, STEPS:]).abs().amax() for i in range(STEPS) for j in range(i)]
    assert min(gaps) > 1e-3


def test_later_columns_and_states_are_not_read():
    ids, states = inputs(draft := draft_of())
    changed, at = (ids.clone(), states.clone()), 6
    changed[0][:, at:], changed[1][:, at:] = 3, 0.0
    before, after = (draft(i, features=f, unroll=STEPS).logits[:, :, :at] for i, f in ((ids, states), changed))
    torch.testing.assert_close(before, after)


def test_the_last_true_state_a_step_reads_is_that_of_its_base():
    """What step k+1 predicts at column c depends on the state at c-k, and not on those after it."""
    ids, states = inputs(draft := draft_of())
    states.requires_grad_(True)
    logits = draft(ids, features=states, unroll=STEPS).logits
    for k in range(STEPS):
        [grad] = torch.autograd.grad(logits[k, 0, -1].square().sum(), states, retain_graph=True)
        read = grad[0].abs().amax(-1) > 0
        assert read.tolist() == [c <= COLUMNS - 1 - k for c in range(COLUMNS)]


def test_a_cache_a_mask_and_padding_change_nothing():
    draft = draft_of()
    ids, states = inputs(draft)
    whole = draft(ids, features=states)
    cache = DynamicCache(config=draft.config)
    parts = [
        draft(ids[:, a:b], features=states[:, a:b], past_key_values=cache, use_cache=True, attention_mask=mask)
        for a, b, mask in ((0, 4, None), (4, 5, torch.ones(1, 5)), (5, COLUMNS, torch.ones(1, COLUMNS - 5)))
    ]
    torch.testing.assert_close(torch.cat([p.logits for p in parts], dim=1), whole.logits)
    torch.testing.assert_close(torch.cat([p.states for p in parts], dim=1), whole.states)
    cache.crop(-3)
    again = draft(ids[:, -3:], features=states[:, -3:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again.logits, whole.logits[:, -3:])
    padded, read = torch.cat([ids[:, :2], ids], dim=1), torch.cat([states[:, :2], states], dim=1)
    mask = (torch.arange(COLUMNS + 2) >= 2).long()[None]
    torch.testing.assert_close(draft(padded, mask, features=read).logits[:, 2:], whole.logits)


def test_it_keeps_the_logits_that_are_asked_for():
    draft = draft_of()
    ids, states = inputs(draft, texts=2)
    for unroll in (1, STEPS):
        whole = draft(ids, features=states, unroll=unroll).logits
        some = torch.tensor([0, 4, 5])
        torch.testing.assert_close(
            draft(ids, features=states, unroll=unroll, logits_to_keep=2).logits, whole[..., -2:, :]
        )
        torch.testing.assert_close(
            draft(ids, features=states, unroll=unroll, logits_to_keep=some).logits, whole[..., some, :]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_trains_has_finite_gradients_padding_or_not(dtype):
    draft = draft_of(dtype=dtype)
    ids, states = inputs(draft, texts=2)
    mask = torch.ones_like(ids)
    mask[0, :-1] = 0
    out = draft(ids, attention_mask=mask, features=states, unroll=STEPS)
    assert out.logits.dtype == dtype
    out.logits.float().logsumexp(-1).mean().backward()
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
    ends = {name for name, p in draft.named_parameters() if not p.requires_grad}
    assert ends == {"embed_tokens.weight", "lm_head.weight"}


def test_without_a_dict_it_returns_logits_and_states():
    draft = draft_of()
    ids, states = inputs(draft)
    whole = draft(ids, features=states)
    logits, own = draft(ids, features=states, return_dict=False)
    assert torch.equal(logits, whole.logits)
    assert torch.equal(own, whole.states)


def test_it_reads_tokens_alone_and_generates():
    draft = draft_of()
    ids, _ = inputs(draft)
    assert draft(ids).logits.shape == (1, COLUMNS, 64)
    assert draft._supports_logits_to_keep()
    with torch.inference_mode():
        draft(ids)
    draft(ids).logits.sum().backward()  # frequencies made there are of use here
    assert draft.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, COLUMNS + 3)


def test_bad_features_and_an_unrolled_cache_are_refused():
    draft = draft_of()
    ids, states = inputs(draft)
    with pytest.raises(ValueError, match=r"`features` has width 95.*layers \[1, 2, 3\].*width 96.*width 32"):
        draft(ids, features=states[..., 1:])
    with pytest.raises(ValueError, match=r"`unroll` is 2.*without a cache"):
        draft(ids, features=states, unroll=2, use_cache=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"aux_layers": [1, 1, 2]}, r"`aux_layers` is \[1, 1, 2\]; give different layers"),
        ({"aux_layers": []}, r"`aux_layers` is \[\]"),
        ({"aux_layers": [3]}, r"width 32 could not be told from.*Give two layers"),
        ({"head_dim": 7}, r"4 heads of width 7.*even `head_dim`"),
        ({"num_hidden_layers": 2}, r"`num_hidden_layers` is 2"),
        ({"norm_before_fc": True}, r"exclude each other"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"'dynamic'.*Choose one"),
    ],
)
def test_bad_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        draft_of(**config)


# Growing.


def test_it_has_the_targets_shape_and_reads_its_states(target):
    text = target.config.get_text_config(decoder=True)
    draft = grow_feature_draft(target)
    config = draft.config
    assert config.aux_layers == [2, 3, 4]
    assert (config.hidden_size, config.vocab_size) == (32, 64)
    assert config.intermediate_size == (getattr(text, "intermediate_size", None) or 128)
    assert config.num_key_value_heads == getattr(text, "num_key_value_heads", 4)
    assert config.head_dim == getattr(text, "head_dim", None) or 8
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        said = target(ids, output_hidden_states=True)
        states = torch.cat([said.hidden_states[i] for i in config.aux_layers], dim=-1)
        logits = draft(ids[:, 1:], features=states[:, :-1]).logits
    assert logits.shape == (1, 19, 64)
    assert logits.isfinite().all()
    assert draft.dtype == target.dtype
    assert not draft.training


def test_its_ends_are_the_targets_own_storage_and_all_else_trains(target):
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in target.named_parameters()}
    draft = grow_feature_draft(target)
    entry, head = target.get_input_embeddings(), target.get_output_embeddings()
    assert draft.embed_tokens.weight.data_ptr() == entry.weight.data_ptr()
    assert draft.lm_head.weight.data_ptr() == head.weight.data_ptr()
    assert (draft.lm_head.bias is None) == (head.bias is None)
    tied = entry.weight is head.weight
    assert (draft.embed_tokens.weight is draft.lm_head.weight) == draft.config.tie_word_embeddings == tied
    ids = torch.arange(4, 24)[None]
    torch.testing.assert_close(draft.embed_tokens(ids), entry(ids))
    ends = {id(p) for end in (draft.embed_tokens, draft.lm_head) for p in end.parameters()}
    assert all(p.requires_grad == (id(p) not in ends) for p in draft.parameters())
    draft(ids).logits.logsumexp(-1).mean().backward()
    torch.optim.SGD([p for p in draft.parameters() if p.grad is not None], lr=1.0).step()
    for name, parameter in target.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1]), name


@pytest.fixture
def without_copying_head(monkeypatch):
    """Growth as it is without one; tests/models/test_copying_head.py has what that changes."""
    monkeypatch.setattr(feature_growth, "install_copying_head", lambda *args: False)


def test_it_begins_with_the_targets_last_state_and_final_norm(target, without_copying_head):
    draft = grow_feature_draft(target)
    weight = draft.fc.weight
    assert torch.equal(weight[:, -32:], torch.eye(32))
    assert not weight[:, :-32].any()
    decoder = target.get_decoder()
    norm = next(getattr(decoder, n) for n in ("norm", "ln_f", "final_layernorm") if hasattr(decoder, n))
    random = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    random -= random.mean()  # a LayerNorm does that
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        expected = norm(random) - (0 if bias is None else bias)
        torch.testing.assert_close(draft.norm(random), expected, rtol=1e-4, atol=1e-4)
    assert 0.015 < float(draft.midlayer.self_attn.q_proj.weight.detach()[:, :32].std()) < 0.025


def test_without_norms_before_fc_it_begins_with_the_targets_residual_stream(target, without_copying_head):
    draft, other = grow_feature_draft(target, fc_norm=False), grow_feature_draft(target)
    names, others = (dict(model.named_parameters()) for model in (draft, other))
    assert {f"fc_norm.{i}.weight" for i in range(3)} == others.keys() - names.keys()
    scaled = (
        "midlayer.self_attn.o_proj.weight",
        "midlayer.mlp.down_proj.weight",
    )  # what the layer adds, to the stream
    assert all(torch.equal(p, others[name]) for name, p in names.items() if name not in scaled)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        hidden = target(ids, output_hidden_states=True).hidden_states
        states = torch.cat([hidden[i] for i in draft.config.aux_layers], dim=-1)
        torch.testing.assert_close(
            draft._feature(states, draft.embed_tokens(ids)), hidden[draft.config.aux_layers[-1]]
        )
        assert draft(ids[:, 1:], features=states[:, :-1]).logits.isfinite().all()


def test_it_is_the_same_each_time_and_draws_from_a_generator_of_its_own(tiny_llama):
    target = tiny_llama(layers=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = grow_feature_draft(target), grow_feature_draft(target), grow_feature_draft(target, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.midlayer.self_attn.q_proj.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_it_has_the_targets_dtype_generation_settings_and_rotary_embedding():
    target = target_of(CONFIGS["llama"]()).to(torch.bfloat16).train()
    target.generation_config.eos_token_id = [1, 7]
    draft = grow_feature_draft(target, (0, 5))
    assert {p.dtype for p in draft.parameters()} == {torch.bfloat16}
    assert not draft.training
    assert draft.generation_config.eos_token_id == [1, 7]
    assert draft.generation_config is not target.generation_config
    assert draft.config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert draft.config.aux_layers == [0, 5]
    assert grow_feature_draft(target_of(CONFIGS["phi"]())).config.rope_parameters["rope_theta"] == 1e4
    dynamic = {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 2.0}
    target = target_of(LlamaConfig(**GATED, rope_parameters=dynamic))
    assert grow_feature_draft(target).config.rope_parameters == {"rope_type": "default", "rope_theta": 2e4}


def test_it_can_be_grown_under_inference_mode():
    target = target_of(CONFIGS["llama"]())
    with torch.inference_mode():
        draft = grow_feature_draft(target)
    draft(torch.arange(4, 9)[None]).logits.logsumexp(-1).mean().backward()
    assert draft.norm.weight.grad is not None


def test_a_copy_owns_what_trains_and_shares_the_rest():
    draft = grow_feature_draft(target_of(CONFIGS["llama_tied"]()))
    copied = copy_draft(draft)
    for name, parameter in copied.named_parameters():
        same = parameter.data_ptr() == draft.get_parameter(name).data_ptr()
        assert same == (name == "embed_tokens.weight"), name
    assert copied.lm_head.weight is copied.embed_tokens.weight


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, [0, 1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (4, [1, 2, 3]),
        (5, [2, 3, 4]),
        (6, [2, 3, 5]),
        (8, [2, 4, 5]),
        (30, [2, 15, 27]),
    ],
)
def test_by_default_it_reads_three_layers(depth, layers):
    assert default_aux_layers(depth) == layers


def test_layers_are_counted_as_hidden_states_are(tiny_llama):
    """Each layer adds a number of its own to a direction of its own, so a state tells which layers made it."""
    target = copy.deepcopy(tiny_llama(layers=5))
    with torch.no_grad():
        target.model.embed_tokens.weight.zero_()
    for i, layer in enumerate(target.model.layers):

        def add(module, args, output, i=i):
            hidden = args[0].clone()
            hidden[..., i] += i + 1
            return hidden

        layer.register_forward_hook(add)
    draft = grow_feature_draft(target, (0, 2, 4))
    ids, read = torch.arange(4, 9)[None], {}
    for asked in (True, draft.config.aux_layers):
        hidden = target(ids, output_hidden_states=asked).hidden_states
        read[str(asked)] = torch.stack([hidden[i][0, 0, :5] for i in draft.config.aux_layers])
    expected = torch.tensor([[0.0, 0, 0, 0, 0], [1, 2, 0, 0, 0], [1, 2, 3, 4, 0]])
    for states in read.values():
        torch.testing.assert_close(states, expected)


@pytest.mark.parametrize(
    "layers", [(1, 6), (-1, 2), (9,), (2,), (), (1, 1), (1.5, 3), (None, 1), "2,3", 3, (1e9, 2), (float("nan"), 2)]
)
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match=r"`aux_layers` is .*from 0 to 5, such as .*the target has 5 layers"):
        grow_feature_draft(target_of(CONFIGS["llama"]()), layers)


def test_targets_that_it_cannot_be_grown_from_are_refused(tiny_llama):
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*decoder-only"):
        grow_feature_draft(T5ForConditionalGeneration(t5))
    with pytest.raises(ValueError, match=r"LlamaModel.*LM head"):
        grow_feature_draft(LlamaModel(LlamaConfig(**GATED)))
    with torch.device("meta"):
        meta = LlamaForCausalLM(LlamaConfig(**GATED))
    with pytest.raises(ValueError, match=r"meta device.*Load the model whole"):
        grow_feature_draft(meta)
    narrow = AutoModelForCausalLM.from_config(OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=16))
    with pytest.raises(ValueError, match=r"OPTForCausalLM has embeddings \(64, 16\).*grow_draft instead"):
        grow_feature_draft(narrow)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=r"MambaForCausalLM, whose state.*attention"):
        grow_feature_draft(mamba)
    quantised = tiny_llama()
    quantised.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"quantised LlamaForCausalLM"):
        grow_feature_draft(quantised)
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"adapter.*merge_and_unload"):
        grow_feature_draft(get_peft_model(tiny_llama(seed=1), LoraConfig(target_modules=["q_proj"])))


def test_the_layer_begins_as_the_targets_last(without_copying_head):
    """Attention reads the feature with the target's weights, and what the layer adds is scaled to a stream that is normalised."""
    target = target_of(CONFIGS["llama"]())
    draft, last = grow_feature_draft(target), target.model.layers[-1]
    width = draft.config.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (getattr(owner.self_attn, name).weight for owner in (draft.midlayer, last))
        assert torch.equal(ours[:, width:], theirs)
        assert not torch.equal(ours[:, :width], theirs)
    scales = [
        ours.weight / theirs.weight
        for ours, theirs in (
            (draft.midlayer.mlp.down_proj, last.mlp.down_proj),
            (draft.midlayer.self_attn.o_proj, last.self_attn.o_proj),
        )
    ]
    for scale in scales:
        torch.testing.assert_close(scale, scales[0][0, 0].expand_as(scale))
    with torch.no_grad():
        ids = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(1))
        states = target(ids, output_hidden_states=True).hidden_states[draft.config.aux_layers[-1]]
    size = float(states.square().mean(-1).sqrt().median())
    assert 0.5 < float(scales[0][0, 0]) * size < 2


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_a_target_of_other_layers_begins_at_random(name):
    draft = grow_feature_draft(target_of(CONFIGS[name]()))
    assert 0.01 < float(draft.midlayer.mlp.down_proj.weight.std()) < 0.03


def test_a_target_that_cannot_run_is_grown_from_all_the_same(monkeypatch):
    target = target_of(CONFIGS["llama"]())

    def forward(*args, **kwargs):
        raise RuntimeError("not now")

    monkeypatch.setattr(target, "forward", forward)
    draft = grow_feature_draft(target)
    assert not torch.equal(draft.midlayer.mlp.up_proj.weight, target.model.layers[-1].mlp.up_proj.weight)
