"""Jobs on top of hf_osd, run from the root of the repository: the main job, `distill.py`, by its path, and what is in the rooms below by its name, as in
`python -m recipes.experiments.replay`. A room knows itself and `common`."""
