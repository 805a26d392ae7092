"""The model card: the figures there are, with the counts behind them, and nothing that says more than it should."""

import getpass
import math
import platform

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from hf_osd import OnlineConfig
from hf_osd.metrics.intervals import Comparison, Estimate
from hf_osd.metrics.stats import CallStats, Stats
from hf_osd.policy.lookahead import DraftPolicy
from hf_osd.policy.report import observed_speedup
from hf_osd.saving.model_card import machine_facts, model_card

SQL = {"requests": 40, "held_back": 16, "alpha_before": 0.31, "alpha_after": 0.62, "compared": 12}


def served() -> Stats:
    stats = Stats(updates=3, learned_tokens=1234)
    for alpha in (0.25, 0.75):
        call = CallStats(requests=1, overlap_sum=10 * alpha, overlap_count=10, target_seconds=0.5)
        call.observe_round(drafted=5, tested=5, accepted=4, new_tokens=5)
        stats.observe_call(call)
    return stats


def judged(requests=9) -> Estimate:
    return Estimate(0.61, 0.5, 0.7, requests, Comparison(requests, 0.42, 0.61, 0.19, 0.1, 0.3))


def measured() -> DraftPolicy:
    lookahead = DraftPolicy("cost", 5, None, 0.0)
    for n, seconds in ((1, 0.2), (2, 0.22), (6, 0.3)):
        for _ in range(3):
            lookahead.costs.observe_target(n, seconds)
    lookahead.costs.observe_draft(4, 0.16)
    return lookahead


def test_the_card_has_the_figures_and_the_counts_behind_them():
    card = model_card(served())
    assert "2 requests, 3 updates on 1234 token positions" in card
    assert "| alpha (expected acceptance, last 2 requests) | 0.500 | 20 positions |" in card
    assert "| alpha_live (accepted / tested, last 2 requests) | 0.800 | 8 of 10 tokens |" in card
    assert "| tokens a round (last 2 requests) | 5.000 | 10 tokens, 2 rounds |" in card


def test_it_has_alpha_with_and_without_learning_on_the_last_requests():
    stats = served()
    stats.estimate = judged()
    card = model_card(stats)
    of = "the last 9 requests, each before it was learnt"
    assert f"| alpha_static (without any learning) | 0.420 | {of} |" in card
    assert f"| alpha_prequential | 0.610 (0.500 to 0.700) | {of} |" in card
    [result] = ModelCard(card).data.eval_results
    assert (result.metric_type, result.metric_value) == ("alpha_prequential", 0.61)
    assert result.metric_args == {"requests": 9, "low": 0.5, "high": 0.7}


def test_one_request_says_nothing():
    stats = served()
    stats.estimate = Estimate(0.61, 0.0, 1.0, 1, Comparison(1, 0.4, 0.6, 0.2, -math.inf, math.inf))
    card = model_card(stats)
    assert "prequential" not in card
    assert "inf" not in card


def test_it_has_what_drafting_and_verifying_took_and_the_speed_up():
    card = model_card(served(), lookahead=measured())
    assert "| c (a draft step, in one-token target steps) | 0.200 | measured while serving |" in card
    assert "v(2) = 1.10" in card
    assert "v(6) = 1.50" in card
    # 10 tokens at 0.2 s each, plainly; they took 1 s.
    assert "| speed-up over plain decoding (last 2 requests, prompts included) | 2.000 | 10 tokens |" in card


def test_costs_that_were_given_are_not_said_to_be_measured():
    card = model_card(served(), lookahead=DraftPolicy("cost", 5, 0.3, 0.1))
    assert "| c (a draft step, in one-token target steps) | 0.300 | given, not measured |" in card
    assert "measured while serving" not in card
    assert "speed-up over plain" not in card


def test_a_speed_up_is_known_only_when_a_plain_step_is():
    assert observed_speedup(served().rolling, measured()) == pytest.approx(2.0)
    assert observed_speedup(served().rolling, DraftPolicy("cost", 5, 0.3, 0.1)) is None
    assert observed_speedup(CallStats(), measured()) is None


def test_the_hub_can_read_its_metadata(tmp_path):
    text = model_card(served(), target="some/target", license="apache-2.0", domains={"sql": SQL}, repo_id="me/draft")
    data = ModelCard(text).data
    assert data.base_model == "some/target"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert "speculative-decoding" in data.tags
    assert "with `some/target`" in text
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == data.to_dict()
    [model] = metadata_load(tmp_path / "README.md")["model-index"]
    assert model["name"] == "draft"
    [result] = model["results"]
    assert result["dataset"] == {"name": "sql", "type": "sql"}
    metrics = {metric["type"]: (metric["value"], metric["args"]) for metric in result["metrics"]}
    counts = {"requests": 40, "held_back": 16}
    assert metrics == {"alpha_before": (0.31, counts), "alpha_after": (0.62, counts)}


def test_speed_ups_of_a_domain_are_in_it_with_the_requests_compared():
    figures = SQL | {"speedup_decode": 1.53, "speedup_end_to_end": 1.21, "skipped": 3, "identical_share": 1.0}
    card = model_card(served(), domains={"sql": figures})
    head = "| domain | requests | held_back | alpha_before | alpha_after | compared | speedup_decode | speedup_end_to_end |"
    assert f"{head}\n" in card
    assert "| sql | 40 | 16 | 0.310 | 0.620 | 12 | 1.530 | 1.210 |" in card
    found = {r.metric_type: (r.metric_value, r.metric_args) for r in ModelCard(card).data.eval_results}
    assert found["speedup_decode"] == (1.53, {"requests": 40, "compared": 12})
    assert found["speedup_end_to_end"] == (1.21, {"requests": 40, "compared": 12})


def test_the_gain_of_learning_stands_beside_the_speed_ups():
    gain = {"gain_of_learning": 1.1, "gain_of_learning_end_to_end": 0.95, "gain_of_learning_interval": [1.0, 1.2]}
    card = model_card(served(), domains={"sql": SQL | {"speedup_decode": 1.53, "alpha_by_step": [0.6, None]} | gain})
    assert "| compared | speedup_decode | gain_of_learning | gain_of_learning_end_to_end |\n" in card
    assert "| 12 | 1.530 | 1.100 | 0.950 |" in card
    found = {r.metric_type: (r.metric_value, r.metric_args) for r in ModelCard(card).data.eval_results}
    assert found["gain_of_learning"] == (1.1, {"requests": 40, "compared": 12})


def test_a_licence_of_the_targets_own_has_a_name_and_a_link():
    card = model_card(Stats(), license="other", license_name="theirs", license_link="https://example.com/licence")
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "theirs", "https://example.com/licence")


def test_a_path_of_this_machine_stays_on_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "target").mkdir(parents=True)
    for path in ("/home/somebody/target", "./target", "../target", "~/target", "C:\\target", "models/target"):
        card = model_card(served(), target=path, domains={f"{path}.jsonl": SQL})
        assert "base_model" not in card
        assert path not in card.replace(f"{path}.jsonl", "")
    assert "somebody" not in model_card(served(), domains={"/home/somebody/sql": SQL})


def test_a_draft_that_never_served_has_a_card_without_nan():
    card = model_card(Stats())
    assert "nan" not in card.lower()
    assert "| - |" in card
    assert "model-index" not in card


def test_figures_that_were_not_measured_are_dashes_and_no_results():
    domains = {
        "code": {"requests": 40, "alpha_before": 0.31, "alpha_after": 0.62},
        "chat": {"requests": 2, "alpha_before": None, "alpha_after": float("nan")},
        "maths": {"requests": 3},
    }
    card = model_card(served(), domains=domains)
    assert "| code | 40 | 0.310 | 0.620 |" in card
    assert "| chat | 2 | - | - |" in card
    assert "| maths | 3 | - | - |" in card
    assert "nan" not in card.lower()
    assert {result.dataset_name for result in ModelCard(card).data.eval_results} == {"code"}
    assert "domain" not in model_card(served())


def test_a_name_cannot_break_the_table():
    card = model_card(served(), domains={"a|b\nc": SQL})
    assert "| a/b c | 40 |" in card


def test_the_recipe_is_what_differs_from_the_defaults():
    card = model_card(served(), config=OnlineConfig(learning_rate=0.003, ensemble=[1, 2]))
    assert "- learning_rate: `0.003`" in card
    assert "- ensemble: `[1, 2]`" in card
    assert "batch_size" not in card
    assert "OnlineConfig: its defaults\n" in model_card(served(), config=OnlineConfig())


def test_the_machine_is_told_by_what_it_is_and_not_by_its_name():
    facts = machine_facts(torch.device("cpu"), torch.bfloat16)
    card = model_card(served(), machine=facts)
    assert "- dtype: bfloat16" in card
    assert f"- torch: {torch.__version__}" in card
    assert f"- threads: {torch.get_num_threads()}" in card
    assert facts.keys() == {"device", "processor", "cores", "threads", "dtype", "torch", "transformers", "hf_osd"}
    assert platform.node() not in map(str, facts.values())
    assert getpass.getuser() not in map(str, facts.values())


def test_an_adapters_card_names_the_base_it_needs():
    alone = model_card(served(), target="some/target", adapter=("some/base", False))
    assert ModelCard(alone).data.base_model == "some/base"
    assert ModelCard(alone).data.library_name == "peft"
    assert "an adapter of `some/base`" in alone
    whole = model_card(served(), target="some/target", adapter=(None, True))
    assert ModelCard(whole).data.base_model == "some/target"
    assert ModelCard(whole).data.library_name == "transformers"
    assert "with its base in this repository" in whole


def test_facts_without_a_place_are_left_out_with_a_warning(caplog):
    card = model_card(served(), prompt="a secret", licence="mit")
    assert "a secret" not in card
    assert "licence, prompt" in caplog.text
    assert "a secret" not in caplog.text


def test_it_says_how_to_load_the_draft_and_what_it_may_have_memorised():
    card = model_card(Stats())
    assert "OnlineAssistant.from_pretrained(" in card
    assert "memorised" in card
    assert 'from_pretrained("me/draft")' in model_card(Stats(), repo_id="me/draft")


def test_two_domains_of_one_name_are_two_rows():
    card = model_card(served(), domains={"/a/sql": SQL, "/b/sql": SQL})
    assert "| sql |" in card
    assert "| sql (2) |" in card
