# Everything happens in .venv; `make setup` is part of each target and does nothing the second time.
PYTHON ?= python3
PIP := .venv/bin/pip --disable-pip-version-check --quiet
PY := .venv/bin/python
UV := .venv/bin/uv
# Or `kustomize build`.
KUSTOMIZE ?= kubectl kustomize
export S2W_HOME ?= $(HOME)/.cache/s2w

.PHONY: setup lock quickstart smollm2 table21 test test-unit test-integration test-long test-gpu check-packaging docs lint \
	format render-deploy

setup: .venv/ready

# torch's CPU build first: pip takes it where a +cpu wheel is to be had (--find-links), uv fetches it otherwise,
# since it knows where PyTorch keeps its CPU builds.
.venv/ready: locks/cpu.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install $$(grep ^uv== locks/cpu.txt)
	$(PIP) install --no-deps $$(grep ^torch== locks/cpu.txt) 2>/dev/null \
		|| $(UV) pip install --quiet --python $(PY) --no-deps --torch-backend=cpu $$(grep ^torch== locks/cpu.txt)
	$(UV) pip install --quiet --python $(PY) --no-deps -r locks/cpu.txt
	$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .
	$(PY) -m s2w.models.smollm2
	touch $@

# Keeps the versions that still satisfy pyproject.toml; `make lock LOCK=--upgrade` takes the newest that do.
lock: setup
	for machine in cpu gpu; do $(UV) pip compile --quiet $(LOCK) --config-file locks/$$machine.toml pyproject.toml \
		--output-file locks/$$machine.txt || exit 1; done
	sed -i '/^torch==/s/$$/+cpu/' locks/cpu.txt

quickstart: setup
	.venv/bin/s2w train experiment=testbed

smollm2: setup
	.venv/bin/s2w train experiment=smollm2

table21: setup
	$(PY) benchmarks/table21.py --json table21.json

test: test-unit test-integration

test-unit: setup
	$(PY) -m pytest -m 'not long' --numprocesses logical tests/unit

test-integration: setup
	$(PY) -m pytest -m 'not long' tests/integration

test-long: setup
	$(PY) -m pytest -m long tests/long

# On a machine with GPUs, in an environment made from locks/gpu.txt: `make test-gpu PY=python`. Tests that need more
# GPUs than there are say so.
test-gpu:
	$(PY) -m pytest -s tests/gpu

check-packaging: setup
	$(PY) -m pytest tests/packaging/check_packaging.py

docs: setup
	$(PY) docs/make_tables.py

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck deploy/slurm/s2w.sbatch
	.venv/bin/hadolint deploy/Dockerfile deploy/Dockerfile.cpu

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# What `kubectl apply -k` would send, a file for each folder with a cluster or a job.
RENDERED ?= build/deploy
render-deploy:
	mkdir -p $(RENDERED)
	$(KUSTOMIZE) deploy/kuberay/volumes >$(RENDERED)/volumes.yaml
	for overlay in one-node 235b fp8; do for kind in cluster job; do \
		$(KUSTOMIZE) deploy/kuberay/overlays/$$overlay/$$kind >$(RENDERED)/$$overlay-$$kind.yaml || exit 1; done; done
