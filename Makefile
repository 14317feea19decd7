# `make demo` and `make test` do all set-up themselves: a virtual environment from the pinned, hashed requirements.lock.
PYTHON ?= python3
UV := 0.13.9
READY := .venv/.ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test test-gpu lint docs lock clean reference
demo: $(READY)
	dmd2 run demo
	@echo "open results/report/index.html; the table is results/tables/demo.md"

test: $(READY)
	@sh tests/install_packages.sh
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile --no-loadscope-reorder

# In an environment that is ready: of .venv it takes what is there, and of PATH and PYTHONPATH the rest.
DEVICE ?= cuda
test-gpu:
	OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 DMD2_TEST_DEVICE=$(DEVICE) \
		$(if $(wildcard $(READY)),.venv/bin/python,$(PYTHON)) -m pytest tests/gpu --durations=15

lint: $(READY)
	ruff check .
	ruff format --check .
	snakefmt --check workflow
	mypy

docs: $(READY) # into site/, which loads nothing from elsewhere
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "open site/index.html"

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: Python 3.11 to 3.13 is needed, $(PYTHON) is $$($(PYTHON) -V): make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q uv==$(UV)
	.venv/bin/uv pip install -q --python .venv/bin/python --require-hashes --compile-bytecode -r requirements.lock
	.venv/bin/uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
	touch $@

lock:
	.venv/bin/uv pip compile -q --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
		--extra dev --extra docs --extra data --extra dvc pyproject.toml -o requirements.lock

clean:
	rm -rf site .venv .snakemake .pytest_cache .mypy_cache .ruff_cache

reference: # publish the tables of the last `snakemake digits` in git
	mkdir -p results/reference
	cp results/tables/digits-*.md results/tables/digits-*.csv results/tables/digits-*.json results/reference/
