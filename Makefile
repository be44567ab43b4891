# make run [TEXT=file]   install leetcore into .venv and run examples/text.py; needs g++ and Python >= 3.10
# make test              every check; each stage has a target of its own: lint pytest versions cuda ctest sanitize
# make train [ARGS=...]  a language model of bytes, in minutes; make generate lets it write: examples/train_lm.py, generate.py
# make bench [ARGS=...]  how fast leetcore is on this machine; ARGS=--help
# make gpu               build, test and measure the CUDA methods on this machine's NVIDIA GPU, without network: nine minutes
#                        at the most; stages alone: make gpu-build gpu-contract gpu-methods gpu-test gpu-sanitizer gpu-bench
# make cbench [ARGS=...] every method under Google Benchmark; ARGS=--benchmark_filter=forward/chunk
# make format            lay out all code
# make clean             remove .venv and build
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
STAGES := lint pytest versions cuda ctest sanitize
# Whether the package gets the CUDA methods: where there is a GPU, if there is a compiler. CUDA=ON, OFF: in any case.
CUDA ?= $(if $(wildcard /dev/nvidia[0-9]*),AUTO,OFF)

system_path := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_ARGS := -DLEETCORE_CUDA=$(CUDA) $(CMAKE_ARGS)
pip := python -m pip install --quiet
sources := $(shell find CMakeLists.txt pyproject.toml cmake cpp python -type f -not -path '*/__pycache__/*' -not -name '*.md')
c_files = $(shell git ls-files '*.c' '*.h' '*.cpp' '*.hpp' '*.cu' '*.cuh')
COMMIT ?= $(shell git describe --always --abbrev=12 --dirty=+ 2>/dev/null)

run: .venv/package
	python examples/text.py $(TEXT)

# All stages, whether or not an earlier one failed, and then how each of them went.
test: system .venv/test
	@passed=0; failed=0; summary=; \
	for stage in $(STAGES); do \
	  echo "== $$stage"; start=$$(date +%s); \
	  if $(MAKE) --no-print-directory $$stage; then result=passed; passed=$$((passed + 1)); \
	  else result=FAILED; failed=$$((failed + 1)); fi; \
	  summary="$$summary$$(printf '%-10s %-8s %4d s' $$stage $$result $$(($$(date +%s) - start)))\n"; \
	done; \
	printf "\n$$summary"; echo "stages: $$passed passed, $$failed failed"; [ $$failed = 0 ]

lint: .venv/test
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(c_files)
	mypy

pytest: .venv/test
	python -m pytest -q

# The tests of array libraries with the oldest and with the newest that leetcore supports; .venv has versions in between. Each
# set has a virtual environment of 6 GB and takes the leetcore of .venv. In CI it is removed after its tests.
oldest := torch==2.6.0 numpy==1.24.4 ml_dtypes==0.4.0 jax==0.4.30 jaxlib==0.4.30
newest := torch==2.14.1 numpy ml_dtypes jax
version_tests := tests/test_torch_ops.py tests/test_torch_nn.py tests/test_arrays.py tests/test_decay.py

versions: versions-oldest versions-newest

versions-oldest versions-newest: versions-%: build/versions/%/installed .venv/test
	ln -sfn "$$(python -c 'import leetcore, os; print(os.path.dirname(leetcore.__file__))')" build/versions/leetcore
	PYTHONPATH=$(CURDIR)/build/versions build/versions/$*/bin/python -m pytest -q $(version_tests)
	$(if $(CI),rm -rf build/versions/$*)

build/versions/%/installed: Makefile | .venv/bin/python
	python -m venv --clear build/versions/$*
	build/versions/$*/bin/$(pip) pytest $($*)
	@touch $@

# The library with the CUDA methods for two architectures, and what can be known of it without a GPU.
cuda: build/ctest/build.ninja
	cmake --build build/ctest -j $(JOBS) --target cuda_tests
	ctest --test-dir build/ctest -j $(JOBS) --output-on-failure -L cuda

ctest: build/ctest/build.ninja
	cmake --build build/ctest -j $(JOBS)
	ctest --test-dir build/ctest -j $(JOBS) --output-on-failure -LE 'slow|cuda'

# The C and C++ tests with the address and undefined-behaviour sanitizers.
sanitize: build/sanitize/build.ninja
	cmake --build build/sanitize -j $(JOBS)
	ctest --test-dir build/sanitize -j $(JOBS) --output-on-failure -LE slow

# 80: code and PTX, which says what a kernel's launch bounds are.
build/ctest/build.ninja: .venv/nvcc | system .venv/test
	cmake -S . -B build/ctest -G Ninja -D LEETCORE_TESTS=ON -D LEETCORE_TESTS_PYTHON=ON -D LEETCORE_CUDA=ON \
	  -D CMAKE_CUDA_ARCHITECTURES='80;90a-real' -D Python_EXECUTABLE=$(CURDIR)/.venv/bin/python $$(cat .venv/nvcc)

build/sanitize/build.ninja: | system
	cmake -S . -B build/sanitize -G Ninja -D LEETCORE_TESTS=ON -D LEETCORE_SANITIZE=ON -D LEETCORE_CUDA=OFF

# nvcc of a toolkit, or else from PyPI; the file holds what CMake is told of it.
.venv/nvcc: .venv/bin/python
	@if command -v nvcc >/dev/null; then : >$@; else \
	  $(pip) 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*' && echo -D LEETCORE_CUDA_FROM_PYPI=ON >$@; fi

train: .venv/bench
	python examples/train_lm.py $(ARGS)

generate: .venv/bench
	python examples/generate.py $(ARGS)

bench: .venv/bench
	python bench/run.py $(ARGS)

# By the machine's own Python, as that is the one with a torch for its GPU.
gpu_run = CMAKE_ARGS= PATH='$(system_path)' $(PYTHON) tests/gpu/run.py $(ARGS) $(if $(COMMIT),--commit $(COMMIT))
gpu:
	$(gpu_run)
gpu-%:
	$(gpu_run) $*

cbench: build/cbench/build.ninja
	cmake --build build/cbench -j $(JOBS)
	build/cbench/bench/leetcore_bench $(ARGS)

build/cbench/build.ninja: | system
	cmake -S . -B build/cbench -G Ninja -D LEETCORE_BENCH=ON

format: .venv/test
	ruff check --fix-only --quiet .
	ruff format .
	clang-format -i $(c_files)

# Writes docs/api/ from the docstrings.
.PHONY: docs
docs: .venv/test
	python docs/api.py

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/package: .venv/bin/python $(sources)
	$(pip) .
	@touch $@

.venv/test .venv/bench: .venv/%: .venv/bin/python $(sources)
	$(pip) '.[$*]'
	@touch .venv/package $@

# What PyPI does not have, from Debian: installed when we may, else named.
system:
	@missing=; have() { command -v $$1 >/dev/null; }; \
	have g++ || missing="$$missing g++"; \
	have cmake || missing="$$missing cmake"; \
	have ninja || missing="$$missing ninja-build"; \
	have pkg-config || missing="$$missing pkg-config"; \
	[ -e /usr/include/gtest/gtest.h ] || missing="$$missing libgtest-dev"; \
	$(if $(filter cbench,$(MAKECMDGOALS)),[ -e /usr/include/benchmark/benchmark.h ] || missing="$$missing libbenchmark-dev";) \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -n "$$missing" ] || exit 0; \
	if [ $$(id -u) != 0 ]; then echo "These Debian packages are missing:$$missing" >&2; exit 1; fi; \
	get="apt-get install --yes --quiet --no-install-recommends"; \
	$$get $$missing || { apt-get update --quiet && $$get $$missing; }

.PHONY: run test $(STAGES) versions-oldest versions-newest train generate bench gpu cbench format clean system
