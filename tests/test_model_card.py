"""The model card: the figures there are, and nothing that says more than it should."""

from huggingface_hub import ModelCard

from hf_osd.model_card import model_card
from hf_osd.stats import CallStats, Stats


def served() -> Stats:
    stats = Stats(updates=3, learned_tokens=1234)
    for alpha in (0.25, 0.75):
        call = CallStats(requests=1, overlap_sum=10 * alpha, overlap_count=10)
        call.observe_round(drafted=5, tested=5, accepted=4, new_tokens=5)
        stats.observe_call(call)
    return stats


def test_the_card_has_the_figures():
    card = model_card(served())
    assert "2 requests, 3 updates on 1234 token positions" in card
    assert "| alpha (expected acceptance, last 2 requests) | 0.500 |" in card
    assert "| alpha_live (accepted / tested, last 2 requests) | 0.800 |" in card
    assert "| tokens a round (last 2 requests) | 5.000 |" in card


def test_the_hub_can_read_its_metadata():
    card = ModelCard(model_card(served(), target="some/target", license="apache-2.0"))
    assert card.data.base_model == "some/target"
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "speculative-decoding" in card.data.tags
    assert "served `some/target`" in card.text


def test_a_path_of_this_machine_stays_on_it():
    for path in ("/home/somebody/models/target", "./target", "../target"):
        card = model_card(served(), target=path)
        assert path not in card
        assert "base_model" not in card


def test_a_draft_that_never_served_has_a_card_without_nan():
    card = model_card(Stats())
    assert "nan" not in card.lower()
    assert "| - |" in card


def test_domains_have_a_row_each():
    domains = {
        "code": {"requests": 40, "alpha_before": 0.31, "alpha_after": 0.62},
        "chat": {"requests": 2, "alpha_before": None, "alpha_after": float("nan")},
    }
    card = model_card(served(), domains=domains)
    assert "| code | 40 | 0.310 | 0.620 |" in card
    assert "| chat | 2 | - | - |" in card
    assert "domain" not in model_card(served())


def test_it_says_how_to_load_the_draft_and_what_it_may_have_memorised():
    card = model_card(Stats())
    assert "OnlineAssistant.from_pretrained(" in card
    assert "memorised" in card
