"""An assistant whose draft reads the target's states, from its first request to a restart."""

import pytest
import torch

from hf_osd import OnlineAssistant, cli, grow_feature_draft, load_feature_draft
from hf_osd.distill.scoring import score_by_step

from .served import alone

ASKED = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
LEARNS = {"gate": False, "learning_budget": 1.0, "learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4, bos_token_id=None, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(3, 60, (4, 1, 6), generator=torch.Generator().manual_seed(0))


def serve(target, assistant, prompts):
    """Answer all prompts as the target alone does."""
    for prompt in prompts:
        asked = {**ASKED, "attention_mask": torch.ones_like(prompt)}
        output = target.generate(prompt, assistant_model=assistant, **asked)
        assert torch.equal(output, alone(target, prompt, **asked))


@pytest.mark.parametrize("learn", ["inline", "background", "process"])
def test_it_learns_what_it_serves(target, prompts, learn):
    """Sixteen times the same four prompts: it knows them in the end, wherever it learns."""
    config = {**LEARNS, "learn": learn, "update_interval": 4, "suffix_cache": False, "lookahead": "constant"}
    with OnlineAssistant(grow_feature_draft(target, seed=0), **config) as assistant:
        serve(target, assistant, prompts)
        before = assistant.stats.last.alpha
        for _ in range(8):
            serve(target, assistant, prompts)
            assistant.flush()
        serve(target, assistant, prompts)
        stats = assistant.stats
        assert (stats.failed_updates, stats.draft_version > 0) == (0, True)
        assert stats.last.alpha > max(before, 0.5)
        first = torch.cat(score_by_step(assistant.serving.active, assistant.buffer.requests() or [], 1), -1)
        assert learn == "process" or float(first.nanmean()) > 0.5


def test_what_was_learnt_is_saved_and_drafts_on(target, prompts, tmp_path):
    config = {**LEARNS, "update_interval": 4, "suffix_cache": False, "lookahead": "constant", "draft_cost": 0.2}
    assistant = OnlineAssistant(grow_feature_draft(target, seed=0), **config)
    for _ in range(6):
        serve(target, assistant, prompts)
    assistant.flush()
    assistant.save_pretrained(tmp_path)
    loaded = OnlineAssistant.from_pretrained(tmp_path)
    again = OnlineAssistant(load_feature_draft(tmp_path, target), **config)
    alphas = []
    for one in (assistant, loaded, again):
        one.close()
        serve(target, one, prompts)
        alphas.append(one.stats.last.alpha_live)
    assert alphas[0] > 0.3
    assert alphas == alphas[:1] * 3


def test_a_state_goes_on_where_it_was(target, prompts, tmp_path):
    config = {**LEARNS, "update_interval": 4, "suffix_cache": False, "lookahead": "constant"}
    first = OnlineAssistant(grow_feature_draft(target, seed=0), **config)
    for _ in range(3):
        serve(target, first, prompts)
    first.flush()
    first.save_state(tmp_path, with_buffer=True)
    second = OnlineAssistant(grow_feature_draft(target, seed=0), **config)
    second.load_state(tmp_path)
    for (name, one), (_, other) in zip(first.serving.weights(), second.serving.weights(), strict=True):
        assert torch.equal(one, other), name
    kept = [request.states.codes for request in second.buffer.requests()]
    assert [codes.tolist() for codes in kept] == [r.states.codes.tolist() for r in first.buffer.requests()]
    serve(target, second, prompts)


def test_a_buffer_that_holds_few_requests_is_named_once(target, prompts, caplog):
    config = {**LEARNS, "update_interval": 10**6, "suffix_cache": False, "lookahead": "constant"}
    assistant = OnlineAssistant(grow_feature_draft(target, seed=0), **config, buffer_bytes=30_000)
    for _ in range(3):
        serve(target, assistant, prompts)
    assistant.update()
    assert assistant.buffer.crowded
    [warning] = [r.message for r in caplog.records if "buffer_bytes" in r.message]
    assert "little to learn from" in warning
    roomy = OnlineAssistant(grow_feature_draft(target, seed=0), **config)
    assert roomy.buffer.max_bytes > assistant.buffer.max_bytes


def test_its_one_layer_learns_whole(target):
    with pytest.raises(ValueError, match=r"adapter=.lora."):
        OnlineAssistant(grow_feature_draft(target), adapter="lora")


def test_the_command_grows_one(target, tmp_path, capsys):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    target.save_pretrained(tmp_path / "target")
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path / "target")
    asked = [str(tmp_path / "target"), str(tmp_path / "draft"), "--kind", "feature", "--layers", "1,2,4"]
    assert cli.main(["grow", *asked]) == 0
    assert "to train" in capsys.readouterr().out
    assert load_feature_draft(tmp_path / "draft", target).config.aux_layers == [1, 2, 4]
    assert cli.main(["grow", *asked[:1], str(tmp_path / "other"), "--kind", "feature", "--layers", "9"]) == 2
