"""What serving engines read of an exported draft: config and weights as vLLM and SGLang load them, and what they refuse. Neither is needed here."""

import json

import pytest
import torch
from safetensors import safe_open

from hf_osd import OnlineAssistant, grow_draft

PROMPTS = torch.randint(2, 64, (4, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 12, "do_sample": False}
# Beside the config and the weights; engines pass over what they do not know.
OTHERS = {"README.md", "osd_config.json", "generation_config.json"}


def refusal(folder, target) -> str | None:
    """Why an engine would not load `folder` as the draft of `target`, or nothing. vLLM 0.32 loads every *.safetensors of the folder into the class
    that `architectures` names, and raises on a tensor that this does not have; SGLang 0.5.23 reads the same files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        return "no config.json"
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != [type(target).__name__] or config["model_type"] != target.config.model_type:
        return f"architectures {config['architectures']}, model_type {config['model_type']}"
    if found := {"auto_map", "quantization_config"} & set(config):
        return f"config with {found}"
    if config["vocab_size"] != target.config.vocab_size:
        return f"vocab_size {config['vocab_size']}"
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    if config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if file.metadata() != {"format": "pt"}:
                return f"{path.name} with metadata {file.metadata()}"
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if tensors.keys() != expected.keys():
        return f"tensors {tensors.keys() ^ expected.keys()}"
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or str(tensor.dtype) != f"torch.{config['dtype']}":
            return f"{name} of {tensor.shape} in {tensor.dtype}"
    return None


def learnt(target, draft, **settings) -> OnlineAssistant:
    """An assistant whose draft an update has changed."""
    assistant = OnlineAssistant(draft, update_interval=2, learning_rate=1e-2, gate=False, seed=0, **settings)
    for prompt in PROMPTS:
        target.generate(prompt, assistant_model=assistant, **GREEDY)
    assistant.flush()
    assert assistant.stats.updates > 0
    return assistant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_an_exported_draft_is_a_checkpoint_that_engines_read(tiny_llama, tmp_path, tied, dtype):
    target = tiny_llama(layers=3, tie_word_embeddings=tied).to(dtype)
    draft = grow_draft(target)
    assert draft.config.tie_word_embeddings == tied
    assistant = learnt(target, draft)
    assistant.save_pretrained(tmp_path)
    assert refusal(tmp_path, target) is None
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"} | OTHERS
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    serving = assistant.serving.active.state_dict()
    assert all(torch.equal(saved[name], serving[name]) for name in saved)
    assert any(not torch.equal(saved[name], tensor) for name, tensor in draft.state_dict().items() if name in saved)


@pytest.mark.parametrize("head", ["traffic", "low_rank"])
def test_a_draft_that_served_with_part_of_its_head_is_exported_whole(tiny_llama, tmp_path, head):
    target = tiny_llama(layers=3)
    learnt(target, grow_draft(target), draft_head=head, draft_vocab_size=16).save_pretrained(tmp_path)
    assert refusal(tmp_path, target) is None


def test_the_tokenizer_beside_it_is_the_targets_token_by_token(tiny_llama, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    OnlineAssistant(tiny_llama()).save_pretrained(tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert refusal(tmp_path, tiny_llama()) is None


def test_a_learners_state_in_the_same_folder_is_not_taken_for_weights(tiny_llama, tmp_path):
    target = tiny_llama(layers=3)
    assistant = learnt(target, grow_draft(target))
    assistant.save_pretrained(tmp_path)
    assistant.save_state(tmp_path, with_buffer=True)
    assert refusal(tmp_path, target) is None


def test_an_adapter_is_refused_and_its_merge_is_not(tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    target = tiny_llama(layers=3)
    draft = get_peft_model(grow_draft(target), LoraConfig(target_modules="all-linear", r=4))
    assistant = learnt(target, draft)
    assistant.save_pretrained(tmp_path / "adapter")
    assert refusal(tmp_path / "adapter", target) is not None
    before = {name: p.clone() for name, p in assistant.serving.active.named_parameters()}
    assistant.save_pretrained(tmp_path / "merged", merge=True)
    assert all(torch.equal(p, before[name]) for name, p in assistant.serving.active.named_parameters())
    assert refusal(tmp_path / "merged", target) is None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected, fresh = (model(PROMPTS[0]).logits for model in (assistant.serving.active, draft))
        torch.testing.assert_close(merged(PROMPTS[0]).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, fresh, atol=1e-2), "it learnt"


def test_a_draft_of_another_vocabulary_keeps_it_and_is_refused(tiny_llama, tmp_path):
    OnlineAssistant(tiny_llama(vocab=60)).save_pretrained(tmp_path)
    assert refusal(tmp_path, tiny_llama()) == "vocab_size 60"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors | {"hf_osd.rows": torch.zeros(2)},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "norm" not in name},
        lambda tensors: {name: tensor.double() for name, tensor in tensors.items()},
    ],
)
def test_the_check_itself_finds_tensors_that_engines_do_not_know_or_miss(tiny_llama, tmp_path, spoil):
    from safetensors.torch import load_file, save_file

    target = tiny_llama(layers=3)
    OnlineAssistant(grow_draft(target)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(spoil(load_file(path)), path, metadata={"format": "pt"})
    assert refusal(tmp_path, target) is not None
