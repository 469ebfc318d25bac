# make run    a fine-tune from nothing to its result table, on this machine's CPU
# make run-finetune    the same from a file of conversations to an exported model that answers; killed in the middle
# make test   every test; make check is the part of it that only reads the code
# make quick  the tests that need no NeMo, Slurm, browser, LaTeX or build, with fewer random examples: two minutes
# make docs   the documentation, as a site in site/
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
installed := $(VENV)/.installed
# Two workers: pytest-xdist keeps the tests of a group on one of them, see tests/conftest.py.
pytest := $(bin)/pytest -n 2 --dist loadgroup
# Other versions of NeMo and Megatron-Core, each in an environment on top of $(VENV): tests/runtime/test_versions.py
sets := $(patsubst tests/runtime/sets/%.txt,.venv-sets/%/.installed,$(wildcard tests/runtime/sets/*.txt))
# The second engine, in an environment of its own, with its own constraints
bridge := .venv-bridge/.installed
light := not runtime and not slurm and not tex and not browser and not slow

.PHONY: run run-finetune test quick check coverage docs pytest install sets bridge compile clean
.DEFAULT_GOAL := help
help:
	@sed -n 's/^# make/make/p' Makefile

run: $(installed)
	@echo "1/3 compile specs/quickstart.toml"
	$(bin)/ftgen compile specs/quickstart.toml
	@echo "2/3 bash generated/quickstart.sh (converts a checkpoint, trains 100 steps)"
	PATH="$(abspath $(bin)):$$PATH" bash generated/quickstart.sh
	@echo "3/3 ftgen tabulate logs/"
	$(bin)/ftgen tabulate logs/

run-finetune: $(installed)
	PATH="$(abspath $(bin)):$$PATH" $(bin)/python -W ignore examples/finetune.py

test: check docs pytest

# Each tool speaks only when it has found something.
check: $(installed)
	@$(bin)/ruff check --quiet ftgen runtime tests docs bench examples
	@$(bin)/ruff format --quiet --check ftgen runtime tests docs bench examples
	@$(bin)/mypy --no-error-summary
	@found=$$($(bin)/lint-imports 2>&1) || { echo "$$found"; exit 1; }
	@$(bin)/ftgen compile $(filter-out specs/quickstart%,$(wildcard specs/*.toml)) --check
	@$(bin)/shellcheck generated/*.sh
	@$(bin)/hadolint docs/how-to/Containerfile
	@RUST_LOG=error $(bin)/taplo lint specs/*.toml specs/sites/*.toml

coverage: $(installed)
	$(pytest) -q -m "$(light)" --cov --cov-report=term-missing:skip-covered

quick: $(installed)
	$(pytest) -q -m "$(light)" --hypothesis-profile=quick

pytest: $(installed) $(sets) $(bridge)
	$(pytest)

sets: $(sets)
.venv-sets/%/.installed: tests/runtime/sets/%.txt $(installed)
	rm -rf $(@D)
	$(bin)/python -m venv --without-pip $(@D)
	$(bin)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$$(echo $(@D)/lib/python3*/site-packages)/under.pth"
	$(bin)/python -m pip --python $(@D) install --disable-pip-version-check --progress-bar off --quiet --no-deps -r $<
	touch $@

# Megatron-Core is built from its source, because its wheels are for Python 3.12 alone. The wheel of nvidia-resiliency-ext asks for
# a newer glibc than its Python needs.
bridge: $(bridge)
.venv-bridge/.installed: pip = .venv-bridge/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet
.venv-bridge/.installed: pyproject.toml constraints-bridge.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	@echo "installing Megatron-Bridge, Megatron-Core and torch into $(@D): some minutes, about 3 GB"
	$(pip) -c constraints-bridge.txt -e '.[bridge]'
	$(pip) --no-deps --ignore-requires-python --no-build-isolation $$(grep '^megatron-[bc]' constraints-bridge.txt)
	$(pip) --no-deps --only-binary=:all: --platform manylinux_2_39_x86_64 --target "$$(echo $(@D)/lib/python3*/site-packages)" \
		$$(grep '^nvidia-resiliency-ext' constraints-bridge.txt)
	touch $@

docs: $(installed)
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs --quiet build --strict

compile: $(installed)
	$(bin)/ftgen compile $(filter-out specs/quickstart%,$(wildcard specs/*.toml))

install: $(installed)
$(installed): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ftgen needs Python 3.10 or later: make PYTHON=<one>")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing NeMo, Megatron-Core and torch into $(VENV): some minutes, about 3 GB"
	$(bin)/python -m pip install --disable-pip-version-check --progress-bar off --quiet -c constraints.txt -e '.[runtime,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-sets .venv-bridge site logs HF_ckpt data generated/quickstart.*
