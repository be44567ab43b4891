#   make run [TEXT=file]   installs leetcore into .venv and runs examples/text.py and examples/hybrid.py; needs g++
#                          and Python >= 3.10
#   make test              runs all checks; each stage is a target: install lint pytest cuda versions ctest sanitize
#   make quick             runs the checks most likely to fail after a change, in two minutes; it lists the others
#   make train [MODEL=mamba2] [ARGS=...]  trains a language model of bytes in minutes: examples/train_lm.py
#   make generate          lets the trained model write: examples/generate.py
#   make bench [ARGS=...]  measures how fast leetcore is on this machine; ARGS=--help
#   make gpu               builds, tests and measures the CUDA methods on this machine's NVIDIA GPU, without network, in
#                          at most nine minutes; stages: make gpu-build gpu-contract gpu-methods gpu-test gpu-sanitizer
#                          gpu-bench
#   make cbench [ARGS=...] runs every method under Google Benchmark; ARGS=--benchmark_filter=forward/chunk
#   make docs              writes docs/api/ from the docstrings
#   make format            formats all code
#   make clean             removes .venv and build
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
STAGES := install lint pytest cuda versions ctest sanitize
# AUTO builds the CUDA methods into the package if there is a CUDA compiler. ON requires them, OFF
# leaves them out.
CUDA ?= $(if $(wildcard /dev/nvidia[0-9]*),AUTO,OFF)

system_path := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_ARGS := -DLEETCORE_CUDA=$(CUDA) $(CMAKE_ARGS)
# All builds compile the CPU methods by the same compiler name and flags, so that ccache compiles
# each source once. Builds work without ccache too.
ifeq ($(origin CXX),default)
CC := gcc
CXX := g++
endif
export CC CXX
export CCACHE_DIR ?= $(CURDIR)/build/ccache
launcher = $(shell command -v ccache)
export CMAKE_C_COMPILER_LAUNCHER ?= $(launcher)
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(launcher)
export CMAKE_CUDA_COMPILER_LAUNCHER ?= $(launcher)
# Python compiles a module when a program imports it; pip would compile all modules of torch and
# jax.
pip := python -m pip install --quiet --no-compile
# The build tools are in .venv, because pip would otherwise put them into a new folder for every
# build and compile nanobind again.
build_tools := 'scikit-build-core>=0.11' 'nanobind>=2.4' $(foreach tool,cmake ninja,$(if $(shell command -v $(tool)),,$(tool)))
install = $(pip) $(if $(LEETCORE_CUDA_FROM_PYPI),,--no-build-isolation)
sources := $(shell find CMakeLists.txt pyproject.toml cmake cpp python -type f -not -path '*/__pycache__/*' -not -name '*.md')
c_files = $(shell git ls-files '*.c' '*.h' '*.cpp' '*.hpp' '*.cu' '*.cuh')
COMMIT ?= $(shell git describe --always --abbrev=12 --dirty=+ 2>/dev/null)

run: .venv/bench
	python examples/text.py $(TEXT)
	python examples/hybrid.py

# Runs every stage, even after one has failed, and ends with the result and the time of each and the
# slowest tests. The virtual environments of `versions` are downloaded while `cuda` compiles.
test: system
	@rm -rf build/logs; mkdir -p build/logs; passed=0; failed=0; summary=; begin=$$(date +%s); \
	for stage in $(STAGES); do \
	  echo "== $$stage"; start=$$(date +%s); \
	  case "$$stage: $(STAGES)" in \
	    cuda:*cuda*versions*) $(MAKE) --no-print-directory $(version_sets) >build/logs/versions.log 2>&1 & ;; \
	    versions:*) wait ;; \
	  esac; \
	  if $(MAKE) --no-print-directory $$stage; then result=passed; passed=$$((passed + 1)); \
	  else result=FAILED; failed=$$((failed + 1)); fi; \
	  seconds=$$(($$(date +%s) - start)); echo "== $$stage: $$result in $$seconds s"; \
	  summary="$$summary$$(printf '%-10s %-8s %4d s' $$stage $$result $$seconds)\n"; \
	done; \
	printf "\nSlowest tests\n"; $(PYTHON) .ci/slowest.py build/logs/*.xml; \
	printf "\n$$summary"; printf '%-19s %4d s\n' total $$(($$(date +%s) - begin)); \
	echo "stages: $$passed passed, $$failed failed"; [ $$failed = 0 ]

install: .venv/test

# The checks of a change since the commit BASE: format of the changed files, types, an incremental
# build of the package, the essential Python tests with the machine's own instruction set, and the C
# and C++ tests of the C interface.
BASE ?= HEAD
changed = $(shell { git diff --name-only --diff-filter=d $(BASE); git ls-files --others --exclude-standard; } | sort -u)
quick_tests := rules api errors methods decode backward decay cli
quick: system
	@begin=$$(date +%s); \
	step() { start=$$(date +%s); name=$$1; shift; "$$@" || { echo "== $$name: FAILED"; exit 1; }; \
	  echo "== $$name: passed in $$(($$(date +%s) - start)) s"; }; \
	python_files='$(filter %.py,$(changed))'; c_files='$(filter %.c %.h %.cpp %.hpp %.cu %.cuh,$(changed))'; \
	[ -z "$$python_files" ] || step "ruff check" ruff check $$python_files; \
	[ -z "$$python_files" ] || step "ruff format" ruff format --check $$python_files; \
	[ -z "$$c_files" ] || step clang-format clang-format --dry-run -Werror $$c_files; \
	step "package" $(MAKE) --no-print-directory .venv/test; \
	step mypy mypy; build=$$(ls -d build/cp* | head -n 1); \
	step "C and C++ tests: build" cmake --build "$$build" -j $(JOBS) --target api_test check_test hpp_test; \
	step "C and C++ tests" ctest --test-dir "$$build" -j $(JOBS) --output-on-failure -R '^(api|check|hpp)$$'; \
	step pytest python -m pytest -q -x $(quick_tests:%=tests/test_%.py); \
	step "accuracy" python -m pytest -q -x tests/test_accuracy.py -k 'not 8192 and (lengths or dims or decays_mixed)'; \
	echo "quick: passed in $$(($$(date +%s) - begin)) s. Left out:"; \
	echo "  format and lint of files that have not changed since $(BASE)"; \
	echo "  the other files of tests/: array libraries, torch, transformers, fla, files, processes, bench, examples, properties"; \
	echo "  sequences of 8192 tokens and instruction sets other than this machine's"; \
	echo "  the C++ tests of methods, gradients, threads, costs and random arguments (make ctest)"; \
	echo "  CUDA: the emulator (make ctest) and the build by nvcc (make cuda)"; \
	echo "  the sanitizers (make sanitize), the oldest and newest libraries (make versions)"

lint: .venv/test
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(c_files)
	mypy

# Each core has a process of its own, since most tests use one thread.
pytest: .venv/test
	python -m pytest -q -n $(JOBS) --dist worksteal --junitxml=build/logs/pytest.xml

# Runs the tests of array libraries with the oldest and with the newest versions that leetcore
# supports; .venv has versions in between. Each set of versions has a virtual environment of 6 GB
# and uses the leetcore of .venv. In CI the environment is removed after its tests.
oldest := torch==2.6.0 numpy==1.24.4 ml_dtypes==0.4.0 jax==0.4.30 jaxlib==0.4.30
newest := torch==2.14.1 numpy ml_dtypes jax
version_sets := build/versions/oldest/installed build/versions/newest/installed
version_tests := tests/test_torch_ops.py tests/test_torch_nn.py tests/test_arrays.py tests/test_decay.py

versions: versions-oldest versions-newest

versions-oldest versions-newest: versions-%: build/versions/%/installed .venv/test
	ln -sfn "$$(python -c 'import leetcore, os; print(os.path.dirname(leetcore.__file__))')" build/versions/leetcore
	PYTHONPATH=$(CURDIR)/build/versions build/versions/$*/bin/python -m pytest -q --junitxml=build/logs/$@.xml $(version_tests)
	$(if $(CI),rm -rf build/versions/$*)

build/versions/%/installed: Makefile | .venv/bin/python
	python -m venv --clear build/versions/$*
	build/versions/$*/bin/$(pip) pytest $($*)
	@touch $@

# Builds the library with the CUDA methods for two architectures and runs the tests of it that need
# no GPU.
ctest = mkdir -p build/logs && ctest --test-dir build/$(1) -j $(JOBS) --output-on-failure --output-junit $(CURDIR)/build/logs/$@.xml
cuda: build/ctest/build.ninja
	cmake --build build/ctest -j $(JOBS) --target cuda_tests
	$(call ctest,ctest) -L cuda

ctest: build/ctest/build.ninja
	cmake --build build/ctest -j $(JOBS)
	$(call ctest,ctest) -LE 'slow|cuda'

# The C and C++ tests with the address and undefined-behaviour sanitizers. The library has the
# generic instruction set and the best one of this machine.
without_isa := $(if $(shell grep -m 1 -o avx512vl /proc/cpuinfo 2>/dev/null),avx2,avx512)
sanitize: build/sanitize/build.ninja
	cmake --build build/sanitize -j $(JOBS)
	$(call ctest,sanitize) -LE slow

# Architecture 80 has code and PTX, because a kernel's launch bounds can be read in PTX.
build/ctest/build.ninja: .venv/nvcc | system .venv/test
	cmake -S . -B build/ctest -G Ninja -D LEETCORE_TESTS=ON -D LEETCORE_TESTS_PYTHON=ON -D LEETCORE_CUDA=ON \
	  -D CMAKE_CUDA_ARCHITECTURES='80;90a-real' -D Python_EXECUTABLE=$(CURDIR)/.venv/bin/python $$(cat .venv/nvcc)

build/sanitize/build.ninja: | system
	cmake -S . -B build/sanitize -G Ninja -D LEETCORE_TESTS=ON -D LEETCORE_SANITIZE=ON -D LEETCORE_CUDA=OFF \
	  -D LEETCORE_WITHOUT_ISA=$(without_isa)

# nvcc comes from an installed toolkit or else from PyPI. The file holds the CMake options for it.
.venv/nvcc: .venv/bin/python
	@if command -v nvcc >/dev/null; then : >$@; else \
	  $(pip) 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*' && echo -D LEETCORE_CUDA_FROM_PYPI=ON >$@; fi

train: .venv/bench
	python examples/train_lm.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

generate: .venv/bench
	python examples/generate.py $(ARGS)

bench: .venv/bench
	python bench/run.py $(ARGS)

# The GPU stages use the machine's own Python, whose torch is the one for its GPU.
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
docs: .venv/test
	python docs/api.py

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/build: .venv/bin/python
	$(pip) $(build_tools)
	@touch $@

.venv/package: .venv/build $(sources)
	$(install) .
	@touch $@

# Dependencies are resolved again only when pyproject.toml has changed. The C and C++ tests are
# configured in the build of the package, so that `make quick` links them with its objects, and
# warnings are errors, as in the other builds.
.venv/test: export CMAKE_ARGS := $(CMAKE_ARGS) -DLEETCORE_TESTS=ON -DLEETCORE_WERROR=ON
.venv/test: | system
.venv/test .venv/bench: .venv/%: .venv/build $(sources)
	$(install) $(if $(filter pyproject.toml .venv/build,$?),'.[$*]',--no-deps .)
	@touch .venv/package $@

# Tools that PyPI does not have come from Debian. Root installs the missing packages; other users
# read their names. ccache is optional.
system:
	@missing=; have() { command -v $$1 >/dev/null; }; \
	have g++ || missing="$$missing g++"; \
	have cmake || missing="$$missing cmake"; \
	have ninja || missing="$$missing ninja-build"; \
	have pkg-config || missing="$$missing pkg-config"; \
	[ -e /usr/include/gtest/gtest.h ] || missing="$$missing libgtest-dev"; \
	$(if $(filter cbench,$(MAKECMDGOALS)),[ -e /usr/include/benchmark/benchmark.h ] || missing="$$missing libbenchmark-dev";) \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	get="apt-get install --yes --quiet --no-install-recommends"; \
	if ! have ccache && [ $$(id -u) = 0 ] && have apt-get && [ ! -e build/no-ccache ]; then \
	  $$get ccache || { apt-get update --quiet && $$get ccache; } || \
	    { echo "Builds will do without ccache."; mkdir -p build; touch build/no-ccache; }; fi; \
	[ -n "$$missing" ] || exit 0; \
	if [ $$(id -u) != 0 ]; then echo "These Debian packages are missing:$$missing" >&2; exit 1; fi; \
	$$get $$missing || { apt-get update --quiet && $$get $$missing; }

.PHONY: run test quick $(STAGES) versions-oldest versions-newest train generate bench gpu cbench docs format clean system
