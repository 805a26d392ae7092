"""The part of vllm_check.py that runs in vLLM's environment. It needs vllm and, of hf_osd, only `hf_osd.engines.vllm`.

A job comes on standard input and its answer goes to standard output, both as JSON, so that no prompt is written to disk.
"""

from __future__ import annotations

import json
import os
import sys
import time

from hf_osd.engines.vllm import DraftRefresh


class Worker(DraftRefresh):
    """Extends vLLM's workers."""

    def torch_threads(self) -> int:
        """Return the worker's CPU threads."""
        import torch

        return torch.get_num_threads()


def serve(job: dict) -> dict:
    """Answer the job's prompts greedily with target and draft, and again after each refresh; returns answers and vLLM's own counts.

    Args:
        job: `target`, `draft` and `refresh` (folders, the last a list), `method` (vLLM's name for the draft's kind), `prompts` (token ids),
            `dtype`, `gamma`, `max_new_tokens` and `window`, the most tokens of prompt and answer.
    """
    import vllm

    llm = vllm.LLM(
        model=job["target"],
        dtype=job["dtype"],
        max_model_len=job["window"],
        enforce_eager=True,
        disable_log_stats=False,
        worker_extension_cls="recipes.benchmarks.vllm_job.Worker",
        speculative_config={
            "method": job["method"],
            "model": job["draft"],
            "num_speculative_tokens": job["gamma"],
        },
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    runs = []
    for draft in (job["draft"], *job["refresh"]):
        if runs:
            llm.collective_rpc("refresh_draft", args=(draft,))
            llm.reset_prefix_cache()
        before, start = _counts(llm.get_metrics()), time.perf_counter()
        outputs = llm.generate(prompts, greedy, use_tqdm=False)
        seconds, after = time.perf_counter() - start, _counts(llm.get_metrics())
        runs.append(
            {
                "rounds": after["num_drafts"] - before["num_drafts"],
                "drafted": after["num_draft_tokens"] - before["num_draft_tokens"],
                "accepted_by_position": [
                    now - then
                    for now, then in zip(
                        after["num_accepted_tokens_per_pos"], before["num_accepted_tokens_per_pos"], strict=True
                    )
                ],
                "answers": [list(output.outputs[0].token_ids) for output in outputs],
                "seconds": seconds,
            }
        )
    return {"version": vllm.__version__, "threads": llm.collective_rpc("torch_threads")[0], "runs": runs}


def _counts(metrics: list) -> dict:
    """Read vLLM's counters of speculative decoding, since the engine started, by their names without the prefix."""
    prefix = "vllm:spec_decode_"
    counters = {metric.name.removeprefix(prefix): metric for metric in metrics if metric.name.startswith(prefix)}
    # A counter has a value, a vector of counters has values.
    return {name: getattr(counter, "values", None) or counter.value for name, counter in counters.items()}


if __name__ == "__main__":  # vLLM's engine is a child process, which imports this file again
    answer_to = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM and its children log to standard output
    json.dump(serve(json.load(sys.stdin)), answer_to)
    answer_to.close()
