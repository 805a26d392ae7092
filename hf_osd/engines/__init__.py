"""Brings a learnt draft into other engines that serve, while they run.

`vllm` runs in its engine's environment, and needs the engine and nothing else of hf_osd; `sidecar` stands in front of engines and teaches their draft.
"""
