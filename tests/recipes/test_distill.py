"""The main job on a tiny model: its files, how it stops and goes on, and errors for bad input."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_osd import OnlineAssistant, grow_draft, load_feature_draft
from hf_osd.learning.background import BackgroundLearner
from hf_osd.saving.feature_drafts import layout_of
from recipes import distill
from recipes.common import run_log


@pytest.fixture
def run(target_dir, words, tmp_path):
    """`run(*flags) -> exit status` on two streams of 14 prompts, into tmp_path/out."""
    for domain in ("one", "two"):
        rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5 + i % 3))} for i in range(14)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*flags, stream=None):
        stream = stream or f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"
        settings = ["--target", target_dir, "--draft", "grow:0,-1", "--stream", stream, "--requests", "8"]
        settings += ["--held_back", "4", "--parity", "3", "--max_new_tokens", "8", "--update_interval", "3"]
        settings += ["--gate", "false", "--learning_rate", "1e-3", "--learning_budget", "1", "--threads", "1"]
        settings += ["--output_dir", tmp_path / "out", "--checkpoint_every", "4", "--log_every", "4", "--seed", "0"]
        return distill.main([str(flag) for flag in (*settings, *flags)])

    call.out = tmp_path / "out"
    return call


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.pictures
def test_it_writes_metrics_summary_curves_and_a_draft(run):
    assert run() == 0
    rows = read(run.out / "metrics.jsonl")
    assert [row["request"] for row in rows] == list(range(16))
    names = "request domain new_tokens rounds drafted accepted accepted_from_draft tested alpha alpha_live decode_seconds learn_seconds updates"
    assert set(rows[0]) == set(names.split())
    assert [row["domain"] for row in rows] == ["one"] * 8 + ["two"] * 8
    summary = json.loads((run.out / "summary.json").read_text())
    for figures in summary["domains"].values():
        assert figures["requests"] == 8
        assert figures["compared"] == 3
        assert figures["mismatches"] == 0
        assert figures["identical_share"] == 1.0
        assert 0 <= figures["alpha_before"] <= 1
        assert 0 <= figures["alpha_after"] <= 1
        assert figures["alpha_by_step_before"] == [figures["alpha_before"]], "a draft that reads tokens has one α"
        assert figures["alpha_by_step"] == [figures["alpha_after"]]
        assert figures["gain_of_learning"] > figures["gain_of_learning_end_to_end"] > 0
        low, high = figures["gain_of_learning_interval"]
        assert low <= figures["gain_of_learning"] <= high
        assert len(figures["share_from_draft_by_fifth"]) == 5
    overall = summary["overall"]
    assert overall["target_forwards"] == overall["rounds"] == sum(row["rounds"] for row in rows)
    assert all(0 <= share <= 1 for share in overall["acceptance_by_position"])
    assert overall["updates"] == 6
    assert overall["failed_updates"] == 0
    assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert AutoModelForCausalLM.from_pretrained(run.out / "draft").config.num_hidden_layers == 2
    assert "| one | 8 |" in (run.out / "draft" / "README.md").read_text()


def test_a_draft_that_reads_states_is_scored_by_step_and_taught(run, capsys):
    """Held-back and warm-up answers have the states that it reads."""
    assert (
        run(
            "--draft",
            "feature",
            "--warm_up",
            "2",
            "--update_interval",
            "2",
            "--lookahead",
            "constant",
            "--learning_rate",
            "5e-3",
        )
        == 0
    )
    summary = json.loads((run.out / "summary.json").read_text())
    for figures in summary["domains"].values():
        assert (figures["mismatches"], figures["identical_share"]) == (0, 1.0)
        assert (figures["held_back"], figures["requests"]) == (4, 8)
        for alpha, steps in (("alpha_before", "alpha_by_step_before"), ("alpha_after", "alpha_by_step")):
            assert len(figures[steps]) == 3
            assert 0 <= figures[alpha] == figures[steps][0] <= 1
        assert figures["share_from_draft"] in (1.0, None), "this policy leaves the cache out"
    assert read(run.out / "metrics.jsonl")[0]["updates"] > 0, "the warm-up taught it"
    assert (summary["overall"]["updates"] > 0, summary["overall"]["failed_updates"]) == (True, 0)
    printed = capsys.readouterr().out
    for head in ("after, by step", "gain of learning", "gain end to end", "accepted from draft, by fifths"):
        assert head in printed


def test_a_draft_is_saved_as_serving_engines_read_it(run, refused, target_dir):
    feature = ("--draft", "feature:1,2", "--layout")
    assert run(*feature, "eagle3", "--requests", "3") == 0
    draft = load_feature_draft(run.out / "draft", AutoModelForCausalLM.from_pretrained(target_dir))
    assert draft.config.aux_layers == [1, 2]
    assert "`eagle3`" in (run.out / "draft" / "README.md").read_text()
    refused(run, "--overwrite", "--layout", "eagle3", says="Leave `layout` out")
    refused(run, "--overwrite", *feature, "speculators", "--push_to_hub", "me/it", says="push with --layout eagle3")
    assert layout_of(run.out / "draft") == "eagle3", "refused before anything is written"


def test_an_interrupted_run_saves_what_was_learnt_and_goes_on(run, monkeypatch):
    straight = run.out.parent / "straight"
    assert run("--output_dir", straight) == 0
    seen = []
    add = run_log.RunLog.add

    def interrupting(self, *args):
        if len(seen) == 10:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(None)
        return add(self, *args)

    monkeypatch.setattr(run_log.RunLog, "add", interrupting)
    assert run() == 130
    assert (run.out / "draft" / "model.safetensors").is_file()
    assert len(read(run.out / "metrics.jsonl")) == 10
    assert run("--resume") == 0
    rows, whole = read(run.out / "metrics.jsonl"), read(straight / "metrics.jsonl")
    assert [row["request"] for row in rows] == list(range(16))
    assert [row["new_tokens"] for row in rows] == [row["new_tokens"] for row in whole]
    before = [
        json.loads((out / "summary.json").read_text())["domains"]["one"]["alpha_before"] for out in (run.out, straight)
    ]
    assert before[0] == before[1]  # of the draft as serving began, not as it was resumed


def test_a_checkpoint_of_other_settings_is_not_resumed(run, refused):
    assert run() == 0
    refused(run, "--resume", "--max_new_tokens", "9", says="max_new_tokens")


@pytest.mark.parametrize("learn", ["inline", "background"])
def test_warm_up_learns_before_serving_begins(run, learn, monkeypatch):
    """An interval at a time, so that what one has taught is judged by the next; though the thread that learns beside serving takes its time."""
    monkeypatch.setattr(BackgroundLearner, "_start", lambda learner: None)
    assert run("--warm_up", "2", "--update_interval", "2", "--learn", learn) == 0
    assert read(run.out / "metrics.jsonl")[0]["updates"] >= 2


def test_rehearsal_teaches_more_of_the_same_requests(run):
    """Each is answered once more, and every interval an update is more than without."""
    figures = []
    flags = ["--replay_ratio", "0", "--prompt_positions", "0", "--update_interval", "2", "--overwrite"]
    for temperature in ("0.0", "0.7"):
        assert run("--rehearse", temperature, *flags) == 0
        summary = json.loads((run.out / "summary.json").read_text())
        assert all(domain["mismatches"] == 0 for domain in summary["domains"].values())
        assert all(domain["requests"] == 8 for domain in summary["domains"].values())
        figures.append(summary["overall"])
    without, rehearsed = figures
    assert without["target_forwards"] == without["rounds"]
    assert rehearsed["target_forwards"] == rehearsed["rounds"], "of requests alone"
    assert (without["updates"], rehearsed["updates"]) == (8, 16)
    assert 1.5 * without["learned_tokens"] < rehearsed["learned_tokens"] <= 2 * without["learned_tokens"]


def test_a_stream_can_be_served_in_random_order(run, monkeypatch):
    from recipes.common import models

    assert run("--requests", "6") == 0
    in_turn = [row["alpha"] for row in read(run.out / "metrics.jsonl")]
    monkeypatch.setattr("recipes.common.domains.shuffled", lambda rows, seed: models.shuffled(rows, seed)[::-1])
    asked = []
    monkeypatch.setattr(
        "recipes.common.comparison.answer",
        lambda *args, **kwargs: (asked.append(args[1].tolist()), models.answer(*args, **kwargs))[1],
    )
    assert run("--requests", "6", "--overwrite") == 0
    own, asked[:] = list(asked), []
    assert run("--requests", "6", "--shuffle", "true", "--overwrite") == 0
    assert len(in_turn) == 12
    assert asked != own


def test_a_prompt_longer_than_the_window_is_skipped_and_counted(run, words, tmp_path, caplog):
    rows = [{"prompt": " ".join(words[(i + j) % 62] for j in range(600 if i == 3 else 6))} for i in range(14)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        assert run(stream=tmp_path / "long.jsonl") == 0
    assert "skipped 1 prompts" in caplog.text
    assert json.loads((run.out / "summary.json").read_text())["domains"]["long"]["skipped"] == 1


def test_the_draft_is_pushed_with_its_figures_if_asked(run, monkeypatch):
    from hf_osd import OnlineAssistant

    pushed = []
    monkeypatch.setattr(OnlineAssistant, "push_to_hub", lambda self, repo, **kwargs: pushed.append((repo, kwargs)))
    assert run("--push-to-hub", "me/draft") == 0
    [(repo, kwargs)] = pushed
    assert repo == "me/draft"
    assert set(kwargs["card"]["domains"]) == {"one", "two"}
    assert kwargs["processing_class"] is not None
    assert "private" not in kwargs  # the default, which is private


def test_figures_go_to_the_trainers_own_trackers(run, monkeypatch):
    from transformers import TrainerCallback, integrations

    heard = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            heard.append(("begin", args.run_name, model.config.num_hidden_layers))

        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append((state.global_step, set(logs)))

        def on_train_end(self, args, state, control, **kwargs):
            heard.append("end")

    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [Tracker])
    assert run("--report_to", "trackio") == 0
    figures = {"alpha", "tokens_per_round", "tokens_per_second"}
    assert heard == [("begin", "out", 2), *((n, figures) for n in (4, 8, 12, 16)), "end"]


@pytest.mark.parametrize("kind", ["padded head", "another tokenizer"])
def test_a_draft_of_another_vocabulary_is_served_scored_and_taught(run, brought_draft, kind):
    """What it learns and is scored on is in its own tokens, and the draft that is saved goes on from there."""
    brought = brought_draft(kind)
    settings = ["--warm_up", "2", "--lookahead", "constant", "--learning_rate", "5e-3"]
    assert run("--draft", brought, *settings) == 0
    summary = json.loads((run.out / "summary.json").read_text())
    for figures in summary["domains"].values():
        assert (figures["mismatches"], figures["identical_share"]) == (0, 1.0)
        assert (figures["held_back"], figures["requests"]) == (4, 8)
        assert 0 <= figures["alpha_before"] <= 1
    assert sum(d["alpha_after"] - d["alpha_before"] for d in summary["domains"].values()) > 0
    assert summary["overall"]["updates"] > 0
    assert summary["overall"]["failed_updates"] == 0
    saved = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (run.out / "draft", brought)]
    assert saved[0] == saved[1]
    assert run("--draft", run.out / "draft", "--output_dir", run.out.parent / "again", "--requests", "1") == 0


def test_a_draft_of_another_vocabulary_without_a_tokenizer_is_named(run, refused, brought_draft):
    brought = brought_draft("padded head", tokenizer=False)
    refused(run, "--draft", brought, says=f"the draft {brought} 72, and there is no tokenizer")
    assert not (run.out / "draft").exists()


def test_another_tokenizer_of_the_same_size_is_refused_before_it_drafts_nonsense(run, refused, brought_draft):
    brought = brought_draft("another tokenizer", rows=64)
    refused(run, "--draft", brought, says="resize_token_embeddings(65)")
    draft = AutoModelForCausalLM.from_pretrained(brought)
    draft.resize_token_embeddings(65, mean_resizing=False)
    draft.save_pretrained(brought)
    assert run("--draft", brought, "--requests", "1") == 0


def test_a_draft_whose_requests_cannot_be_rehearsed_is_refused_before_any_work(run, refused, brought_draft):
    refused(run, "--draft", brought_draft("padded head"), "--rehearse", "0.7", says="vocabulary of 72")
    assert not (run.out / "metrics.jsonl").exists()


def test_rehearsing_what_another_rank_learns_is_refused_before_any_work(run, refused, monkeypatch):
    init = distill.Processes.__init__

    def with_roles(processes, mode):
        init(processes, "together")
        processes.roles = SimpleNamespace(learns=False)

    monkeypatch.setattr(distill.Processes, "__init__", with_roles)
    monkeypatch.setattr(distill, "serve_separately", lambda assistant, roles: setattr(assistant, "learner", object()))
    monkeypatch.setattr("recipes.common.answers.record_answers", None)
    refused(run, "--mode", "separate", "--rehearse", "0.7", says="another rank learns")


def test_answers_longer_than_the_drafts_window_are_left_out(run, refused, tiny_llama, tmp_path, caplog):
    tiny_llama(layers=1, max_position_embeddings=14).save_pretrained(tmp_path / "short")
    with caplog.at_level(logging.WARNING):
        assert run("--draft", tmp_path / "short", "--max_new_tokens", "8") == 0
    assert "longer than the draft's window of 14" in caplog.text
    rows = (run.out / "metrics.jsonl").read_bytes()
    flags = ["--draft", tmp_path / "short", "--max_new_tokens", "16", "--overwrite"]
    refused(run, *flags, says="window of 14 tokens")
    assert (run.out / "metrics.jsonl").read_bytes() == rows, "what is refused touches nothing"


def test_a_draft_with_an_adapter_goes_on_learning_in_it(run, target_dir):
    """A LoRA draft that an assistant has saved, and the main job saves again: its base is as it was."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    draft = get_peft_model(grow_draft(AutoModelForCausalLM.from_pretrained(target_dir)), lora)
    brought = run.out.parent / "adapter"
    OnlineAssistant(draft).save_pretrained(brought)
    assert run("--draft", brought, "--warm_up", "2", "--requests", "4") == 0
    assert json.loads((run.out / "summary.json").read_text())["overall"]["failed_updates"] == 0
    saved = run.out / "draft"
    for name, changes in (("adapter_model.safetensors", True), ("model.safetensors", False)):
        old, new = (load_file(folder / name) for folder in (brought, saved))
        assert old.keys() == new.keys()
        assert any(not torch.equal(old[key], new[key]) for key in old) == changes, name
    assert run("--draft", saved, "--requests", "1", "--output_dir", run.out.parent / "again") == 0


def test_an_encoder_decoder_has_a_draft_of_its_kind(run, refused, target_dir, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "initializer_factor": 3.0}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    for name, layers in (("target", 2), ("draft", 1)):
        torch.manual_seed(layers)
        T5ForConditionalGeneration(T5Config(**sizes, **tokens, num_layers=layers)).save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(target_dir).save_pretrained(tmp_path / "target")
    pair = ["--target", tmp_path / "target", "--draft", tmp_path / "draft", "--lookahead", "constant"]
    assert run(*pair, "--warm_up", "2", "--learning_rate", "5e-3") == 0
    summary = json.loads((run.out / "summary.json").read_text())
    for figures in summary["domains"].values():
        assert (figures["mismatches"], figures["identical_share"]) == (0, 1.0)
        assert 0 <= figures["alpha_before"] <= 1
    assert sum(d["alpha_after"] - d["alpha_before"] for d in summary["domains"].values()) > 0
    assert (summary["overall"]["updates"] > 0, summary["overall"]["failed_updates"]) == (True, 0)
    again = ["--draft", run.out / "draft", "--requests", "1", "--output_dir", tmp_path / "again"]
    assert run(*pair, *again) == 0
    other = ["--output_dir", tmp_path / "other"]
    refused(run, *pair, "--draft", target_dir, *other, says="and the draft")
    refused(run, "--draft", tmp_path / "draft", *other, says="a draft of the target's kind")
    refused(run, *pair, "--draft", "grow:0", *other, says="decoder-only")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft", "grow:0,x"], "grow:0,x"),
        (["--draft", "grow:0,9"], "layers"),
        (["--requests", "0"], "requests"),
        (["--dtype", "int8"], "int8"),
        (["--held_back", "13"], "held"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--rehearse", "-1"], "rehearse"),
        (["--lookahead", "hope"], "hope"),
        (["--stream", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--draft", "no/such/draft/here"], "no/such/draft/here"),
    ],
)
def test_bad_input_is_named_before_any_work(run, refused, flags, message):
    refused(run, *flags, says=message)
    assert not (run.out / "draft").exists()


def test_a_malformed_line_is_named_by_its_number(run, refused, tmp_path, caplog):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": \n')
    refused(run, stream=tmp_path / "bad.jsonl", says="bad.jsonl")
    assert "2" in caplog.text.split("bad.jsonl", 1)[1][:20]


def test_a_config_key_that_does_not_exist_is_named(tmp_path, refused):
    config = tmp_path / "c.yaml"
    config.write_text("stream: stdlib\nlerning_rate: 0.1\n")
    refused(distill.main, ["--config", str(config)], says="lerning_rate")


def test_the_presets_in_yaml_are_those_of_the_library():
    from trl import TrlParser

    from hf_osd import OnlineConfig

    configs = distill.Path(distill.__file__).parent / "configs"
    for name, preset in (("default", OnlineConfig(seed=0)), ("paper", OnlineConfig.paper(seed=0))):
        parser = TrlParser((distill.DistillArguments, OnlineConfig))
        _, config = parser.parse_args_and_config(["--config", str(configs / f"{name}.yaml"), "--stream", "x.jsonl"])
        assert config == preset
