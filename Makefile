# `make repro` and `make test` are all that a newcomer needs; both can be repeated and do only what is missing.
PYTHON ?= python3
VENV := .venv
# Stages run as `python -m stages.NAME`, so the environment's python has to come first. The shell's name of this folder, since
# what make puts into a command the shell reads again, and a folder may be called `$HOME`.
RUN := PATH="$$PWD/$(VENV)/bin:$$PATH"
# Two files of tests at a time, in their order: the tests of a file share a server or a clone, and long files begin early.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Which build of torch: `cpu`, or a CUDA version as https://download.pytorch.org/whl has them, such as `cu130`. The
# environment keeps what it was made with until told otherwise. For Linux, PyPI has a CUDA build alone, of several GB; for a
# Mac it has the only one, `pypi`.
INSTALLED_TORCH := $(shell cat $(VENV)/installed 2>/dev/null)
TORCH ?= $(or $(INSTALLED_TORCH),$(if $(filter Darwin,$(shell uname -s)),pypi,cpu))
# Empty if .venv has to be made anew: it is not there or not whole, its Python has gone or is another one since (what was
# installed is then not found), or it was moved here (its programs name the folder where they were made, and run that code).
USABLE := $(shell $(VENV)/bin/python -I -c 'import pip' 2>/dev/null \
	&& { test ! -e $(VENV)/bin/pip || head -n 2 $(VENV)/bin/pip \
	| grep -F -e "$$(pwd -P)/$(VENV)/bin/" -e "$$(cd $(VENV) && pwd -P)/bin/" >/dev/null; } && echo yes)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' requirements.lock)
# Install the build $(2) with the Python $(1). A file that pip's `find-links` has comes first: there may be no network. Three
# equality signs, since two let one build pass for another.
install_torch = $(if $(filter pypi,$(2)),$(1) -I -m pip install --quiet --no-deps torch===$(TORCH_VERSION),\
	$(1) -I -m pip install --quiet --no-deps --no-index torch===$(TORCH_VERSION)+$(2) 2>/dev/null \
	|| $(1) -I -m pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/$(2) torch===$(TORCH_VERSION)+$(2) \
	|| { echo "no torch $(TORCH_VERSION)+$(2) to be had; make TORCH=pypi takes PyPI's, for Linux a CUDA build" >&2; exit 1; })

# Settings of users for other Pythons than that of .venv: where pip installs, and where a Python finds its library.
unexport PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_REQUIRE_VIRTUALENV
export PIP_USER := 0

.PHONY: repro ui study test test-all test-gpu mutants verify bench audit check format lock clean

repro: $(VENV)/installed
	@$(RUN) python -m calm_core.checkout
	$(RUN) dvc repro

# A local Prefect server on 127.0.0.1:4200 and the deployments of prefect.yaml, until Ctrl-C.
ui: $(VENV)/installed
	$(RUN) python -m flows.ui

# Both models over K, widths and budgets, as many points as take HOURS by plan; what is done is not done again. Writes
# results/study.html. `make study HOURS=6` adds points to those of `make study`.
HOURS ?= 3
study: $(VENV)/installed
	@$(RUN) python -m calm_core.checkout
	$(RUN) python -m flows.study --hours $(HOURS)

# Lint, types, and every kind of test; within six minutes on two cores.
test: check
	$(RUN) pytest $(TWO_AT_A_TIME) -m "not slow"

# The rest as well: more moments, faults, processes and ways through the pipeline; some twelve minutes more.
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

# Spelt so that Python 2, too, can say it.
REQUIRE_PYTHON := import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 15) or sys.exit("Python 3.11 to 3.14 is needed, this is %d.%d; try: make PYTHON=python3.11" % v)

$(VENV)/installed: requirements.lock pyproject.toml \
		$(if $(filter-out $(INSTALLED_TORCH),$(TORCH)),another-torch) $(if $(USABLE),,another-environment)
	@test -n "$(USABLE)" && test -e $(VENV)/bin/pip && $(VENV)/bin/python -I -c '$(REQUIRE_PYTHON)' 2>/dev/null || \
		{ $(PYTHON) -c '$(REQUIRE_PYTHON)' && rm -rf $(VENV) && echo '$(PYTHON) -m venv $(VENV)' && $(PYTHON) -m venv $(VENV); }
	$(call install_torch,$(VENV)/bin/python,$(TORCH))
	$(VENV)/bin/python -I -m pip install --quiet --requirement requirements.lock
	$(VENV)/bin/python -I -m pip install --quiet --no-deps --no-build-isolation --editable .
	echo $(TORCH) > $@

another-torch another-environment:

# Resolve pyproject.toml anew in an empty environment, but for two versions: torch stays the one in requirements.lock, where
# its line can be changed first, and botocore the one that params.yaml names, since its text is the corpus. Builds of torch
# differ by machine, so its local label (+cpu) goes. The order is the same whatever pip's version.
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet 'setuptools>=77'
	$(call install_torch,.lock/bin/python,$(if $(filter Darwin,$(shell uname -s)),pypi,cpu))
	.lock/bin/python -m pip install --quiet '.[s3,dev]' 'torch==$(TORCH_VERSION)' "botocore==$$(sed -n 's/^ *botocore_version: *\([0-9.]*\).*/\1/p' params.yaml)"
	.lock/bin/python -m pip freeze --all --exclude calm-reproduction --exclude pip | sed 's/+cpu$$//' | LC_ALL=C sort -f > requirements.lock
	rm -rf .lock

clean:
	rm -rf data models results repeats beside .checkpoints mutants
