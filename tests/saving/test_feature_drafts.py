"""Feature-level drafts on disk: each layout comes back as it was, and what is of another target or variant is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig

from hf_osd import OnlineAssistant, grow_feature_draft, load_feature_draft, save_feature_draft
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.saving.drafts import load_draft, save_draft
from hf_osd.saving.feature_drafts import MISSING, check_layout, layout_of

from ..served import PROMPTS, serve

ENGINES = ("eagle3", "speculators")
VOCAB = [0, 1, 2, 5, 9, 33, 63]
LAYER = {"llama": "midlayer.", "eagle3": "midlayer.", "speculators": "layers.0."}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=6)


@pytest.fixture(scope="module")
def tied(tiny_llama):
    return tiny_llama(layers=6, seed=1, tie_word_embeddings=True)


def learnt(target, seed=0, **config):
    """A draft in which nothing is as it was grown."""
    draft = grow_feature_draft(target)
    random = torch.Generator().manual_seed(seed)
    if config:
        for name, value in config.items():
            setattr(draft.config, name, value)
        other = FeatureDraft(draft.config)
        other.load_state_dict(draft.state_dict(), strict=False)
        other.embed_tokens.weight, other.lm_head.weight = draft.embed_tokens.weight, draft.lm_head.weight
        draft = other.eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    return draft


@torch.no_grad()
def logits(draft, unroll=1):
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (2, 7), generator=random)
    return draft(ids, features=torch.randn(2, 7, draft.config.states_size, generator=random), unroll=unroll).logits


def save(draft, folder, layout, **kwargs):
    kwargs |= {"verifier": "somebody/target"} if layout == "speculators" else {}
    save_feature_draft(draft, folder, layout, **kwargs)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change(folder, tensors=(), drop=(), **config):
    """Change a checkpoint's tensors and config; keys with a dot reach into it."""
    values = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in drop}
    save_file(values | dict(tensors), folder / "model.safetensors")
    whole = config_of(folder)
    for key, value in config.items():
        *path, last = key.split("__")
        part = whole
        for name in path:
            part = part.setdefault(name, {})
        if value is None:
            part.pop(last, None)
        else:
            part[last] = value
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("which", ["target", "tied"])
def test_its_own_layout_stands_alone_and_is_what_load_draft_reads(which, request, tmp_path):
    target = request.getfixturevalue(which)
    draft = learnt(target)
    save_feature_draft(draft, tmp_path / "one")
    save_draft(draft, tmp_path / "two")
    for folder in (tmp_path / "one", tmp_path / "two"):
        for loaded in (load_draft(folder), AutoModelForCausalLM.from_pretrained(folder)):
            assert isinstance(loaded, FeatureDraft)
            assert torch.equal(logits(loaded), logits(draft))
            frozen = {id(p) for end in (loaded.embed_tokens, loaded.lm_head) for p in end.parameters()}
            assert all(p.requires_grad == (id(p) not in frozen) for p in loaded.parameters())
        shared = load_feature_draft(folder, target)
        assert torch.equal(logits(shared), logits(draft))
        assert shared.embed_tokens.weight.data_ptr() == target.get_input_embeddings().weight.data_ptr()
        assert shared.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr()
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (which == "target")


def test_an_assistant_saves_and_loads_it(target, tmp_path):
    draft = learnt(target)
    OnlineAssistant(draft, learn=False).save_pretrained(tmp_path)
    loaded = OnlineAssistant.from_pretrained(tmp_path).serving.active
    assert isinstance(loaded, FeatureDraft)
    assert torch.equal(logits(loaded), logits(draft))


@pytest.mark.parametrize("layout", ENGINES)
def test_an_assistant_saves_it_for_an_engine_and_goes_on_from_there(target, tmp_path, layout):
    of_layout = {"layout": layout, "draft_vocab": VOCAB}
    if layout == "speculators":
        of_layout |= {"verifier": "somebody/target", "speculative_tokens": 3}
    OnlineAssistant(learnt(target)).save_pretrained(tmp_path)
    assistant = OnlineAssistant(learnt(target), update_interval=2, num_assistant_tokens=3)
    serve(target, assistant, PROMPTS[:4])
    assistant.save_pretrained(tmp_path, **of_layout)
    assert layout_of(tmp_path) == layout
    assert not (tmp_path / "generation_config.json").exists(), "of the older checkpoint"
    card = (tmp_path / "README.md").read_text()
    assert f"EAGLE-3 head, which reads the target's hidden states, in the layout `{layout}`" in card
    assert 'from_pretrained("THIS_REPOSITORY", target=target)' in card
    again = OnlineAssistant.from_pretrained(tmp_path, target=target)
    assert again.osd_config == assistant.osd_config
    assert torch.equal(logits(again.serving.active), logits(assistant.serving.active))
    serve(target, again, PROMPTS[:4])
    again.save_pretrained(tmp_path, **of_layout)
    assert len(load_file(tmp_path / "model.safetensors")["d2t"]) == 7
    with pytest.raises(ValueError, match=r"Load it with .*from_pretrained\(name, target=target\)"):
        OnlineAssistant.from_pretrained(tmp_path)


def test_a_draft_vocabulary_can_be_kept(target, tmp_path):
    draft = learnt(target)
    save_feature_draft(draft, tmp_path / "one", "eagle3", draft_vocab=VOCAB)
    kept = load_feature_draft(tmp_path / "one", target, keep_head=True)
    assert kept.config.draft_vocab_size == 7
    assert torch.equal(logits(kept)[..., VOCAB], logits(draft)[..., VOCAB])
    assert set(logits(kept).argmax(-1).flatten().tolist()) <= set(VOCAB)
    save_feature_draft(kept, tmp_path / "two", "eagle3")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    save_feature_draft(draft, tmp_path / "whole", "eagle3")
    whole = load_feature_draft(tmp_path / "whole", target, keep_head=True)
    assert whole.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr(), "it lacks none"


def test_an_engines_layout_of_another_draft_is_refused_before_anything_is_written(tiny_llama, target, tmp_path):
    with pytest.raises(ValueError, match=r"`layout` is 'eagle3', which is for drafts that read .* LlamaForCausalLM"):
        OnlineAssistant(tiny_llama(layers=1)).save_pretrained(tmp_path, layout="eagle3")
    with pytest.raises(ValueError, match=r"`layout` is 'gguf'"):
        OnlineAssistant(learnt(target)).save_pretrained(tmp_path, layout="gguf")
    assert not list(tmp_path.iterdir())
    check_layout(tiny_llama(layers=1), "osd")
    check_layout(learnt(target), "speculators", "somebody/target")
    with pytest.raises(ValueError, match=r"`verifier` is not given"):
        check_layout(learnt(target), "speculators")


SWITCHES = [
    {},
    {"fc_norm": False},
    {"fc_norm": False, "norm_before_fc": True},
    {"norm_before_residual": True, "norm_output": True},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("layout", ENGINES)
def test_an_engines_layout_comes_back_as_it_was(target, tmp_path, layout, switches):
    draft = learnt(target, **switches)
    loaded = load_feature_draft(save(draft, tmp_path, layout), target)
    assert torch.equal(logits(loaded, unroll=3), logits(draft, unroll=3))
    for name in ("aux_layers", "head_dim", "rope_parameters", "rms_norm_eps", "max_position_embeddings", *switches):
        assert getattr(loaded.config, name) == getattr(draft.config, name), name
    assert loaded.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr(), "its rows are the target's"
    assert loaded.config.draft_vocab_size is None
    assert loaded.config.eos_token_id == 1
    assert not loaded.training
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("layout", ENGINES)
def test_an_engines_layout_has_the_names_and_shapes_that_engines_read(target, tmp_path, layout):
    draft = learnt(target)
    folder = save(draft, tmp_path, layout, draft_vocab=reversed_(VOCAB))
    tensors, layer = load_file(folder / "model.safetensors"), LAYER[layout]
    norms = [f"{layer}{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")]
    shapes = dict.fromkeys((*norms, "norm.weight", *(f"fc_norm.{i}.weight" for i in range(3))), (32,))
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (rows, 64) for name, rows in (("q", 32), ("k", 16), ("v", 16))}
    shapes |= {f"{layer}self_attn.o_proj.weight": (32, 32), f"{layer}mlp.down_proj.weight": (32, 64)}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (64, 32) for name in ("gate", "up")}
    shapes |= {"fc.weight": (32, 96), "lm_head.weight": (7, 32), "t2d": (64,), "d2t": (7,)}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["t2d"].nonzero().squeeze(-1).tolist() == VOCAB
    assert tensors["d2t"].dtype == torch.int64
    assert (tensors["d2t"] + torch.arange(7)).tolist() == VOCAB
    assert torch.equal(tensors["lm_head.weight"], target.lm_head.weight[VOCAB])
    config = config_of(folder)
    assert config["draft_vocab_size"] == 7
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 5]
    assert config["fc_norm"] is True
    assert config["norm_before_residual"] is False, "vLLM takes its absence for true"
    inner = config if layout == "eagle3" else config["transformer_layer_config"]
    assert inner["num_aux_hidden_states"] == 3, "of speculators vLLM reads it there"
    assert ("model_type" in config) == (layout == "eagle3"), "vLLM knows speculators by its absence"
    assert inner["model_type"] == "llama"
    assert inner["num_hidden_layers"] == 1
    assert inner["vocab_size"] == 64
    assert inner["rope_theta"] == 1e4
    assert inner["rope_scaling"] is None
    if layout == "eagle3":
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4], "by whose output it is"
        assert "norm_output" not in config
    else:
        spec = config["speculators_config"]
        assert config["speculators_model_type"] == spec["algorithm"] == "eagle3"
        assert spec["verifier"] == {"name_or_path": "somebody/target", "architectures": ["LlamaForCausalLM"]}
        assert spec["proposal_methods"][0]["proposal_type"] == spec["default_proposal_method"] == "greedy"
        assert spec["proposal_methods"][0]["speculative_tokens"] == 5
    loaded = load_feature_draft(folder, target)
    assert torch.equal(logits(loaded), logits(draft)), "rows of the target's head mean the whole of it"


@pytest.mark.parametrize("layout", ENGINES)
def test_with_all_tokens_there_is_no_mapping_of_them(target, tmp_path, layout):
    """vLLM makes none then, and refuses a checkpoint with tensors that it has no place for."""
    for ids in (None, reversed_(range(64))):
        folder = save(learnt(target), tmp_path, layout, draft_vocab=ids)
        assert {"t2d", "d2t"}.isdisjoint(load_file(folder / "model.safetensors"))
        assert config_of(folder)["draft_vocab_size"] == 64


@pytest.mark.parametrize("switches", [{}, {"fc_norm": False, "norm_before_fc": True}], ids=str)
@pytest.mark.parametrize("layout", ENGINES)
def test_states_are_joined_in_ascending_order_of_layers_as_engines_join_them(target, tmp_path, layout, switches):
    draft = learnt(target, aux_layers=[5, 2, 3], **switches)
    loaded = load_feature_draft(save(draft, tmp_path, layout), target)
    assert draft.config.aux_layers == [5, 2, 3]
    assert loaded.config.aux_layers == [2, 3, 5]
    assert config_of(tmp_path)["eagle_aux_hidden_state_layer_ids"] == [2, 3, 5]
    ids, states = torch.arange(7)[None], torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(0))
    last, first, middle = states.chunk(3, -1)
    with torch.no_grad():
        ours = draft(ids, features=states).logits
        theirs = loaded(ids, features=torch.cat([first, middle, last], -1)).logits
    torch.testing.assert_close(theirs, ours)
    change(tmp_path, eagle_aux_hidden_state_layer_ids=[5, 3, 2])
    assert load_feature_draft(tmp_path, target).config.aux_layers == [2, 3, 5], "as engines read it"


def reversed_(ids):
    return torch.tensor(ids).flip(0)


@pytest.mark.parametrize("layout", ENGINES)
@pytest.mark.parametrize("ids", [VOCAB, list(range(64))])
def test_a_head_of_its_own_is_kept_and_frozen_and_lacks_what_it_lacked(target, tmp_path, layout, ids):
    draft = learnt(target)
    folder = save(draft, tmp_path / "given", layout, draft_vocab=ids)
    rows = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(3))
    change(folder, {"lm_head.weight": rows})
    loaded = load_feature_draft(folder, target)
    states = logits(draft) @ torch.linalg.pinv(target.lm_head.weight.detach()).T  # after the last norm
    got = logits(loaded)
    torch.testing.assert_close(got[..., ids], states @ rows.T, rtol=1e-3, atol=1e-3)
    missing = [i for i in range(64) if i not in ids]
    assert (got[..., missing] == MISSING).all()
    assert (got.softmax(-1)[..., missing] < 1e-40).all()
    assert not any(p.requires_grad for p in loaded.lm_head.parameters())
    assert loaded.config.draft_vocab_size == len(ids)
    # It goes on as one: through our own layout, alone or with the target, and through an engine's.
    save_feature_draft(loaded, tmp_path / "osd")
    for again in (load_draft(tmp_path / "osd"), load_feature_draft(tmp_path / "osd", target)):
        assert torch.equal(logits(again), got)
    save(loaded, tmp_path / "again", layout)
    files = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    if len(ids) < 64:
        with pytest.raises(ValueError, match=r"`draft_vocab` has 2 tokens, 1 of which .* no row for.*from its 7"):
            save(loaded, tmp_path / "again", layout, draft_vocab=[0, 3])


def test_it_is_loaded_in_the_targets_dtype(tiny_llama, target, tmp_path):
    for layout in ("osd", "eagle3"):
        folder = save(learnt(target), tmp_path / layout, layout)
        half = tiny_llama(layers=6).to(torch.bfloat16)
        loaded = load_feature_draft(folder, half)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert loaded.lm_head.weight.data_ptr() == half.lm_head.weight.data_ptr(), "the same but for rounding"


def test_a_checkpoint_of_several_files_and_without_optional_parts_is_read(tiny_llama, tmp_path):
    target = tiny_llama(layers=8)
    draft = learnt(target, fc_norm=False)
    folder = save(draft, tmp_path, "eagle3")
    nothing = dict.fromkeys(
        ("eagle_config", "eagle_aux_hidden_state_layer_ids", "target_hidden_size", "draft_vocab_size")
    )
    change(
        folder, {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}, ("t2d", "d2t", "lm_head.weight"), **nothing
    )
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_feature_draft(folder, target)
    assert loaded.config.aux_layers == [2, 4, 5], "as EAGLE-3 has them"
    assert torch.equal(logits(loaded), logits(draft))


@pytest.mark.parametrize("layout", ["osd", "eagle3", "speculators"])
def test_one_grown_without_norms_before_fc_is_saved_without_them(target, tmp_path, layout):
    draft = grow_feature_draft(target, fc_norm=False)
    folder = save(draft, tmp_path, layout)
    assert not any("fc_norm" in name for name in load_file(folder / "model.safetensors"))
    assert config_of(folder)["fc_norm"] is False
    loaded = load_feature_draft(folder, target)
    assert not loaded.config.fc_norm
    assert torch.equal(logits(loaded), logits(draft))


def test_layers_are_read_by_either_count(target, tmp_path):
    folder = save(learnt(target), tmp_path, "eagle3")
    for config in (
        {"eagle_config": None},
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, "eagle_aux_hidden_state_layer_ids": None},
    ):
        change(folder, **config)
        assert load_feature_draft(folder, target).config.aux_layers == [2, 3, 5]


def test_older_weights_are_gone(target, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for layout in ("eagle3", "osd"):
        save(learnt(target), tmp_path, layout)
        assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("layout", ENGINES)
def test_an_engines_layout_needs_its_target(target, tmp_path, layout):
    save(learnt(target), tmp_path, layout)
    with pytest.raises(ValueError, match=rf"EAGLE-3 head in the layout '{layout}'.*hf_osd.load_feature_draft"):
        load_draft(tmp_path)
    with pytest.raises(ValueError, match=r"hf_osd.load_feature_draft"):
        OnlineAssistant.from_pretrained(tmp_path)


def test_another_target_is_refused(tiny_llama, target, tmp_path):
    others = {
        r"states of width 32 and those of the target \(LlamaForCausalLM\) have 16": tiny_llama(
            layers=6, hidden_size=16
        ),
        r"layers \[.*\] of \d and the target \(LlamaForCausalLM\) has 4 layers": tiny_llama(layers=4),
        r"has 64 tokens and the target \(LlamaForCausalLM\) 65": tiny_llama(layers=6, vocab=65),
    }
    for layout in ("osd", *ENGINES):
        folder = save(learnt(target), tmp_path / layout, layout)
        for message, other in others.items():
            with pytest.raises(ValueError, match=rf"{message}.*grow"):
                load_feature_draft(folder, other)
    with pytest.raises(ValueError, match=r"of 6 and the target \(LlamaForCausalLM\) has 8 layers.*grow"):
        load_feature_draft(tmp_path / "osd", tiny_llama(layers=8))


VARIANTS = {
    "a layer of another architecture \\(qwen3\\)": {"model_type": "qwen3"},
    "`attention_bias`": {"attention_bias": True},
    "`mlp_bias`": {"mlp_bias": True},
    "`hidden_act` \\(gelu\\)": {"hidden_act": "gelu"},
    "`layer_types`": {"layer_types": ["sliding_attention"]},
    "`num_hidden_layers` is 2": {"num_hidden_layers": 2},
    "rotates whole heads": {"partial_rotary_factor": 0.5},
    "'longrope'": {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
}


@pytest.mark.parametrize("message", VARIANTS)
@pytest.mark.parametrize("layout", ENGINES)
def test_variants_are_refused_by_name(target, tmp_path, layout, message):
    folder = save(learnt(target), tmp_path, layout)
    inside = "transformer_layer_config__" if layout == "speculators" else ""
    change(folder, **{inside + name: value for name, value in VARIANTS[message].items()})
    with pytest.raises(ValueError, match=rf"{message}.*(Choose|choose)"):
        load_feature_draft(folder, target)


@pytest.mark.parametrize(
    ("message", "tensors", "drop", "config"),
    [
        (r"lacks 'fc.weight' \(1 missing", {}, ["fc.weight"], {}),
        (r"lacks 'd2t', and has 7 of 64", {}, ["d2t", "t2d"], {}),
        (r"lacks 'lm_head.weight'", {}, ["lm_head.weight"], {}),
        (r"do not give 7 different tokens of 64", {"d2t": torch.full((7,), 60)}, [], {}),
        (r"do not give 7 different tokens of 64", {"d2t": -torch.arange(7)}, [], {}),
        (r"do not give 8 different tokens", {}, [], {"draft_vocab_size": 8}),
        (r"'t2d' of .* has other tokens", {"t2d": torch.ones(64, dtype=torch.bool)}, [], {}),
        (r"has 'midlayer.self_attn.q_norm.weight' \(1 such", {"midlayer.self_attn.q_norm.weight": torch.ones(8)}, [], {}),
        (r"embeddings of its own", {"embed_tokens.weight": torch.ones(64, 32)}, [], {}),
        (r"'fc.weight' is \(32, 64\) in .* should be \(32, 96\)", {"fc.weight": torch.ones(32, 64)}, [], {}),
        (r"lacks 'fc_norm.3.weight'", {}, [], {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 5]}),
        (r"config.json of the draft lacks 'hidden_size'", {}, [], {"hidden_size": None}),
        (r"`use_aux_hidden_state`", {}, [], {"eagle_config__use_aux_hidden_state": False}),
        (r"`quantization_config`", {}, [], {"quantization_config": {"bits": 4}}),
        (r"`parallel_drafting`", {}, [], {"mask_token_id": 3}),
        (r"`speculators_model_type` is 'dflash'", {}, [], {"speculators_model_type": "dflash"}),
        (r"is no feature-level draft", {}, [], {"architectures": ["LlamaForCausalLM"]}),
    ],
)  # fmt: skip
def test_incomplete_and_contradictory_checkpoints_are_refused(target, tmp_path, message, tensors, drop, config):
    folder = save(learnt(target), tmp_path, "eagle3", draft_vocab=VOCAB)
    change(folder, tensors, drop, **config)
    with pytest.raises(ValueError, match=message):
        load_feature_draft(folder, target)


def test_embeddings_that_are_the_targets_are_read(target, tmp_path):
    folder = save(learnt(target), tmp_path, "eagle3")
    change(folder, {"embed_tokens.weight": target.model.embed_tokens.weight.detach().to(torch.bfloat16)})
    loaded = load_feature_draft(folder, target)
    assert loaded.embed_tokens.weight.data_ptr() == target.model.embed_tokens.weight.data_ptr()


def test_weights_that_are_not_there_or_damaged_are_errors_of_the_disk(target, tmp_path):
    folder = save(learnt(target), tmp_path, "eagle3")
    (folder / "model.safetensors").write_bytes(b"12345678nonsense")
    with pytest.raises(OSError, match=r"damaged.*save or download"):
        load_feature_draft(folder, target)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(OSError, match=r"no model.safetensors.*safetensors alone: convert"):
        load_feature_draft(folder, target)


def test_what_a_layout_cannot_express_is_refused(tiny_llama, target, tmp_path):
    draft = learnt(target)
    with pytest.raises(ValueError, match=r"`layout` is 'gguf'; choose one of osd, eagle3, speculators"):
        save_feature_draft(draft, tmp_path, "gguf")
    with pytest.raises(ValueError, match=r"`draft_vocab` is for an engine's layout"):
        save_feature_draft(draft, tmp_path, draft_vocab=VOCAB)
    with pytest.raises(ValueError, match=r"`draft_vocab` has 2 tokens, 1 of which"):
        save_feature_draft(draft, tmp_path, "eagle3", draft_vocab=[3, 64])
    with pytest.raises(ValueError, match=r"`verifier` is not given.*pass verifier="):
        save_feature_draft(draft, tmp_path, "speculators")
    with pytest.raises(ValueError, match=r"after the last layer, 6, are normalised here"):
        save_feature_draft(grow_feature_draft(target, (2, 6)), tmp_path, "eagle3")
    phi = AutoModelForCausalLM.from_config(
        PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"LM head has a bias.*layout='osd'"):
        save_feature_draft(grow_feature_draft(phi), tmp_path, "eagle3")
    assert not list(tmp_path.iterdir())


def test_the_targets_name_is_kept_if_it_is_on_the_hub(tiny_llama, tmp_path):
    target = tiny_llama(layers=6, seed=2)
    for name, kept in (("somebody/model", "somebody/model"), (str(tmp_path), None), ("/not/here", None), ("", None)):
        target.config._name_or_path = name
        assert grow_feature_draft(target).config.target_name_or_path == kept
    target.config._name_or_path = "somebody/model"
    save_feature_draft(grow_feature_draft(target), tmp_path, "speculators")
    assert config_of(tmp_path)["speculators_config"]["verifier"]["name_or_path"] == "somebody/model"
