# `make demo` and `make test` each work as the first command after a clone: both set up `.venv`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two processes of one thread each use two cores better than one process of two threads.
WORKERS ?= 2
# The oldest transformers that nemotron_v3.hf takes (hf/versions.py), in an environment of its own,
# which sees the other packages of $(VENV).
OLDEST_TRANSFORMERS := 5.17.0
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready-$(OLDEST_TRANSFORMERS)
# NeMo AutoModel as nemotron_v3.nemo takes it (nemo/versions.py): each version with the transformers
# that it pins, what that takes, and what its recipe imports of the rest that it declares.
AUTOMODEL ?= 0.7.0
OLDER_HUB := huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 tokenizers==0.22.2
AUTOMODEL_0.7.0 := transformers==5.18.0
AUTOMODEL_0.6.0 := transformers==5.12.1 $(OLDER_HUB)
AUTOMODEL_0.5.0 := transformers==5.8.1 $(OLDER_HUB)
AUTOMODEL_NEEDS := nemo-automodel==$(AUTOMODEL) torchdata==0.11.0 $(AUTOMODEL_$(AUTOMODEL))
AUTOMODEL_ENV := .venv-automodel-$(AUTOMODEL)
AUTOMODEL_READY := $(AUTOMODEL_ENV)/.ready
# More options for a verb: make demo ARGS="--minutes 2 --out runs/short"
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs test-integrations test-oldest-transformers \
	test-automodel bench bench-against clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(READY) ## make .venv with the pinned set and this package, editable

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train a small hybrid on Python's standard library, save, reload, generate
	$(BIN)/nemotron-v3 demo $(ARGS)

test: lint ## ruff, pyright and the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-integrations: $(READY) ## the tests that take longer: whole programs, other projects
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'heavy or integration' $(ARGS)
	$(MAKE) test-oldest-transformers

test-oldest-transformers: $(OLDEST_READY) ## tests/hf with the oldest transformers it takes
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) \
		-m 'not heavy' tests/hf $(ARGS)

$(OLDEST_READY): $(READY)
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python*/site-packages)')" \
		> $$(echo $(OLDEST)/lib/python*/site-packages)/shared.pth
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

test-automodel: $(AUTOMODEL_READY) ## tests/nemo beside NeMo AutoModel (AUTOMODEL=0.6.0, 0.5.0)
	OMP_NUM_THREADS=1 $(AUTOMODEL_ENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile \
		-m '' tests/nemo $(ARGS)

$(AUTOMODEL_READY): $(READY)
	rm -rf $(AUTOMODEL_ENV)
	$(BIN)/python -m venv $(AUTOMODEL_ENV)
	echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python*/site-packages)')" \
		> $$(echo $(AUTOMODEL_ENV)/lib/python*/site-packages)/shared.pth
	$(AUTOMODEL_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		$(AUTOMODEL_NEEDS)
	@touch $@

lint: $(READY) ## ruff, pyright and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell

format: $(READY) ## ruff's formatter, and the fixes that it can make
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/ is the site; for its search: $(BIN)/python -m http.server --directory site"

bench: $(READY) ## the benchmark tables
	$(BIN)/python -m benchmarks $(ARGS)

bench-against: $(READY) ## rows of this tree beside another's, by turns: TREE=path ARGS="cpu moe_gpu"
	$(BIN)/python -m benchmarks.against $(TREE) $(ARGS)

clean: ## remove the environments, builds and caches; runs/ stays
	rm -rf $(VENV) $(OLDEST) $(AUTOMODEL_ENV) build dist site .pytest_cache .ruff_cache .hypothesis
