"""`recipes/experiments/blocks.py`: what blocks of both sources would yield, counted on recordings."""

import pytest
import torch

from hf_osd import record_answers
from hf_osd.distill.scoring import predictions, score
from hf_osd.drafting.suffix_cache import SuffixCache
from hf_osd.feedback.trace import write_trace
from hf_osd.policy.lookahead import DraftPolicy
from recipes.experiments import blocks
from recipes.experiments.blocks import RULES, Account, Read, walk, yields

TOKENS = 12
# The cache proposes 1 2 3 4, of which two are right; the draft disagrees with the third, and is right.
ROUND = Read([1, 2, 3, 4], [0.9, 0.8, 0.4, 0.3], 5, 2, [1, 2, 7], [0.9, 0.9, 0.6], [1, 2, 7, 8, 9])


def test_a_round_yields_the_tokens_and_the_time_of_its_block():
    assert yields(ROUND, None, 0.1, 0.5) == (3, 3.0)
    assert yields(ROUND, RULES["cut at the first disagreement"], 0.1, 0.5) == (3, 2.1)
    assert yields(ROUND, RULES["correct it"], 0.1, 0.5) == (4, 2.6)


def test_a_right_token_that_the_draft_doubts_is_lost_unless_the_cache_is_surer():
    doubted = ROUND._replace(tokens=[1, 5, 7], confidence=[0.9, 0.7, 0.9])
    for rule in ("cut at the first disagreement", "correct it"):
        assert yields(doubted, RULES[rule], 0.0, 0.0)[0] == 2
    for rule in ("cut where the draft is surer", "correct where the draft is surer"):
        assert yields(doubted, RULES[rule], 0.0, 0.0)[0] == 3


def test_where_both_are_wrong_alike_nothing_is_gained_but_the_rest_of_the_block():
    alike = ROUND._replace(tokens=[1, 2, 3])
    for rule in RULES.values():
        assert yields(alike, rule, 0.0, 1.0) == (3, 4.0)


def test_an_account_tells_what_was_known_from_what_is_known_in_hindsight():
    account = Account()
    for kind, gain in (("a", 1.0), ("b", -2.0), ("a", 3.0), ("b", 0.5)):
        account.add((kind,), gain)
    assert account.shares(10) == pytest.approx((0.25, 0.4, 0.3))


@pytest.fixture(scope="module")
def answers(target_dir):
    from transformers import AutoModelForCausalLM

    random = torch.Generator().manual_seed(0)
    target = AutoModelForCausalLM.from_pretrained(target_dir)
    prompts = [torch.randint(2, 64, (6,), generator=random) for _ in range(12)]
    return target, record_answers(target, prompts, TOKENS, batch_size=12, top_k=16)


def test_a_walk_makes_the_answer_and_knows_the_draft_up_to_the_first_wrong_token(answers):
    target, requests = answers
    cache = SuffixCache(2**20)
    for request in requests:
        cache.add(request.tokens.tolist())
    policy = DraftPolicy("cost", 5, max_cached=8, has_draft=False, draft_cost=0.1, verify_cost=0.01)
    tokens, confidence = predictions(target, requests[:1])[0]
    rounds = walk(requests[0], tokens.tolist(), confidence.tolist(), cache, policy)
    answer = requests[0].answer.tolist()
    assert [token for one in rounds for token in one.truth[: one.right + 1]] == answer
    assert any(one.block for one in rounds)
    for one in rounds:
        assert one.block[: one.right] == one.truth[: one.right]
        # The target as its own draft is right wherever it is asked.
        assert one.tokens == one.truth[: min(one.right + 1, len(one.block))]


def test_predictions_are_those_that_are_scored(answers, tiny_llama):
    draft, requests = tiny_llama(seed=3), answers[1]
    for request, (tokens, confidence), right in zip(
        requests, predictions(draft, requests), score(draft, requests), strict=True
    ):
        assert torch.equal((tokens == request.answer).float(), right)
        assert bool(((confidence > 0) & (confidence <= 1)).all())


def test_a_table_for_each_domain(answers, target_dir, tmp_path, capsys, caplog):
    facts = {"target": "tiny", "max_new_tokens": str(TOKENS), "dtype": "float32"}
    write_trace(tmp_path / "stream-00000.safetensors", answers[1][:8], facts)
    write_trace(tmp_path / "held_back-00000.safetensors", answers[1][8:], facts)
    flags = ["--target", target_dir, "--draft", "grow:0,1", "--trace", str(tmp_path), "--held_back", "4"]
    assert blocks.main([*map(str, flags), "--draft_cost", "0.1", "--threads", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {rule} |" in out for rule in RULES)
    assert blocks.main([*map(str, flags), "--device", "cpu"]) == 2
    assert "--draft_cost" in caplog.text
