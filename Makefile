# Two commands do everything on a fresh machine with Python 3.11: `make serve` and `make test`.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := demo-models
RUN     = PATH="$(CURDIR)/$(BIN):$$PATH"

# The PyTorch that `make engines` brings; name a CPU build's version where pip would take a larger one.
TORCH  ?= torch==2.13.0

.PHONY: serve test check format bench engines peers proto clean help

help:
	@echo "make serve   install, build the demo models, serve them on 127.0.0.1:8000 (HTTP, gRPC), 8001 (gRPC), 8002 (metrics)"
	@echo "make test    the whole test suite"
	@echo "make check   format, lint, types"
	@echo "make engines what the tests of optional engines need (PyTorch, OpenVINO: gigabytes); without it they are skipped"
	@echo "make bench   the benchmarks (make peers first, to have something to compare with)"

serve: $(VENV)/.serve
	@$(BIN)/doorstep demo $(DEMO)
	@exec $(BIN)/doorstep serve $(DEMO)

test: $(VENV)/.dev
	$(RUN) $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart=0

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

engines: $(VENV)/.engines

$(VENV)/.engines: $(VENV)/.dev
	@echo "installing the optional engines of language models (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' -e '.[transformers,openvino]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Doorstep needs Python 3.11 or newer, and '$(PYTHON)' is none. Install it (apt install python3.11 python3.11-venv,"; \
	  echo "brew install python@3.11, uv python install 3.11, pyenv install 3.11 ...), or name another: make PYTHON=python3.12"; \
	  exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3.11-venv"; exit 1; }

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
