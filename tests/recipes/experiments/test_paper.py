"""`recipes/experiments/paper/`: each config can be run as its comment says, and the report lays out what the experiments wrote."""

import dataclasses
import importlib
import importlib.util
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "recipes" / "experiments" / "paper"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
STREAMS = ROOT.parent / "shared" / "data" / "streams"
T5_SIZES = "--nouns 6 --target_width 16 --draft_width 16 --target_layers 1 --target_steps 2 --draft_steps 2 --batch 4 --sentences 30"


def command_of(config: Path) -> list[str]:
    """The command in a config's comment."""
    [line] = re.findall(r"^#   python (.+)$", config.read_text(encoding="utf-8"), re.M)
    return shlex.split(line)


def recipe_of(command: list[str]):
    """The module that a command runs."""
    name = command[1] if command[0] == "-m" else command[0].removesuffix(".py").replace("/", ".")
    return importlib.import_module(name)


def arguments_of(recipe):
    """The recipe's own dataclass of flags."""
    found = [
        kind
        for name, kind in vars(recipe).items()
        if name.endswith("Arguments") and kind.__module__ == recipe.__name__
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_config_is_read_by_its_recipe_and_names_options_that_there_are(config):
    from trl import TrlParser

    from hf_osd import OnlineConfig
    from recipes.experiments.arms import read_arm

    command = command_of(config)
    assert command[-2:] == ["--config", str(config.relative_to(ROOT))]
    kind = arguments_of(recipe_of(command))
    known = {field.name for one in (kind, OnlineConfig) for field in dataclasses.fields(one)}
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert not set(values) - known
    assert len(re.findall(r"^\w+:", config.read_text(encoding="utf-8"), re.M)) == len(values), "no key is there twice"
    args, osd = TrlParser((kind, OnlineConfig)).parse_args_and_config(["--config", str(config)])
    for name, value in values.items():
        read = getattr(args, name) if hasattr(args, name) else getattr(osd, name)
        assert str(read) == str(value) or read == float(value), name
    for arm in getattr(args, "arms", "").split(";"):
        read_arm(arm, osd, "grow:0,1")


def test_configs_read_what_others_write():
    """Drafts and traces come from the recordings, the models' maker and the warm-ups."""
    values = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS}
    written = {one["save_to"] for one in values.values() if "save_to" in one}
    for name, one in values.items():
        for draft in [one.get("draft", ""), *one.get("drafts", "").split(",")]:
            if draft.startswith("runs/") and "t5" not in draft:
                assert draft.rsplit("/", 1)[0] in written, name
        for trace in filter(None, f"{one.get('trace', '')},{one.get('also', '')}".split(",")):
            assert trace.rsplit("/", 1)[0] in {
                values[f"record{kind}"]["output_dir"] for kind in ("", "_sampled", "_languages")
            }
    logs = [one[key] for one in values.values() for key in ("log", "json") if key in one]
    assert len(logs) == len(set(logs))


@pytest.mark.skipif(not STREAMS.is_dir(), reason="the streams are not here")
def test_recordings_name_streams_with_the_domains_that_the_traces_have():
    for config in FOLDER.glob("record*.yaml"):
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        for name in values["stream"].split(","):
            domain = json.loads((STREAMS / name).read_text(encoding="utf-8").partition("\n")[0])["domain"]
            traces = [yaml.safe_load(path.read_text(encoding="utf-8")).get("trace", "") for path in CONFIGS]
            assert any(f"{values['output_dir']}/{domain}" in trace.split(",") for trace in traces), domain


# A row as replay.py writes it, with as many prompts held back as `alphas` has points.
def row(traces, scores, arm="base", seed=0, requests=None, **more) -> dict:
    hits = {
        name: {point: [[round(20 * alpha), 20], [round(10 * alpha), 10]] for point, alpha in points.items()}
        for name, points in scores.items()
    }
    known = {"draft": "grow:0,1", "target": "embedded", "max_new_tokens": 64, "dtype": "bfloat16", "mixed": False}
    return {
        "arm": arm,
        "seed": seed,
        "traces": traces,
        "requests": requests or [250] * len(traces),
        "scores": hits,
        **known,
        **more,
    }


def write_log(path: Path, *rows: dict):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


@pytest.fixture
def outcome(tmp_path) -> Path:
    """A folder with an outcome of each kind."""
    runs = tmp_path / "runs"
    (runs / "t5-south").mkdir(parents=True)
    write_log(
        runs / "sql.jsonl",
        row(["sql"], {"sql": {"0": 0.3, "250": 0.5, "500": 0.6}}, requests=[500]),
        row(["sql"], {"sql": {"0": 0.3, "250": 0.6, "500": 0.7}}, seed=1, requests=[500]),
        row(["sql"], {"sql": {"0": 0.3, "500": 0.2}}, arm="preset=paper", requests=[500], temperature=1.0),
    )
    write_log(runs / "offline.jsonl", row(["math"], {"math": {"0": 0.3, "2500": 0.6}}, passes=10))
    both = ["math", "sql"]
    turns = {"math": {"0": 0.2, "250": 0.5, "500": 0.4}, "sql": {"0": 0.3, "250": 0.3, "500": 0.6}}
    write_log(runs / "shift.jsonl", row(both, turns))
    write_log(runs / "fading.jsonl", row(both, turns, gradual=True))
    write_log(
        runs / "mixed.jsonl", row(both, {"math": {"0": 0.2, "500": 0.4}, "sql": {"0": 0.3, "500": 0.5}}, mixed=True)
    )
    write_log(
        runs / "languages.jsonl",
        row(["lang-en", "lang-ru"], {name: {"0": 0.1, "500": 0.3} for name in ("lang-en", "lang-ru")}),
    )
    south = {
        "requests": 500,
        "alpha_before": 0.2,
        "alpha_after": 0.6,
        "speedup_decode": 1.5,
        "speedup_end_to_end": None,
        "compared": 15,
        "near_ties": 1,
        "mismatches": 0,
    }
    summary = {
        "domains": {"south": south},
        "overall": {"seed": 0, "arguments": {"target": "t5", "max_new_tokens": 32}},
    }
    (runs / "t5-south" / "summary.json").write_text(json.dumps(summary))
    drafts = [{"draft": "before", "precision": 0.25, "recall": 0.125, "alpha": 0.5}]
    (runs / "tokens.json").write_text(json.dumps({"trace": "sql", "top": 100, "drafts": drafts}))
    (runs / "costs.json").write_text(json.dumps({"trace": "math", "learning_flops": 1.5e9}))
    return runs


def test_the_report_has_a_line_for_each_outcome_beside_the_papers(outcome, tmp_path, capsys):
    from recipes.experiments.paper import report

    flags = ["--runs", str(outcome), "--output_dir", str(tmp_path / "report"), "--machine", "a laptop"]
    assert report.main(flags) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    lines = text.splitlines()
    [at_250] = [line for line in lines if line.startswith("| sql | greedy | grow:0,1: base | 250 |")]
    assert "| 0, 1 | 0.300 | 0.550 | +0.250 (" in at_250
    assert "| 0.44 → 0.59 | +0.15 | sql |" in at_250
    [worse] = [line for line in lines if "sampled at 1 | grow:0,1: preset=paper | 500" in line]
    assert "| -0.100 (" in worse, "what was lost stands there as what was gained"
    assert "| math | grow:0,1: base | 250 × 10 | 0 | 0.300 | 0.600 |" in text
    assert "0.58 → 0.75" in text
    shift = text.split("## Shifts")[1].split("shift, greedy")[1].split("\n\n")[1]
    assert (
        "| sql | 250 | 0.300 | 0.300 | 250: 0.600 | 0.600 | +0.100 (+0.100 to +0.100), 500 requests mixed |" in shift
    )
    assert "| math | 250 | 0.200 | 0.200 | 250: 0.500 | 0.400 |" in shift
    assert "| south | 500 | 0 | 0.200 | 0.600 | +0.400 | 1.500 - | 15, 1, 0 |" in text.replace("1.500 | -", "1.500 -")
    assert "| sql | before | 100 | 0.250 | 0.125 | 0.500 | tokens |" in text
    assert "| learning_flops | 1.5e+09 |" in text
    assert "| machine | A100 | a laptop |" in text
    assert "| target | Vicuna-7B; FLAN-T5-XL | embedded, t5 |" in text


def test_plots_are_drawn_or_left_out_with_a_message(outcome, tmp_path, monkeypatch, caplog):
    from recipes.experiments.paper import report

    flags = ["--runs", str(outcome), "--output_dir", str(tmp_path / "report")]
    assert report.main(flags) == 0
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert len(pictures) == 4, "domains, and three kinds of shift"
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"!\[.+?\]\((.+?)\)", text)) == pictures

    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert report.main([*flags[:3], str(tmp_path / "without")]) == 0
    assert "matplotlib is not installed" in caplog.text
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["report.md"]


def test_the_folder_of_one_run_can_be_named(outcome, tmp_path):
    from recipes.experiments.paper import report

    write_log(outcome / "t5-south" / "metrics.jsonl", {"request": 0})
    assert report.main(["--runs", str(outcome / "t5-south"), "--output_dir", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| south | 500 |" in text
    assert "## Shifts" not in text


def test_what_cannot_be_reported_is_named(outcome, tmp_path, refused):
    from recipes.experiments.paper import report

    to = ["--output_dir", str(tmp_path / "report")]
    refused(report.main, ["--runs", str(tmp_path / "nowhere"), *to], says="nowhere")
    (tmp_path / "empty").mkdir()
    refused(report.main, ["--runs", str(tmp_path / "empty"), *to], says="no outcome")
    (tmp_path / "bad.json").write_text("{")
    refused(report.main, ["--runs", str(tmp_path / "bad.json"), *to], says="bad.json")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    refused(report.main, ["--runs", str(tmp_path / "other.jsonl"), *to], says="without `arm`")


def test_precision_and_recall_of_frequent_tokens():
    from recipes.experiments.paper.top_tokens import figures_of

    pairs = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 1), (3, 2)]  # due, predicted
    found = figures_of(pairs, 3)
    assert found["recall_by_rank"] == [2 / 3, 1 / 2, 0]
    assert found["precision_by_rank"] == [2 / 3, 1 / 3, None], "3 was never predicted"
    assert found["precision"] == pytest.approx(1 / 2)
    assert found["alpha"] == pytest.approx(1 / 2)
    assert figures_of(pairs, 1)["recall"] == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def trace(target_dir, words, tmp_path_factory) -> Path:
    from recipes.experiments import record

    folder = tmp_path_factory.mktemp("traces")
    (folder / "one.jsonl").write_text("\n".join(json.dumps({"prompt": " ".join(words[i : i + 4])}) for i in range(24)))
    flags = f"--target {target_dir} --stream {folder}/one.jsonl --requests 12 --held_back 5 --max_new_tokens 8 --states auto --threads 1"
    assert record.main([*flags.split(), "--output_dir", str(folder)]) == 0
    return folder / "one"


@pytest.mark.parametrize("draft", ["grow:0+1", "feature"])
def test_tokens_are_those_that_alpha_counts(target_dir, trace, tmp_path, draft):
    from hf_osd import OnlineAssistant, OnlineConfig
    from recipes.common.models import load_draft, load_target
    from recipes.experiments.paper import top_tokens
    from recipes.experiments.replay import alpha_of, hits_of, load_trace

    flags = [
        "--target",
        str(target_dir),
        "--trace",
        str(trace),
        "--held_back",
        "5",
        "--json",
        str(tmp_path / "tokens.json"),
    ]
    if draft == "feature":  # a new one is random, and made twice
        target, _ = load_target(str(target_dir), "auto")
        OnlineAssistant(load_draft(draft, target)).save_pretrained(tmp_path / "draft")
        draft = str(tmp_path / "draft")
    assert top_tokens.main([*flags, "--drafts", f"{draft},{draft}", "--threads", "1"]) == 0
    found = json.loads((tmp_path / "tokens.json").read_text())
    assert found["drafts"][0] == found["drafts"][1]
    target, _ = load_target(str(target_dir), "auto")
    assistant = OnlineAssistant(load_draft(draft.replace("+", ","), target), OnlineConfig())
    held_back = load_trace(trace, 1, 5, stream=False).held_back
    assert found["drafts"][0]["alpha"] == pytest.approx(alpha_of(hits_of(assistant, held_back)))


def test_costs_are_counted(target_dir, trace, tmp_path, refused):
    from recipes.experiments.paper import costs

    flags = ["--target", str(target_dir), "--trace", str(trace), "--threads", "1", "--requests", "8"]
    found = []
    for i, more in enumerate((["--replay_ratio", "0"], ["--replay_ratio", "3"])):
        assert costs.main([*flags, *more, "--json", str(tmp_path / f"{i}.json")]) == 0
        found.append(json.loads((tmp_path / f"{i}.json").read_text()))
    once, more = found
    assert 0 < once["draft_flops"] < once["target_flops"]
    assert 2 * once["draft_flops"] < once["learning_flops"], "a backward is about two forwards"
    assert once["learning_flops"] < more["learning_flops"]
    assert once["draft_bytes"] < once["target_bytes"]
    assert 0 < once["draft_bytes_of_its_own"] <= once["draft_bytes"]
    refused(costs.main, [*flags[:-1], "13"], says="`requests` is 13")


def test_a_translation_is_one(tmp_path):
    from recipes.experiments.paper.translation import NORTH, SOUTH, Language, examples, tokenizer_of

    language = Language(6, 0)
    sentence = [["adj1", "noun2", "verb0", "adj0", "noun4"], ["noun2", "verb1", "noun5"]]
    for name, order in (
        (NORTH, "noun2 adj1 noun4 adj0 verb0 noun2 noun5 verb1"),
        (SOUTH, "noun2 noun5 verb1 noun2 adj1 noun4 adj0 verb0"),
    ):
        assert language.translation(sentence, name).split() == [
            language.dictionaries[name][word] for word in order.split()
        ]
        assert language.prompt(sentence, name) == f"<{name}> adj1 noun2 verb0 adj0 noun4 noun2 verb1 noun5"
        assert len(set(language.dictionaries[name].values())) == 12
    tokenizer = tokenizer_of(language.vocabulary)
    inputs, labels = examples(language, tokenizer, [NORTH, SOUTH] * 4, random.Random(0))
    assert ((inputs["input_ids"] == tokenizer.eos_token_id).sum(-1) == 1).all()
    assert ((labels == tokenizer.eos_token_id).sum(-1) == 1).all()
    assert torch.equal(inputs["attention_mask"] == 0, inputs["input_ids"] == tokenizer.pad_token_id)


def test_the_encoder_decoders_are_made_and_served(tmp_path, refused):
    from recipes import distill
    from recipes.experiments.paper import translation

    flags = [*T5_SIZES.split(), "--output_dir", str(tmp_path / "t5")]
    assert translation.main(flags) == 0
    facts = json.loads((tmp_path / "t5" / "facts.json").read_text())
    assert facts["draft"]["parameters"] <= facts["target"]["parameters"]
    served = f"--target {tmp_path}/t5/target --draft {tmp_path}/t5/draft --stream {tmp_path}/t5/south.jsonl --requests 9 --held_back 4 --parity 2"
    config = FOLDER / "t5.yaml"
    assert distill.main(["--config", str(config), *served.split(), "--output_dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["overall"]["failed_updates"] == 0
    assert (summary["domains"]["south"]["requests"], summary["domains"]["south"]["mismatches"]) == (9, 0)
    refused(translation.main, ["--target_width", "18", "--output_dir", str(tmp_path)], says="multiple of 4")


def test_configs_of_replays_run_on_a_tiny_target(target_dir, trace, tmp_path):
    from recipes.experiments import replay

    small = f"--target {target_dir} --draft grow:0,1 --trace {trace} --requests 8 --held_back 5 --threads 1"
    for name, more in (
        ("sql_offline", "--passes 2 --update_interval 4"),
        ("sql_grown", ""),
        ("sql_feature_paper", "--draft feature"),
    ):
        flags = [
            *small.split(),
            *more.split(),
            "--log",
            str(tmp_path / f"{name}.jsonl"),
            "--save_to",
            str(tmp_path / name),
        ]
        assert replay.main(["--config", str(FOLDER / f"{name}.yaml"), *flags]) == 0
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert all(row["failed"] == 0 for row in rows)
