"""Writes the model card of an adapted draft: figures with the counts behind them, and facts; no text of any request, no path and no name of a machine."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import re
from typing import TYPE_CHECKING

from hf_osd.config import OnlineConfig
from hf_osd.metrics.stats import figure_text, is_figure
from hf_osd.policy.report import observed_speedup

if TYPE_CHECKING:
    import torch
    from huggingface_hub import EvalResult

    from hf_osd.metrics.stats import Stats
    from hf_osd.policy.lookahead import DraftPolicy

logger = logging.getLogger(__name__)

# The columns of the table of domains, in order; a figure that no domain has gets no column.
_DOMAIN_FIGURES = (
    "requests",
    "held_back",
    "alpha_before",
    "alpha_after",
    "compared",
    "speedup_decode",
    "speedup_end_to_end",
    "gain_of_learning",
    "gain_of_learning_end_to_end",
)
# The figures that the Hub shows: label, and the name of the count behind each.
_MEASURED = {
    "alpha_before": ("α before adaptation", "held_back"),
    "alpha_after": ("α after adaptation", "held_back"),
    "speedup_decode": ("decoding speed-up over plain decoding", "compared"),
    "speedup_end_to_end": ("speed-up, learning included", "compared"),
    "gain_of_learning": ("decoding speed-up over the suffix cache alone", "compared"),
    "gain_of_learning_end_to_end": ("speed-up over the suffix cache alone, learning included", "compared"),
}


def model_card(
    stats: Stats,
    target: str | None = None,
    license: str | None = None,
    domains: dict[str, dict] | None = None,
    *,
    license_name: str | None = None,
    license_link: str | None = None,
    lookahead: DraftPolicy | None = None,
    config: OnlineConfig | None = None,
    machine: dict | None = None,
    adapter: tuple[str | None, bool] | None = None,
    layout: str | None = None,
    repo_id: str | None = None,
    custom_generate: bool = False,
    grown: list[str] | None = None,
    **unknown,
) -> str:
    """Write a README.md for the Hub, with the `model-index` that the Hub reads. A figure that was not measured is left out, or a dash.

    Args:
        stats ([`Stats`]): the statistics of serving.
        target (`str`, *optional*): name of the target.
        license (`str`, *optional*): the target's licence, which a draft grown from it inherits; `license_name` and `license_link` where it is `"other"`.
        domains (`dict`, *optional*): by domain name, figures as in the recipe's summary.json: `requests`, `alpha_before`, `alpha_after`, `compared`,
            `speedup_decode`, `speedup_end_to_end`, `gain_of_learning`, `gain_of_learning_end_to_end`; and `held_back`, the prompts behind the α.
        lookahead ([`DraftPolicy`], *optional*): the policy, which has measured the costs of drafting and verifying.
        config ([`OnlineConfig`], *optional*): the options, of which the card lists those that differ from the defaults.
        machine (`dict`, *optional*): facts about the machine, see [`machine_facts`].
        adapter (`tuple[str | None, bool]`, *optional*): for a draft with an adapter, the repository of its base, and whether the base is saved with it.
        layout (`str`, *optional*): for a draft that reads the target's hidden states, the layout that it is saved in, see [`hf_osd.save_feature_draft`].
        repo_id (`str`, *optional*): the repository of the draft.
        custom_generate (`bool`): whether the repository has a generation strategy.
        grown (`list[str]`, *optional*): for a draft that was distilled and has served nothing yet, lines about that, in place of the figures of serving.
        **unknown: other facts; left out, with a warning.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if unknown:
        logger.warning("The model card has no place for %s; left out.", ", ".join(sorted(unknown)))
    target = None if target is None or _is_local(target) else target
    domains = _by_public_name(domains or {})
    base, whole = adapter or (None, True)
    results = _results(stats, domains)
    data = ModelCardData(
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation",
        tags=["hf_osd", "speculative-decoding", "assistant-model"]
        + (["lora"] if adapter else [])
        + (["eagle3"] if layout else [])
        + (["custom_generate"] if custom_generate else []),
        base_model=target if whole else base,
        license=license,
        license_name=license_name,
        license_link=license_link,
        eval_results=results or None,
        model_name=_name(repo_id) if results else None,
    )
    lines = [
        f"# {_name(repo_id)}",
        "",
        *(_served(stats, lookahead, _of(target)) if grown is None else [*grown, ""]),
        *_by_domain(domains),
        *_facts("Machine", machine or {}),
        *_facts("Recipe", _recipe(config)),
        *_use(repo_id, adapter, custom_generate, layout),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def machine_facts(device: torch.device, dtype: torch.dtype) -> dict:
    """Describe the hardware and software on which figures were measured, without names of the machine or its user."""
    import torch
    import transformers

    from hf_osd import __version__

    accelerator = (
        getattr(torch, device.type).get_device_name(device) if device.type in ("cuda", "xpu") else device.type
    )
    return {
        "device": "CPU" if device.type == "cpu" else accelerator,
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_osd": __version__,
    }


def _served(stats: Stats, lookahead: DraftPolicy | None, of_target: str) -> list[str]:
    total = stats.total
    return [
        f"A draft model for speculative decoding{of_target}, adapted by hf_osd while it served: {total.requests} requests, {stats.updates} updates on "
        f"{stats.learned_tokens} token positions. It drafts; the target decides. Its weights can have memorised some of its traffic.",
        "",
        *_figures(stats, lookahead),
    ]


def _figures(stats: Stats, lookahead: DraftPolicy | None) -> list[str]:
    """Make the table of figures measured while serving: figure, value, and the counts behind it."""
    rolling, estimate = stats.rolling, stats.estimate
    last, new = f"last {rolling.requests} requests", f"{rolling.new_tokens} tokens"
    tested = f"{rolling.accepted} of {rolling.tested} tokens"
    rows = [
        (f"alpha (expected acceptance, {last})", rolling.alpha, f"{rolling.overlap_count} positions"),
        (f"alpha_live (accepted / tested, {last})", rolling.alpha_live, tested),
        (f"tokens a round ({last})", rolling.tokens_per_round, f"{new}, {rolling.rounds} rounds"),
    ]
    if estimate is not None and estimate.requests > 1:
        counted = f"the last {estimate.requests} requests, each before it was learnt"
        interval = f"{figure_text(estimate.alpha)} ({figure_text(estimate.low)} to {figure_text(estimate.high)})"
        rows += [
            ("alpha_static (without any learning)", estimate.gain.before, counted),
            ("alpha_prequential", interval, counted),
            ("regret_vs_static", stats.regret_vs_static, "of all accepted tokens"),
        ]
    if lookahead is not None:
        costs = lookahead.costs
        given = "given, not measured" if costs.are_fixed else "measured while serving"
        if costs.c is not None:
            rows.append(("c (a draft step, in one-token target steps)", costs.c, given))
        if costs.are_fixed or costs.longest_measured > 1:
            longest = lookahead.max_gamma + 1
            v = [f"v({n}) = {x:.2f}" for n, x in enumerate(costs.v_upto(longest), 1) if n in (2, 4, longest)]
            rows.append(("v (verifying n tokens, in the same)", ", ".join(v), given))
        if (speedup := observed_speedup(rolling, lookahead)) is not None:
            rows.append((f"speed-up over plain decoding ({last}, prompts included)", speedup, new))
    lines = [
        f"| {name} | {value if isinstance(value, str) else figure_text(value)} | {counted} |"
        for name, value, counted in rows
    ]
    return ["| figure | value | counted over |", "|---|---|---|", *lines, ""]


def _by_domain(domains: dict[str, dict]) -> list[str]:
    if not domains:
        return []
    names = [name for name in _DOMAIN_FIGURES if any(name in figures for figures in domains.values())]
    rows = [[domain, *(_cell(figures.get(name)) for name in names)] for domain, figures in domains.items()]
    return [
        "α is on prompts held back from learning, before and after serving; speed-ups over plain decoding, and the gain of learning "
        "over the suffix cache alone, are on the requests that were decoded in these ways too (compared).",
        "",
        *(f"| {' | '.join(row)} |" for row in (["domain", *names], ["---"] * (len(names) + 1), *rows)),
        "",
    ]


def _facts(title: str, facts: dict) -> list[str]:
    if not facts:
        return []
    return [f"## {title}", "", *(f"- {name}: {value}" for name, value in facts.items() if value is not None), ""]


def _recipe(config: OnlineConfig | None) -> dict:
    """List the options that differ from the defaults."""
    if config is None:
        return {}
    changed = {
        field.name: f"`{value!r}`"
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    return {"OnlineConfig": "its defaults, except for" if changed else "its defaults"} | changed


def _use(
    repo_id: str | None, adapter: tuple[str | None, bool] | None, custom_generate: bool, layout: str | None
) -> list[str]:
    where = repo_id or "THIS_REPOSITORY"
    target = ", target=target" if layout else ""
    lines = [
        "## Use",
        "",
        "```python",
        "from hf_osd import OnlineAssistant",
        "",
        f'assistant = OnlineAssistant.from_pretrained("{where}"{target})',
        "target.generate(**inputs, assistant_model=assistant)",
        "```",
        "",
    ]
    if custom_generate:
        lines += [
            "With nothing patched in transformers, by the generation strategy in `custom_generate/`:",
            "",
            "```python",
            f'target.generate(**inputs, assistant_model=assistant, custom_generate="{where}", trust_remote_code=True)',
            "```",
            "",
        ]
    if layout:
        engines = {
            "osd": 'which hf_osd reads; serving engines read what `save_pretrained(folder, layout="eagle3")` writes.',
            "eagle3": f'which vLLM serves too, with `{{"method": "eagle3", "model": "{where}", "num_speculative_tokens": 4}}` as its `--speculative-config`.',
            "speculators": f"which vLLM serves too, by `vllm serve {where}`.",
        }
        how = f"It is an EAGLE-3 head, which reads the target's hidden states, in the layout `{layout}`, {engines[layout]}"
        return [*lines, how, ""]
    kind = "a plain transformers checkpoint"
    if adapter:
        base, whole = adapter
        kind = "an adapter, with its base in this repository" if whole else f"an adapter of `{base}`"
    return [
        *lines,
        f"It is {kind}: stock `generate(assistant_model=AutoModelForCausalLM.from_pretrained(...))` takes it too.",
        "",
    ]


def _results(stats: Stats, domains: dict[str, dict]) -> list[EvalResult]:
    """Make the model-index: each measured figure of each domain, and α of the last requests, each before it was learnt."""
    results = []
    for domain, figures in domains.items():
        for name, (label, count) in _MEASURED.items():
            if is_figure(figures.get(name)):
                counts = {
                    key: figures[key] for key in dict.fromkeys(("requests", count)) if figures.get(key) is not None
                }
                results.append(_result(domain, name, label, figures[name], counts))
    estimate = stats.estimate
    if estimate is not None and estimate.requests > 1 and is_figure(estimate.alpha):
        counts = {"requests": estimate.requests, "low": round(estimate.low, 4), "high": round(estimate.high, 4)}
        results.append(
            _result(
                "requests before they were learnt",
                "alpha_prequential",
                "α of the last requests, each before it was learnt",
                estimate.alpha,
                counts,
            )
        )
    return results


def _result(dataset: str, name: str, label: str, value: float, counts: dict) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        task_name="Speculative decoding",
        dataset_type=re.sub(r"[^\w.-]+", "-", dataset),
        dataset_name=dataset,
        metric_type=name,
        metric_name=label,
        metric_value=round(float(value), 4),
        metric_args=counts,
    )


def _of(target: str | None) -> str:
    return "" if target is None else f" with `{target}`"


def _name(repo_id: str | None) -> str:
    return "Adapted draft" if repo_id is None else repo_id.rsplit("/")[-1]


def _is_local(name: str) -> bool:
    """Tell whether a name is a path, which is useless to others and reveals things about this machine."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or os.path.exists(name)


def _public(name: str) -> str:
    """Return a domain's name as a cell of a table; only the last part of a path."""
    name = re.split(r"[/\\]", name)[-1] if _is_local(name) else name
    return re.sub(r"\s+", " ", name).replace("|", "/")


def _by_public_name(domains: dict[str, dict]) -> dict[str, dict]:
    """Rename domains to public names, all different."""
    found: dict[str, dict] = {}
    for name, figures in domains.items():
        shown, n = _public(name), 1
        while shown in found:  # two paths may have the same last part
            n += 1
            shown = f"{_public(name)} ({n})"
        found[shown] = figures
    return found


def _cell(value: float | int | None) -> str:
    return str(value) if isinstance(value, int) else figure_text(value)
