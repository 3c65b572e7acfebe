# Two commands on a fresh machine with Python 3.11: `make train`, `make test`.

PYTHON ?= python3
WORKDIR ?= runs/digits

.PHONY: train test lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

train: .venv/installed
	.venv/bin/python -m experiments.train \
		--config=configs/digits_mlp_dpsgd.py --workdir=$(WORKDIR)

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/pyrefly check
