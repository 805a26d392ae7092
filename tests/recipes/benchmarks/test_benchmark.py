"""The benchmark on a tiny model: every figure is there and plausible."""

import json

import pytest
import torch

from hf_osd import OnlineConfig
from hf_osd.metrics.stats import CallStats
from recipes.benchmarks import benchmark, methods, runs
from recipes.benchmarks.workload import WARM_UP, Workload
from recipes.common import prompts

ONLINE_FIGURES = {
    "alpha",
    "alpha_live",
    "c",
    "v",
    "ideal_speedup",
    "share_of_ideal",
    "drafted_by",
    "accepted_by",
    "head_coverage",
    "head_alpha_loss",
    "round_ms",
    "learn_s",
    "updates",
    "regret_vs_static",
}
GAIN = {"gain_of_learning", "gain_of_learning_interval", "gain_of_learning_end_to_end"}
FIGURES = {
    *ONLINE_FIGURES,
    *GAIN,
    "alpha_by_step",
    "tokens_per_second",
    "wall_s",
    "new_tokens",
    "tokens_per_round",
    "target_forwards",
    "draft_forwards",
    "prefill_s",
    "speedup_vs_plain",
    "speedup_decode_only",
    "identical_share",
    "near_ties",
    "mismatches",
    "peak_rss_mb",
}


@pytest.fixture
def stream(words, tmp_path):
    """A stream of 12 prompts."""
    rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5))} for i in range(12)]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def flags(target_dir, stream, tmp_path):
    """Flags that name a tiny target and the stream."""
    names = ["--target", target_dir, "--stream", stream, "--max_new_tokens", "8", "--threads", "1"]
    return [str(name) for name in (*names, "--json", tmp_path / "out.json", "--overwrite")]


@pytest.fixture
def run(flags, tmp_path):
    """`run("--requests", 2)`: what the benchmark writes with these flags."""

    def run(*more) -> dict:
        assert benchmark.main([*flags, *map(str, more)]) == 0
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.parametrize("kind", ["padded head", "another tokenizer"])
def test_methods_take_a_draft_of_another_vocabulary(run, refused, flags, brought_draft, kind):
    brought = ["--draft", str(brought_draft(kind)), "--requests", "1", "--repeats", "1", "--gammas", "2"]
    found = run(*brought, "--methods", "plain,assisted,online,cache", "--lookahead", "constant")["methods"]
    assert found["online"]["mismatches"] == found["cache"]["mismatches"] == 0
    assert found["online"]["draft_forwards"] > 0
    assert found["assisted"]["draft_forwards"] > 0
    more = ["--methods", "plain,assisted", "--sample", "true"]
    refused(benchmark.main, [*flags, *brought, *more], says="replaces the head for good")
    refused(benchmark.main, [*flags, *brought, "--what", "lookahead"], says="draft of the target's family")


def test_every_method_gives_the_targets_own_output_and_its_figures(run, capsys):
    names = ",".join(methods.METHODS)
    # A draft of all layers is the target: it drafts whatever the clock says, and is always right.
    more = ["--draft", "grow:0,1,2", "--gammas", "2,3", "--lookups", 3, "--draft_vocab_size", 16, "--seed", 1]
    more += ["--before", "grow:0"]
    figures = run("--methods", names, "--requests", 3, "--repeats", 2, "--lookahead", "constant", *more)
    found = figures["methods"]
    assert list(found) == list(methods.METHODS)
    for name, of_it in found.items():
        assert set(of_it) - {"gamma", "lookup"} == FIGURES, name
        assert of_it["identical_share"] + of_it["near_ties"] / 3 == 1, name
        assert of_it["mismatches"] == 0, name
        assert of_it["tokens_per_round"] == of_it["new_tokens"] / of_it["target_forwards"], name
        assert of_it["speedup_vs_plain"]["min"] <= of_it["speedup_vs_plain"]["median"], name
    assert found["plain"]["tokens_per_round"] == 1
    assert found["plain"]["speedup_vs_plain"] == {"median": 1, "min": 1, "max": 1}
    assert found["assisted"]["gamma"] in (2, 3)
    assert found["prompt_lookup"]["lookup"] == 3
    for name in ("plain", "assisted", "assisted-default", "prompt_lookup"):
        assert all(found[name][figure] is None for figure in ONLINE_FIGURES | GAIN), name
    for name in methods.ONLINE:
        assert set(found[name]["v"]) == {str(n) for n in range(1, 9)}
        assert set(found[name]["round_ms"]) == {"draft", "target", "lookup", "capture", "python"}
        assert found[name]["updates"] == 0  # drafts are served as they are, unless told otherwise
        assert found[name]["regret_vs_static"] == 0
        gain = [found[name][figure] for figure in ("gain_of_learning", "gain_of_learning_interval")]
        assert [one is None for one in gain] == [name == "cache"] * 2
        assert found[name]["gain_of_learning_end_to_end"] is None, "nothing learns"
    assert found["online"]["alpha_by_step"] == found["online-full-head"]["alpha_by_step"] == [1]
    assert found["useless"]["alpha_by_step"][0] < 0.5
    assert found["cache"]["alpha_by_step"] is found["plain"]["alpha_by_step"] is None
    assert found["online-full-head"]["alpha"] == 1
    assert found["online-full-head"]["head_coverage"] is None
    assert found["online"]["draft_forwards"] > 0
    assert found["useless"]["alpha"] < 0.5
    assert found["cache"]["alpha"] is None
    assert found["cache"]["draft_forwards"] == 0
    assert figures["arguments"]["config"]["learn"] == "off"
    assert figures["machine"]["threads"] == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == list(methods.METHODS)


def test_a_learning_draft_learns_between_requests(run):
    more = ["--learn", "inline", "--update_interval", 2, "--seed", 0, "--methods", "plain,online"]
    more += ["--learning_rate", "1e-3", "--learning_budget", 1]
    figures = run("--requests", 4, "--repeats", 1, *more)["methods"]
    assert list(figures) == ["plain", "online", "cache"], "beside a draft the cache alone is measured, asked or not"
    assert figures["online"]["updates"] == 2
    assert figures["online"]["mismatches"] == 0
    online, cache = (figures[name] for name in ("online", "cache"))
    gain = [online[name]["median"] for name in ("gain_of_learning", "gain_of_learning_end_to_end")]
    assert gain[0] == pytest.approx(online["tokens_per_second"] / cache["tokens_per_second"])
    end_to_end = online["new_tokens"] / (online["wall_s"] + online["learn_s"])
    assert gain[1] == pytest.approx(end_to_end / cache["tokens_per_second"])
    low, high = online["gain_of_learning_interval"]
    assert low <= gain[0] <= high


def test_no_method_finds_its_answer_in_a_cache(run, monkeypatch):
    """Each has its own, which begins empty in every repeat and has the same texts as the others' before a request: the warm ones and those served since."""
    seen, asked = [], methods.Online.serve

    def serving(method, work, request):
        method.assistant.collect()
        cache = method.assistant.texts.for_tenant(None)
        held = set(cache._index._log.tobytes().split(b"\xff\xff\xff\xff")) - {b""}
        seen.append((request["id"], held))
        return asked(method, work, request)

    monkeypatch.setattr(methods.Online, "serve", serving)
    names = ["--methods", "online,cache,useless", "--warm", 2, "--skip", 2]
    run("--requests", 3, "--repeats", 2, *names)
    before = {}
    for request, held in seen:
        before.setdefault(request, []).append(held)
    assert [len(before[id][0]) for id in ("6", "7", "1", "2", "3", "4", "5")] == list(range(7))
    for found in before.values():
        assert len(found) == 3 * 2, "methods and repeats"
        assert found == found[:1] * 6


def test_a_gain_is_the_ratio_of_rates_on_the_same_requests():
    def ran(seconds, new, learn=0.0):
        return runs.Run(
            [
                methods.Call(torch.zeros(0), n, 1, s, 0.1, 1, learn_seconds=learn)
                for n, s in zip(new, seconds, strict=True)
            ]
        )

    fast, slow = ran([1.0, 2.0], [10, 20], learn=0.75), ran([2.0, 2.0], [10, 10])
    found = runs.gain_of([fast, slow], [slow, slow], learns=True)
    assert found["gain_of_learning"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert found["gain_of_learning_end_to_end"]["max"] == pytest.approx(30 / 4.5 / 5)
    # Both repeats of a request are drawn together: the first alone has 20 tokens in 3 s beside 20 in 4, the second 30 in 4 beside 20 in 4.
    assert found["gain_of_learning_interval"] == pytest.approx([4 / 3, 1.5])
    assert runs.gain_of([fast], [slow], learns=False)["gain_of_learning_end_to_end"] is None


def test_a_draft_that_reads_states_is_scored_by_step(run):
    figures = run("--draft", "feature", "--requests", 2, "--repeats", 1, "--methods", "online")["methods"]
    assert list(figures) == ["online", "cache"]
    steps = figures["online"]["alpha_by_step"]
    assert len(steps) == 3
    assert 0 <= steps[0] <= 1


def test_sampling_is_timed_and_not_compared(run):
    figures = run("--requests", 2, "--repeats", 1, "--sample", "true", "--methods", "plain,online-no-cache")["methods"]
    assert figures["online-no-cache"]["identical_share"] is None
    assert figures["online-no-cache"]["speedup_vs_plain"] is not None


def test_without_plain_decoding_there_is_nothing_to_compare_with(run):
    figures = run("--requests", 2, "--repeats", 1, "--methods", "cache")["methods"]["cache"]
    assert figures["tokens_per_second"] > 0
    assert figures["speedup_vs_plain"] is figures["share_of_ideal"] is figures["identical_share"] is None


def workload(target_dir, stream, **more) -> Workload:
    names = {"target": str(target_dir), "stream": str(stream), "max_new_tokens": 8, "threads": 1}
    return Workload(benchmark.BenchmarkArguments(**names, **more), seed=0)


def ids(rows: list[dict]) -> list[str]:
    return [row["id"] for row in rows]


def test_prompts_come_in_file_order_after_those_skipped(target_dir, stream):
    work = workload(target_dir, stream, requests=3, skip=5, warm=2)
    assert ids(work.requests) == ["6", "7", "8"]
    assert ids(work.warm) == ["4", "5"]
    assert ids(work.warm_up) == ["9", "10"]
    last = workload(target_dir, stream, requests=2, skip=10, warm=2)
    assert (ids(last.warm), ids(last.requests), ids(last.warm_up)) == (["9", "10"], ["11", "12"], ["1", "2"])


def test_held_back_prompts_are_those_that_the_other_recipes_keep_from_learning(target_dir, stream):
    rows = prompts.read_stream(stream)
    held, learnt = prompts.split_held_back(rows, 5, 0, "s")
    work = workload(target_dir, stream, requests=3, held_back=5, skip=2, warm=1)
    assert ids(work.requests) == ids(held)[2:]
    assert ids(work.warm) == ids(held)[1:2]
    assert not set(ids(work.requests + work.warm)) & set(ids(learnt))
    assert len(work.warm_up) == WARM_UP
    assert not set(ids(work.warm_up)) & set(ids(work.requests + work.warm))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"requests": 11}, "too few for 11 and 2 others"),
        ({"requests": 3, "skip": 10}, "too few for 3"),
        ({"requests": 6, "held_back": 5}, "too few for 6"),
        ({"requests": 2, "warm": 3, "skip": 2}, "raise --skip"),
    ],
)
def test_too_few_prompts_are_an_error_that_says_so(target_dir, stream, more, message):
    with pytest.raises(ValueError, match=message):
        workload(target_dir, stream, **more)


def test_overhead_reports_every_part(run, capsys):
    figures = run(
        "--what", "overhead", "--requests", 2, "--repeats", 2, "--update_interval", 3, "--draft_vocab_size", 16
    )
    found = figures["overhead"]
    assert found == json.loads(capsys.readouterr().out)
    capture, learning = found["capture"], found["learning"]
    assert set(capture["round_ms"]) == {"draft", "target", "capture", "python"}
    assert all(value > 0 for value in capture["round_ms"].values())
    assert 0 < capture["capture_share_of_decode"]["median"] < 1
    assert capture["bytes_a_position"] <= 1024
    assert learning["failed_updates"] == 0
    assert (
        learning["tokens_an_update"] == 3 * (1 + 6) * 8 or learning["tokens_an_update"] < 3 * 7 * 8
    )  # EOS may come early
    assert learning["whole_head_seconds_over_bare"]["median"] > 0
    head = found["head"]
    assert set(head["step_ms"]) == {"full", "traffic", "low_rank"}
    assert all(0 <= head[f"alpha_{name}"] <= 1 for name in ("full", "traffic", "low_rank"))
    assert head["context"] == 200
    assert [row["context"] for row in found["context"]] == [128, 512 - 8 - 6]
    assert all(row["forwards_ms"] > 0 and row["round_ms"] > 0 for row in found["context"])
    assert set(found["python_ms"]) == {"plain", "assisted", "online"}
    assert all(part["median"] > 0 for part in found["python_ms"].values())
    assert figures["machine"]["threads"] == 1


def test_overhead_of_a_draft_that_reads_states_is_that_of_capture(run):
    found = run("--what", "overhead", "--draft", "feature", "--requests", 2, "--repeats", 1)["overhead"]
    assert set(found) == {"capture"}
    assert 0 < found["capture"]["capture_share_of_decode"]["median"] < 1
    assert all(value > 0 for value in found["capture"]["round_ms"].values())


def test_a_head_with_no_fewer_rows_is_null(run):
    head = run("--what", "overhead", "--requests", 2, "--repeats", 1, "--update_interval", 2)["overhead"]["head"]
    assert head["alpha_traffic"] is head["step_ms"]["low_rank"] is head["step_over_full"]["traffic"] is None
    assert 0 <= head["alpha_full"] <= 1


def test_watched_forwards_are_those_that_the_assistant_counts(target_dir, stream):
    work = workload(target_dir, stream, requests=1)
    config = OnlineConfig(lookahead="constant", learn=False, draft_head="traffic", draft_vocab_size=16)
    method = methods.Online(work.draft, config, watch=True)
    method.reset()
    watched = work.generate(work.requests[0], watch=method.assistant.serving.active, assistant_model=method.assistant)
    assert watched.draft_forwards == method.assistant.stats.last.draft_steps > 0
    assert 0 < watched.forward_seconds < watched.seconds - watched.first_seconds


@pytest.mark.parametrize("costs", [(), ("--draft_cost", "0.2", "--verify_cost", "0.05")])
def test_lookahead_reports_the_regret_of_every_policy(run, costs):
    figures = run("--what", "lookahead", "--requests", 2, "--num_assistant_tokens", 3, *costs)["lookahead"]
    assert list(figures["policies"]) == [*(f"constant-{gamma}" for gamma in range(4)), "heuristic", "cost"]
    assert min(figures["policies"][f"constant-{gamma}"]["regret"] for gamma in range(4)) == 0
    assert figures["policies"]["constant-0"]["rate"] == 1
    assert 0 <= figures["alpha"] <= 1
    if costs:
        assert figures["costs"] == {"c": 0.2, "verify_cost": 0.05, "measured": False}


def test_traces_are_what_the_assistant_scores(target_dir, stream):
    from hf_osd import OnlineAssistant, record_answers

    work = workload(target_dir, stream, requests=2)
    answers = record_answers(work.target, [row["ids"] for row in work.requests], 8)
    predictions = benchmark.predictions_of(work.draft, answers)
    scored = OnlineAssistant(work.draft, learn=False).score(answers)
    assert [list(one.hits) for one in predictions] == [overlap.tolist() for overlap in scored]
    assert all(0 < value <= 1 for one in predictions for value in one.confidence)


def test_ideal_speedup_is_the_formulas_at_a_fixed_length():
    from hf_osd.policy.lookahead import DraftPolicy, ideal_speedup

    # Ten rounds of 2 drafts: in 5 both are accepted, in 3 the first, in 2 none; a_1 = .8 and a_2 = 5/8.
    stats = CallStats()
    for accepted, times in ((2, 5), (1, 3), (0, 2)):
        for _ in range(times):
            stats.observe_round(2, min(accepted + 1, 2), accepted, accepted + 1)
    costs = DraftPolicy("constant", 2, draft_cost=0.25, verify_cost=0.1).costs
    expected = ideal_speedup([0.8, 5 / 8], 2, 0.25, lambda n: 1 + 0.1 * (n - 1))
    assert runs.Run(stats=stats, costs=costs).ideal_speedup == pytest.approx(expected)


def test_difference_is_what_was_observed_in_between():
    first, second, both = CallStats(), CallStats(), CallStats()
    first.observe_round(3, 2, 1, 2)
    second.observe_round(2, 2, 2, 3, from_draft=1)
    both.add(first)
    both.add(second)
    assert runs.difference(both, first) == second


def test_a_useless_draft_has_weights_of_its_own(target_dir, stream):
    work = workload(target_dir, stream, requests=1)
    made = methods.random_draft(work.draft, seed=0)
    assert type(made) is type(work.draft)
    assert made.get_input_embeddings().weight.data_ptr() != work.draft.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(made.get_input_embeddings().weight, work.draft.get_input_embeddings().weight)
    again = methods.random_draft(work.draft, seed=0)
    assert torch.equal(made.get_input_embeddings().weight, again.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--what", "magic"),
        ("--methods", "plain,magic"),
        ("--methods", ","),
        ("--gammas", "0,1"),
        ("--lookups", "x"),
        ("--requests", "0"),
        ("--draft", "grow:x"),
    ],
)
def test_bad_flags_are_named(flags, refused, flag, value):
    refused(benchmark.main, [*flags, flag, value], says=value)


def test_only_methods_sample(flags, refused):
    refused(benchmark.main, [*flags, "--what", "overhead", "--sample"], says="--what methods")
