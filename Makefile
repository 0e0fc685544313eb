# Two commands do everything on a fresh machine with Python 3.11: `make serve` and `make test`.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo-models
RUN     = PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: serve test check format bench peers proto clean help

help:
	@echo "make serve   install, build the demo models, serve them on 127.0.0.1:8000 (HTTP, gRPC), 8001 (gRPC), 8002 (metrics)"
	@echo "make test    the whole test suite"
	@echo "make check   format, lint, types"
	@echo "make bench   the benchmarks (make peers first, to have something to compare with)"

serve: $(VENV)/.serve
	@$(BIN)/doorstep demo $(DEMO)
	@exec $(BIN)/doorstep serve $(DEMO)

test: $(VENV)/.dev
	$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(RUN) $(BIN)/python -m benchmarks

peers: $(VENV)/.dev
	$(RUN) $(BIN)/python -m benchmarks.peers

proto: $(VENV)/.dev
	$(BIN)/python -m doorstep.proto.compile

$(VENV)/bin/python:
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml | $(VENV)/bin/python
	@echo "installing Doorstep (a minute, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing Doorstep and what its tests need (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache
