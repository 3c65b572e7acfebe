# On a fresh machine with Python 3.11: `make train`, `make smoke`, `make test`.

PYTHON ?= python3
WORKDIR ?= runs/digits

.PHONY: train test test-long smoke mutants lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
		--constraint constraints.txt --editable '.[dev]'
	.venv/bin/python -m compileall -qq -j 0 .venv/lib  # pip would use one core
	touch $@

train: .venv/installed
	.venv/bin/python -m experiments.train \
		--config=configs/digits_mlp_dpsgd.py --workdir=$(WORKDIR)

# Each engine, mechanism and model under a part of what it can meet. The rest is test-long:
# CI runs both.
test: .venv/installed
	.venv/bin/python -m pytest --numprocesses=2 --dist=worksteal

test-long: .venv/installed
	.venv/bin/python -m pytest --numprocesses=2 --dist=worksteal -m long

# In under a minute: one engine, one mechanism, one run that is resumed.
smoke: .venv/installed
	.venv/bin/python -m pytest tests/contracts/test_engines.py \
		tests/contracts/test_mechanisms.py tests/training/test_train.py \
		-k 'bookkeeping and network or dp_sgd and poisson or resume_after_a_crash'

# Breaks the code in many places, one after the other: a test has to notice each.
mutants: .venv/installed
	.venv/bin/python -m tests.mutation

# SkyPilot reads what launch writes for it. An environment of its own, since it wants an older
# click than the other tools; by uv, since pip takes ten times as long for its 320 MB.
.venv-sky/installed: Makefile
	$(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	.venv-sky/bin/uv pip install --quiet --python .venv-sky skypilot==0.14.1
	touch $@

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/pyrefly check
