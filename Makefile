# SPDX-License-Identifier: Apache-2.0
# Every target makes its own environment in .venv; set PYTHON to choose the interpreter it is made from.
PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
AUDIT_VENV ?= .venv-audit
WORKERS ?= 2
TESTS ?=
OUT ?= dist/geode-tiny
TINY ?= geode-tiny

PY := $(VENV)/bin/python
INSTALL := python -m pip --disable-pip-version-check --no-input install --quiet
PIP := $(PY) -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.ready
DOCS_READY := $(DOCS_VENV)/.ready
AUDIT_READY := $(AUDIT_VENV)/.ready
# One thread per worker: two workers that share two cores with many threads each are slower than one.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(ONE_THREAD) $(PY) -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu test-invariant test-min test-max golden audit dev style check types docs dist export tiny clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)$$/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

demo: $(READY)  ## ask the embedded scene its questions (writes geode-demo/)
	@$(VENV)/bin/geode demo

test: $(READY)  ## run the tests that need no GPU and no network
	@$(PYTEST) -n $(WORKERS)

test-all: $(READY)  ## run the slow tests as well
	@scripts/system_packages.sh
	@$(PYTEST) -n $(WORKERS) -m "not gpu and not hub and not invariant"

test-gpu: $(READY)  ## run the tests that need a CUDA device
	@$(PYTEST) -m gpu

test-invariant: $(READY)  ## compare training trajectories that must be equal
	@$(PYTEST) -m invariant

test-min: .venv-min/.ready  ## run the tests with the lowest versions that are supported, in .venv-min
	@$(ONE_THREAD) .venv-min/bin/python -m pytest -n $(WORKERS) $(TESTS)

# What is newest changes from day to day, so that it is asked for in each run.
test-max: .venv-max/.ready  ## run the tests with the newest versions that are supported, in .venv-max
	@.venv-max/bin/$(INSTALL) --upgrade -r requirements/max.txt
	@$(ONE_THREAD) .venv-max/bin/python -m pytest -n $(WORKERS) $(TESTS)

golden: $(READY)  ## measure the shipped checkpoint's numbers again, once it or the embedded room has changed
	@$(ONE_THREAD) $(PY) -m tests.golden_tiny
	@echo "written: tests/fixtures/golden_tiny.json"

audit: $(READY) $(AUDIT_READY)  ## look for known vulnerabilities in what is installed, and list it in build/sbom.cdx.json
	@$(PY) scripts/audit.py $(AUDIT_VENV) $(VENV) build

dev: $(READY)  ## make the environment, and no more
	@echo "ready: $(PY)"

style: $(READY)  ## sort imports, fix what ruff can fix, format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

check: $(READY)  ## lint, formatting and the layout of the package
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PYTEST) tests/test_package_layout.py

types: $(READY)  ## check types (mypy cannot see the mapped folders, so they are built first)
	@rm -rf build/types
	@$(PY) setup.py --quiet build_py --build-lib build/types
	@$(PY) -m mypy build/types/geode

docs: $(DOCS_READY)  ## build the site of docs/ into build/site; a broken link fails
	@rm -rf build/docs-package build/lib
	@PYTHONWARNINGS=ignore $(DOCS_VENV)/bin/python setup.py --quiet build_py --build-lib build/docs-package
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build
	@echo "site: build/site/index.html"

dist: $(READY)  ## build the source distribution, and from it the wheel, into dist/
	@rm -rf build/lib build/bdist.* dist/geode_vlm-*
	@$(PY) -m build --no-isolation --outdir dist .

export: $(READY)  ## write the tiny model as a folder for the Hub (OUT=dist/geode-tiny)
	@$(VENV)/bin/geode export $(OUT)

tiny: $(READY)  ## make 2000 rooms and train the tiny model on them; goes on where it was interrupted (TINY=geode-tiny)
	@$(VENV)/bin/geode data rooms --scenes 2000 --image-size 96 128 --out $(TINY)/data/rooms
	@$(PY) -m geode.trainers.world --data $(TINY)/data --out $(TINY)/run
	@echo "checkpoint and card: $(TINY)/run/checkpoint"

clean:  ## remove what the targets above have made, except environments and geode-tiny
	@rm -rf build dist geode-demo .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.venv*/*' -prune -exec rm -rf {} +

define CHECK_PYTHON
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "geode needs Python 3.11 to 3.13 (transformers 5.23 needs 3.11), and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
endef

$(PY):
	$(CHECK_PYTHON)
	@echo "making $(VENV) with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# The site's tools read docstrings and run nothing, so their environment is small and has no torch.
$(DOCS_READY): requirements/docs.txt
	$(CHECK_PYTHON)
	@echo "making $(DOCS_VENV) with requirements/docs.txt"
	@$(PYTHON) -m venv --clear $(DOCS_VENV) || { rm -rf $(DOCS_VENV); exit 1; }
	@$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --no-input --quiet -r requirements/docs.txt
	@touch $@

$(AUDIT_READY): requirements/audit.txt
	$(CHECK_PYTHON)
	@$(PYTHON) -m venv --clear $(AUDIT_VENV)
	@$(AUDIT_VENV)/bin/$(INSTALL) -r requirements/audit.txt
	@touch $@

.venv-min/.ready .venv-max/.ready: .venv-%/.ready: requirements/%.txt requirements/dev.txt requirements/ui.txt setup.py
	$(CHECK_PYTHON)
	@echo "making .venv-$* with requirements/$*.txt over requirements/dev.txt"
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/$(INSTALL) -r requirements/dev.txt
	@.venv-$*/bin/$(INSTALL) --upgrade -r requirements/$*.txt
	@.venv-$*/bin/$(INSTALL) --no-deps -r requirements/ui.txt
	@PYTHONWARNINGS=ignore .venv-$*/bin/$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# pip is quiet but for errors. The package itself is only linked, so it is installed again when setup.py changes.
$(READY): requirements/dev.txt requirements/ui.txt setup.py | $(PY)
	@echo "installing requirements/dev.txt and geode into $(VENV); the first time this downloads torch"
	@$(PIP) install --quiet -r requirements/dev.txt
	@$(PIP) install --quiet --no-deps -r requirements/ui.txt
	@PYTHONWARNINGS=ignore $(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
