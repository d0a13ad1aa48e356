# `make repro` and `make test` are all that a newcomer needs; both can be repeated and do only what is missing.
PYTHON ?= python3
VENV := .venv
# Stages run as `python -m stages.NAME`, so the environment's python has to come first.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
# Two files of tests at a time, in their order: the tests of a file share a server or a clone, and long files begin early.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: repro ui test test-all test-gpu mutants verify bench audit check format lock clean

repro: $(VENV)/installed
	$(RUN) dvc repro

# A local Prefect server on 127.0.0.1:4200 and the deployments of prefect.yaml, until Ctrl-C.
ui: $(VENV)/installed
	$(RUN) python -m flows.ui

# Lint, types, and every kind of test; within six minutes on two cores.
test: check
	$(RUN) pytest $(TWO_AT_A_TIME) -m "not slow"

# The rest as well: more moments, faults, processes and ways through the pipeline; some seven minutes more.
test-all: test
	$(RUN) pytest $(TWO_AT_A_TIME) -m slow

# What needs a CUDA device; elsewhere each test says that there is none, and is skipped.
test-gpu: $(VENV)/installed
	$(RUN) pytest -m gpu -r s

# The smoke pipeline twice, in clean clones of the last commit: do all artefacts come out the same, byte for byte?
verify: $(VENV)/installed
	$(RUN) python -m verification

# Speed and memory against yardsticks: a table, and results/benchmarks.json. Says what it finds, and fails at nothing.
bench: $(VENV)/installed
	$(RUN) python -m benchmarks

# Faults put into models, losses, metrics and trainings, one at a time: which ones do the quick tests not notice? Half an hour
# on two cores; a run that was stopped goes on, and one after a change tries the changed functions again.
mutants: $(VENV)/installed
	$(RUN) mutmut run
	$(RUN) python -m verification.mutants mutants/calm_core

# Known vulnerabilities of what requirements.lock pins. pip-audit lives apart: it is no part of the environment that it judges.
audit: .audit/installed
	@$(PYTHON) -m verification.audit .audit/bin/pip-audit

.audit/installed:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit
	touch $@

check: $(VENV)/installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports

format: $(VENV)/installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try: make PYTHON=python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Resolve pyproject.toml anew in an empty environment. Builds of torch differ by machine, so its local label (+cpu) goes.
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet 'setuptools>=77' torch==2.13.0
	.lock/bin/python -m pip install --quiet '.[s3,dev]'
	.lock/bin/python -m pip freeze --all --exclude calm-reproduction --exclude pip | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock

clean:
	rm -rf data models results .checkpoints mutants
