"""`recipes/experiments/route.py`: one draft, one a trace and routed ones learn from the same requests."""

import json

import pytest
import torch

from hf_osd import record_answers
from hf_osd.feedback.trace import write_trace

TOKENS, REQUESTS = 8, 24


@pytest.fixture(scope="module")
def traces(target_dir, tmp_path_factory):
    """Two domains, whose prompts are of other words."""
    from transformers import AutoModelForCausalLM

    target, folders = AutoModelForCausalLM.from_pretrained(target_dir), []
    for name, words in (("low", range(2, 20)), ("high", range(40, 60))):
        folder = tmp_path_factory.mktemp("traces") / name
        folder.mkdir()
        random = torch.Generator().manual_seed(words[0])
        prompts = [torch.randint(words[0], words[-1], (6,), generator=random) for _ in range(REQUESTS + 4)]
        answers = record_answers(target, prompts, TOKENS, batch_size=REQUESTS + 4, top_k=16)
        facts = {"target": "tiny", "max_new_tokens": str(TOKENS), "dtype": "float32"}
        write_trace(folder / "stream-00000.safetensors", answers[:REQUESTS], facts)
        write_trace(folder / "held_back-00000.safetensors", answers[REQUESTS:], facts)
        folders.append(str(folder))
    return ",".join(folders)


def flags(target_dir, traces, *more) -> list[str]:
    given = f"--target {target_dir} --draft grow:0,1 --trace {traces} --requests {REQUESTS} --held_back 4 --learning_rate 1e-3 --threads 1"
    return [*given.split(), *more]


def test_all_arms_learn_the_same_requests_in_the_same_order(target_dir, traces, tmp_path, capsys):
    from recipes.experiments import route

    log = tmp_path / "rows.jsonl"
    assert route.main(flags(target_dir, traces, "--log", str(log))) == 0
    table = capsys.readouterr().out
    assert all(f"| {arm} |" in table for arm in route.ARMS)
    rows = {row["arm"]: row for row in map(json.loads, log.read_text().splitlines())}
    assert rows.keys() == {"low+high", "low", "high", *route.ROUTED}
    rows = {
        "shared": rows["low+high"],
        "fixed": route.joined("fixed", [rows["high"], rows["low"]], ["low", "high"]),
    } | rows
    routers = table[table.index("fixed assignments in hindsight") :]
    assert routers.count("| routed |") == routers.count("| forked |") == 4
    assert routers.count("of its own drafts") == 2
    for arm in route.ARMS:
        row = rows[arm]
        assert row["by_draft"].keys() >= set(routes_of(row)[-1:])
        assert [domain for domain, *_ in row["choices"]] == [domain for domain, *_ in rows["shared"]["choices"]]
        assert len(row["prequential"]) == 2 * REQUESTS
        assert {name: len(pairs) for name, pairs in row["scores"].items()} == {"low": 4, "high": 4}
        assert list(row["scores"]) == ["low", "high"]
    assert rows["fixed"]["drafts"] == 2
    assert rows["fixed"]["updates"] == rows["shared"]["updates"] == 2 * REQUESTS // 8
    assert all(name == domain for domain, _, name in rows["fixed"]["choices"])
    assert {name for *_, name in rows["shared"]["choices"]} == {"low+high"}
    assert (
        sorted(rows["low"]["served"] + rows["high"]["served"]) == rows["shared"]["served"] == list(range(2 * REQUESTS))
    )
    for domain in ("low", "high"):
        assert {name for name, *_ in rows[domain]["choices"]} == rows[domain]["scores"].keys() == {domain}
    assert rows["routed"]["drafts"] >= 1
    before = log.read_text()
    assert route.main(flags(target_dir, traces, "--log", str(log))) == 0  # all runs are there
    assert log.read_text() == before


def routes_of(row):
    return [route for *_, route in row["choices"]]


def test_every_way_to_share_drafts_is_an_assignment():
    from recipes.experiments.route import assignment, expanded

    assert expanded("shared,assignments", ["a", "b", "c"]) == ["shared", "a+b/c", "a+c/b", "a/b+c", "fixed"]
    assert len(expanded("assignments,forked", list("abcd"))) == 15 + 1
    assert dict(assignment("a+c/b", ["a", "b", "c"])) == {"a": "a+c", "b": "b", "c": "a+c"}


def test_each_draft_is_run_once_for_all_the_assignments_that_have_it():
    from recipes.experiments.route import expanded, runs_of

    names = list("abcd")
    assert runs_of("c/b+a+d", names) == ["c", "a+b+d"]
    assert runs_of("forked", names) == ["forked"]
    assert len({run for arm in expanded("assignments", names) for run in runs_of(arm, names)}) == 2**4 - 1


def test_a_router_is_compared_with_the_assignment_that_turned_out_best():
    from recipes.experiments.route import hindsight

    def rows(arm, early, late, held):
        drafts = {"x": {"a": [[held, 10]], "b": [[2, 10]]}, "y": {"a": [[3, 10]], "b": [[9, 10]]}}
        scores = {"a": [[held, 10]], "b": [[2, 10]]}
        return [
            {"arm": arm, "prequential": [[early, 10]] * 6 + [[late, 10]] * 2, "scores": scores, "by_draft": drafts}
        ]

    lines = hindsight([rows("shared", 8, 2, 4), rows("fixed", 1, 6, 5), rows("forked", 5, 5, 6)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[-4:]]
    assert [(row[2], row[3], row[4], row[5].split()[0]) for row in cells] == [
        ("shared", "0.650", "0.500", "-0.150"),
        ("fixed", "0.600", "0.500", "-0.100"),
        ("fixed", "0.350", "0.400", "+0.050"),
        ("of its own drafts", "0.750", "0.400", "-0.350"),
    ]
    assert not hindsight([rows("shared", 8, 2, 4)])


def test_purity_is_the_share_of_each_topics_commonest_domain():
    from recipes.experiments.topics import purity

    assert purity([0, 0, 0, 1], ["a", "a", "b", "b"]) == 0.75


def test_prompts_are_routed_without_a_draft(target_dir, write_words, capsys, refused):
    from recipes.experiments import topics

    given = ["--target", str(target_dir), "--stream", write_words, "--requests", "100", "--seeds", "0,1"]
    assert topics.main(given) == 0
    assert topics.main([*given, "--in_turn", "true"]) == 0
    assert capsys.readouterr().out.count("| mean |") == 2
    refused(topics.main, [*given, "--requests", "900"], says="lower it")


@pytest.fixture
def write_words(tmp_path):
    """Two streams of prompts of other words."""
    for name, start in (("low", 0), ("high", 40)):
        rows = [{"prompt": " ".join(f"w{start + i * j % 20}" for j in range(1, 8))} for i in range(1, 400)]
        rows = [{"prompt": f"{row['prompt']} w{start + i % 20} w{i // 20 % 20}"} for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"{tmp_path}/low.jsonl,{tmp_path}/high.jsonl"


def test_what_cannot_be_compared_is_refused(target_dir, traces, refused):
    from recipes.experiments import route

    refused(route.main, flags(target_dir, traces, "--arms", "shared,best"), says="choose from shared")
    refused(route.main, flags(target_dir, traces, "--arms", "low/low+high"), says="each of low, high once")
    refused(route.main, flags(target_dir, traces, "--requests", "99"), says="record more")
    refused(route.main, ["--target", str(target_dir)], says="`trace` is empty")
