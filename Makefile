# The two commands are `make demo` and `make test`; `make help` lists the rest.
# Everything lands in this folder: .venv (the environment) and .cvops (caches, tools). Nothing is installed globally
# but by `make system`, which asks Debian for what Python packages cannot bring.

SHELL  := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p >/dev/null && $$p -c 'import sys; exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
UV     ?= $(shell command -v uv || echo .cvops/tools/uv/bin/uv)
BIN    := .venv/bin
DEBIAN := chromium fonts-dejavu-core git postgresql prometheus prometheus-alertmanager strace
say     = @printf '\033[1m── %s\033[0m\n' "$(1)"

.PHONY: help system setup demo test test-full lab notebooks lock wheel bench bench-peers clean
help:           ## what can be made
	@grep -E '^[a-z-]+: .*##|^[a-z-]+: +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

system:         ## what Debian must bring, where it is missing (Chromium for the browser tests, git, PostgreSQL, Prometheus, strace); starts no service
	@sh .ci/system $(DEBIAN)

setup: .venv/.ready     ## the environment alone: .venv from requirements.lock

.cvops/tools/uv/bin/uv:
	$(call say,uv is not installed: putting it into .cvops/tools/uv)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install one, or say which: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .cvops/tools/uv || { echo "Python cannot make environments here: install its venv module (Debian: apt-get install python3-venv)"; exit 1; }
	@.cvops/tools/uv/bin/pip install --quiet --disable-pip-version-check uv

.venv/.ready: requirements.lock pyproject.toml | $(filter .cvops/%,$(UV))
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found. Install one, or say which: make PYTHON=/path/to/python3.11"; exit 1; }
	$(call say,environment .venv: about 380 packages and 7 GB with the CUDA libraries; the first time takes minutes)
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) .venv
	@$(UV) pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch .venv/.ready

demo: setup     ## the whole loop on the synthetic warehouse, or on your images: make demo DATA=path/to/images [LABEL=coarse]
	$(call say,the loop: images in · a monitored service out)
	@$(BIN)/cvops demo $(if $(DATA),--data "$(DATA)") $(if $(LABEL),--label "$(LABEL)")

test: system setup      ## all tests but the slow campaigns: under 15 minutes on two cores
	$(call say,notebooks)
	@$(BIN)/python tests/notebooks.py
	$(call say,tests)
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-full: test         ## the long campaigns too
	$(call say,crash and damage campaigns in full)
	@CVOPS_FULL=1 $(BIN)/python -m pytest tests/crash $$(grep -l CVOPS_FULL tests/test_*.py)
	@$(BIN)/nbdev-test --flags 'slow' --n-workers 0

lab: setup      ## JupyterLab on nbs/
	@$(BIN)/jupyter lab --notebook-dir=nbs --ServerApp.ip=127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: setup        ## export the notebooks to cvops_wb/, clean them, renew README.md
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python tests/readme.py

lock: | $(filter .cvops/%,$(UV))        ## renew requirements.lock: exact versions with hashes, no address; KEEP=1: only what is new
	@$(UV) pip compile pyproject.toml --universal --python-version 3.11 --extra all --extra sign --extra mongod --constraint .ci/constraints.txt \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet $(if $(KEEP),,--upgrade) -o requirements.lock
	@grep -cE '^[a-zA-Z0-9._-]+==' requirements.lock | sed 's/$$/ packages locked/'

bench: setup    ## every benchmark beside its peers, one after the other; QUICK=1: a minute each, ONLY=dedup: that one
	@mkdir -p .cvops/bench
	@for file in $(if $(ONLY),$(ONLY:%=bench/%.py),bench/*.py); do \
	  printf '\033[1m── %s\033[0m\n' "$$file"; $(BIN)/python $$file $(if $(QUICK),--quick) --json .cvops/bench/$$(basename $$file .py).json || failed="$$failed $$file"; \
	done; [ -z "$$failed" ] || { echo "could not measure:$$failed"; exit 1; }

bench-peers: | $(filter .cvops/%,$(UV))   ## what the benches compare with, each in an environment of its own under .cvops/peers
	$(call say,peers of bench/dedup.py: about 6 GB with imagededup's torch)
	@test -x .cvops/peers/dedup/bin/python || $(UV) venv --quiet --python $(PYTHON) .cvops/peers/dedup
	@$(UV) pip install --quiet --python .cvops/peers/dedup/bin/python imagededup==0.3.3.post2 imagehash==4.3.2
	$(call say,peer of bench/quality.py)
	@test -x .cvops/peers/cleanvision/bin/python || $(UV) venv --quiet --python $(PYTHON) .cvops/peers/cleanvision
	@$(UV) pip install --quiet --python .cvops/peers/cleanvision/bin/python cleanvision==0.3.7
	$(call say,peers of bench/drift.py)
	@test -x .cvops/peers/alibi/bin/python || $(UV) venv --quiet --python $(PYTHON) .cvops/peers/alibi
	@$(UV) pip install --quiet --python .cvops/peers/alibi/bin/python alibi-detect==0.13.0
	@test -x .cvops/peers/frouros/bin/python || $(UV) venv --quiet --python $(PYTHON) .cvops/peers/frouros
	@$(UV) pip install --quiet --python .cvops/peers/frouros/bin/python frouros==0.9.0
	$(call say,peers of bench/serve.py)
	@for peer in "fastapi fastapi==0.163.2 uvicorn[standard]==0.54.0" "bentoml bentoml==1.4.39 uvloop httptools" "litserve litserve==0.2.19" "mlserver mlserver==1.7.1" "mlflow mlflow==3.17.2 onnx==1.23.2"; do set -- $$peer; place=.cvops/peers/$$1; \
	  test -x $$place/bin/python || $(UV) venv --quiet --python $(PYTHON) $$place; shift; \
	  $(UV) pip install --quiet --python $$place/bin/python numpy==2.4.6 pillow==13.0.0 onnxruntime==1.32.0 "$$@"; done
	$(call say,KServe's client of tests/test_serve_protocol.py: MLServer's came with bench/serve.py)
	@test -x .cvops/peers/kserve/bin/python || $(UV) venv --quiet --python $(PYTHON) .cvops/peers/kserve
	@$(UV) pip install --quiet --python .cvops/peers/kserve/bin/python kserve==0.21.0
	$(call say,peers of bench/loader.py: on the workbench's own torch and Pillow)
	@$(UV) pip install --quiet --python $(BIN)/python --target .cvops/peers/loader --no-deps webdataset==1.0.2 mosaicml-streaming==0.13.0 braceexpand zstd python-snappy cramjam \
	  Brotli xxhash catalogue transformers tokenizers regex huggingface-hub typer-slim paramiko

wheel: setup    ## dist/cvops_wb-*.whl
	@$(BIN)/python -m hatchling build -t wheel -d dist

clean: setup    ## empty the caches; never the store
	@$(BIN)/cvops clean
