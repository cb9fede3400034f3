# make demo   install what the library needs and watch it answer
# make test   run the tests        make lint   ruff, mypy and import rules
# make bench  run every benchmark  make soak   two thousand requests against one worker
# make clean  remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }; \
	$(PYTHON) scripts/install.py --python $(PYTHON) --venv $(VENV)

.PHONY: demo test lint bench soak clean

demo: $(VENV)/.demo
	@echo "Asking five questions (examples/quickstart.py): about half a minute"
	@$(BIN)/python examples/quickstart.py

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	@mkdir -p bench-results
	@for file in benchmarks/[a-z]*.py; do \
		name=$$(basename $$file .py); echo "== $$name"; \
		$(BIN)/python $$file --json bench-results/$$name.json || exit 1; \
	done

soak: $(VENV)/.dev
	HF_HUB_OFFLINE=1 ORION_SOAK_REQUESTS=2000 ORION_SOAK_REPORT=1 \
		$(BIN)/python -m pytest -s tests/test_soak.py

clean:
	rm -rf $(VENV) build dist bench-results .pytest_cache .mypy_cache .ruff_cache .hypothesis

# llama-cpp-python is compiled on the first install, which takes minutes and a C++ compiler.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(INSTALL) smollm2
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@$(INSTALL) dev
	@touch $@ $(VENV)/.demo
