"""Jobs on top of hf_osd, run from the root of the repository: the main job, `distill.py`, by its path, and all others by name, as in
`python -m recipes.experiments.replay`. A folder imports itself and `common` alone."""
