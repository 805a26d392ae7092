"""The model card of an adapted draft: figures and facts, no text of any request."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_osd.stats import Stats


def model_card(
    stats: Stats, target: str | None = None, license: str | None = None, domains: dict[str, dict] | None = None
) -> str:
    """A README.md for the Hub.

    Args:
        stats ([`Stats`]): what serving observed.
        target (`str`, *optional*): name of the target.
        license (`str`, *optional*): the target's licence, which a draft grown from it inherits.
        domains (`dict`, *optional*): by domain name, `requests`, `alpha_before` and `alpha_after`, as in the recipe's summary.json.
    """
    from huggingface_hub import ModelCard, ModelCardData

    local = target is None or target.startswith((".", "/"))  # a path says nothing to others, and much about a machine
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_osd", "speculative-decoding", "assistant-model"],
        base_model=None if local else target,
        license=license,
    )
    total = stats.total
    lines = [
        "# Draft model for speculative decoding",
        "",
        f"Adapted by hf_osd while it served{'' if local else f' `{target}`'}: {total.requests} requests, {stats.updates} updates on "
        f"{stats.learned_tokens} token positions. It drafts; the target decides. Its weights can have memorised some of its traffic.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| alpha (expected acceptance, last {stats.rolling.requests} requests) | {_figure(stats.rolling.alpha)} |",
        f"| alpha_live (accepted / tested, last {stats.rolling.requests} requests) | {_figure(stats.rolling.alpha_live)} |",
        f"| tokens a round (last {stats.rolling.requests} requests) | {_figure(stats.rolling.tokens_per_round)} |",
    ]
    if domains:
        lines += ["", "| domain | requests | alpha before | alpha after (held back) |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {d['requests']} | {_figure(d['alpha_before'])} | {_figure(d['alpha_after'])} |"
            for name, d in domains.items()
        ]
    lines += [
        "",
        "```python",
        "from hf_osd import OnlineAssistant",
        "",
        'assistant = OnlineAssistant.from_pretrained("THIS_REPOSITORY")',
        "target.generate(**inputs, assistant_model=assistant)",
        "```",
        "",
        "It is a plain transformers checkpoint: stock `generate(assistant_model=AutoModelForCausalLM.from_pretrained(...))` takes it too.",
        "",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
