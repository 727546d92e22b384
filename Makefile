# Everything that people and CI do here, one word each; `make` alone lists the words.
#
# All of it happens in .venv, which is filled from the hashed locks in requirements/ and
# refreshed when a lock or pyproject.toml changes. Paths are relative, so that any folder will do.

PYTHON ?=
ARGS ?=
ONCE ?=
JOBS ?=

CODE := $(wildcard src tests examples bench docs)
VENV_PYTHON := .venv/bin/python
PIP := $(VENV_PYTHON) -m pip --quiet --quiet --no-input --disable-pip-version-check
UV := uv==0.13.9
COMPILE := .venv/lock/bin/uv pip compile pyproject.toml --universal --python-version 3.11 \
	--generate-hashes --only-binary :all: --emit-build-options --no-emit-index-url \
	--no-emit-find-links --custom-compile-command 'make lock' --quiet

# A user's own interpreter and pip settings must not reach into this environment; where
# packages come from (index, proxy, certificate) stays the user's choice.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONOPTIMIZE PYTHONPATH PYTHONSAFEPATH
unexport PYTHONWARNINGS VIRTUAL_ENV __PYVENV_LAUNCHER__
unexport PIP_CONSTRAINT PIP_DRY_RUN PIP_IGNORE_INSTALLED PIP_NO_BINARY PIP_ONLY_BINARY
unexport PIP_PLATFORM PIP_PREFIX PIP_PYTHON PIP_REPORT PIP_REQUIREMENT PIP_ROOT PIP_TARGET
export PIP_REQUIRE_HASHES := 0
export PIP_USER := 0

# A venv is bound to its folder and its Python; one that has lost either is made anew.
ifneq ($(shell [ -e .venv/.place ] && { [ ! -x $(VENV_PYTHON) ] \
	|| [ "$$(cat .venv/.place)" != "$$(pwd -P)" ]; } && echo lost),)
$(shell rm -rf .venv)
endif

.DEFAULT_GOAL := help
.PHONY: help setup run test check format bench dist docs lock clean

help: ## List what can be made
	@echo 'Orbit: a control plane for unattended work'
	@echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'
	@echo
	@echo '  PYTHON=python3.13 chooses the Python (3.11 or newer) when .venv is first made.'

setup: .venv/.dev ## Make .venv with all that work on Orbit needs
	@echo 'Ready: .venv/bin/orbit --help'

run: .venv/.run ## Run the newsroom example; ONCE=1 ends after one pass
	@$(VENV_PYTHON) examples/newsroom/run.py $(if $(filter-out 0,$(ONCE)),--once)

test: .venv/.dev ## Run the tests; ARGS='tests/unit -k cron' narrows, JOBS=4 runs them side by side
	@$(VENV_PYTHON) -m pytest $(if $(JOBS),--numprocesses=$(JOBS) --dist=loadscope) $(ARGS)

check: .venv/.dev ## Check format, lint, types, import floors, dependencies, dead code
	@echo '== format'
	@$(VENV_PYTHON) -m ruff format --check --quiet --diff .
	@echo '== lint'
	@$(VENV_PYTHON) -m ruff check --quiet .
	@echo '== types'
	@$(VENV_PYTHON) -m mypy $(CODE)
	@echo '== import floors'
	@.venv/bin/lint-imports --no-logo
	@echo '== dependencies'
	@$(VENV_PYTHON) -m deptry --no-ansi src
	@echo '== dead code'
	@$(VENV_PYTHON) -m vulture
	@echo 'All checks passed.'

format: .venv/.dev ## Format the code and mend what the linter can mend by itself
	@$(VENV_PYTHON) -m ruff check --quiet --fix-only .
	@$(VENV_PYTHON) -m ruff format .

bench: .venv/.dev ## Measure speed and memory; ARGS chooses what
	@$(VENV_PYTHON) -m bench $(ARGS)

dist: .venv/.run ## Build wheel and sdist in dist/, the same to the byte from the same commit
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 1580601600)} \
		$(VENV_PYTHON) -m hatchling build --target sdist --target wheel >/dev/null
	@$(VENV_PYTHON) -c '$(DIGESTS)'

docs: .venv/.dev ## Write docs/reference anew from the program
	@$(VENV_PYTHON) docs/make_reference.py

lock: | $(VENV_PYTHON) ## Write the locks anew; ARGS=--upgrade takes the newest versions
	@[ -x .venv/lock/bin/python ] || $(VENV_PYTHON) -m venv .venv/lock
	@.venv/lock/bin/python -m pip --quiet --quiet --no-input --disable-pip-version-check install '$(UV)'
	@$(COMPILE) --extra embedded --extra otel --group build --output-file requirements/run.txt $(ARGS)
	@$(COMPILE) --extra embedded --extra otel --extra parquet --group dev --constraint requirements/run.txt \
		--output-file requirements/dev.txt $(ARGS)
	@sed -n '1,4p; /^pyarrow==/,/# via/p' requirements/dev.txt > requirements/parquet.txt

clean: ## Remove .venv, caches and builds (data in .orbit stays)
	@rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.dev: .venv/.run requirements/dev.txt
	@echo 'Installing the tools for work on Orbit (requirements/dev.txt) ...'
	@$(PIP) install --require-hashes --requirement requirements/dev.txt
	@touch $@

.venv/.run: requirements/run.txt pyproject.toml | $(VENV_PYTHON)
	@echo 'Installing what Orbit runs on (requirements/run.txt) ...'
	@$(PIP) install --require-hashes --requirement requirements/run.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# The first Python that is new enough and can make a venv; else what is wrong with each.
$(VENV_PYTHON):
	@if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; \
	else set -- python3 python3.14 python3.13 python3.12 python3.11; fi; \
	for candidate do \
		if reason=$$("$$candidate" -c '$(USABLE)' 2>&1); then \
			echo "Making .venv with Python $$reason ($$candidate) ..."; \
			"$$candidate" -m venv --clear .venv && pwd -P > .venv/.place; exit; \
		fi; \
		reasons="$$reasons  $$candidate: $$(printf '%s' "$$reason" | tail -n 1)|"; \
	done; \
	echo 'Orbit needs Python 3.11 or newer with its venv module' \
		'(on Debian and Ubuntu: apt-get install python3-venv).' >&2; \
	printf '%s' "$$reasons" | tr '|' '\n' >&2; \
	echo 'Name another one: make PYTHON=/path/to/python3' >&2; exit 1

define USABLE
import sys; version = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("Python %s is too old" % version); import ensurepip, venv; print(version)
endef

define DIGESTS
import hashlib, pathlib; [print(hashlib.sha256(path.read_bytes()).hexdigest(), path) for path in sorted(pathlib.Path("dist").iterdir())]
endef
