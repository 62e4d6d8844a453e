# Every target makes the environment it needs in .venv, or uses that of VENV=folder as it is.
#
#   make test       the tests                          make demo    synthetic patients, end to end, on a CPU
#   make lint       style, format, workflow files      make types   mypy --strict on the whole package
#   make docs       the documentation site, in site/   make coverage
#   make fuzz       inputs at random, FUZZ=5000 of each kind
#   make dist       wheel and sdist, checked

BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
ifndef VENV
VENV := .venv
package := .venv/with-package
test-tools := .venv/with-test-tools
dev-tools := .venv/with-dev-tools
endif
PYTHON := $(VENV)/$(BIN)/python
PYTEST := -m pytest -ra --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: test fuzz lint types docs coverage dist demo

test: $(test-tools)
	$(PYTHON) $(PYTEST)

FUZZ ?= 5000
fuzz: $(test-tools)
	MGML_FUZZ_EXAMPLES=$(FUZZ) $(PYTHON) -m pytest -rP tests/fuzz

lint: $(dev-tools)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(VENV)/$(BIN)/zizmor --offline --quiet .github
	$(VENV)/$(BIN)/hadolint containers/Dockerfile

types: $(dev-tools)
	$(PYTHON) .ci/check_types.py

docs: $(dev-tools)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	$(PYTHON) .ci/check_site.py site

coverage: $(dev-tools)
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run $(PYTEST)
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

dist: $(dev-tools)
	$(PYTHON) -m build --outdir dist
	$(PYTHON) -m twine check --strict dist/*

demo: $(package)
	$(VENV)/$(BIN)/mgml demo -o demo --overwrite

.venv/with-package: extras :=
.venv/with-test-tools: extras := [test]
.venv/with-dev-tools: extras := [test,dev]

.venv/with-%: setup.py pyproject.toml
	test -x .venv/$(BIN)/python || python3 -m venv .venv
	.venv/$(BIN)/python -m pip install --quiet --editable ".$(extras)"
	touch $@
