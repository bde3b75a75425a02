# demo      runs an example; installs nothing but what it needs
# check     what a machine can see: ruff, mypy
# test      the quick tests; test-all: every test
# fuzz      random models, losses, extensions and subsets against plain autograd, for 20 minutes at most
# bench     measures all quantities beside other libraries, for hours: BENCH=... are options of `benchmarks/run.py`
# docs      the pages, in docs/_build; runs all examples for their pictures
# clean     removes what the above leave, except the environment and downloaded data
#
# Everything runs in .venv, made on first use and brought up to date when the files that describe it change; what `bench`
# compares with is in benchmarks/.venv-peers, since the original has the name of this package.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALL := PIP_CONSTRAINT=constraints.txt $(PYTHON) -m pip install --quiet
PEERS := benchmarks/.venv-peers
INSTALL_PEERS := PIP_CONSTRAINT=constraints.txt $(PEERS)/bin/python -m pip install --quiet
DESCRIPTION := pyproject.toml constraints.txt Makefile
WORKERS ?= 2
# One thread for each worker: with PyTorch's default of one for each core, the workers get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS)

.PHONY: all demo check test test-all fuzz bench docs clean
all: check test

demo: $(VENV)/.demo
	$(PYTHON) examples/first_steps/subsampling.py

check: $(VENV)/.develop
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

test: $(VENV)/.develop
	$(PYTEST) -m 'not slow'

test-all: $(VENV)/.develop
	$(PYTEST)

fuzz: $(VENV)/.develop
	OMP_NUM_THREADS=1 $(PYTHON) tests/fuzz $(FUZZ)

bench: $(VENV)/.develop $(PEERS)/.made
	$(PYTHON) benchmarks/run.py --output benchmarks/results/costs.json $(BENCH)

docs: $(VENV)/.docs
	$(PYTHON) -m sphinx --fail-on-warning --keep-going docs docs/_build

clean:
	rm -rf build dist docs/_build docs/gallery docs/generated *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(PEERS)/*' -prune -exec rm -rf {} +

$(PYTHON):
	python3 -m venv $(VENV)

# numpy: without it, importing PyTorch warns.
$(VENV)/.demo: $(DESCRIPTION) | $(PYTHON)
	$(INSTALL) --editable . numpy
	touch $@

# pytorchcv without its dependencies: one of them, torchvision, is not needed and would bring a second, CUDA build of
# PyTorch. What it does need, requests, is among the extra `test`.
$(VENV)/.develop: $(DESCRIPTION) | $(PYTHON)
	$(INSTALL) --editable '.[check,test]'
	$(INSTALL) --no-deps pytorchcv
	touch $@

$(VENV)/.docs: $(DESCRIPTION) | $(PYTHON)
	$(INSTALL) --editable '.[docs]'
	touch $@

# Without their dependencies: the original's bring torchvision, and with it a second, CUDA build of PyTorch; curvlinops'
# bring the original, in any version.
$(PEERS)/.made: constraints.txt Makefile
	python3 -m venv $(PEERS)
	$(INSTALL_PEERS) torch numpy packaging scipy tqdm opt_einsum einops einconv linear_operator accelerate safetensors
	$(INSTALL_PEERS) pretty_midi pyyaml
	$(INSTALL_PEERS) --no-deps backpack-for-pytorch==1.7.1 unfoldNd opacus==1.6.0 curvlinops-for-pytorch==3.0.1
	$(INSTALL_PEERS) --no-deps dattri==0.3.0 kronfluence==1.0.1
	touch $@
