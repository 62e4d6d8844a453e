# `make test` and `make lint` use the current Python, or that of VENV=folder; `make demo` makes its own .venv.
PYTHON ?= $(if $(VENV),$(VENV)/bin/python,python3)

.PHONY: test lint demo

test:
	$(PYTHON) -m pytest -ra

lint:
	$(PYTHON) -m ruff check .

demo: .venv/bin/mgml
	.venv/bin/mgml demo -o demo --overwrite

.venv/bin/mgml: setup.py pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --editable .
	touch $@
