# Everything a developer or a newcomer types. Each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODELS := .demo/models
TOOLCHAIN := .demo/toolchain
BENCH_MODELS := .demo/bench-models
PEERS := .demo/peers

.PHONY: demo test test-package coverage check format bench bench-agent bench-delta deb fuzz clean
demo: $(STAMP) $(MODELS)/.fetched
	$(BIN)/ferry demo --models $(MODELS)

test: $(STAMP) $(MODELS)/.fetched
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not package"

# The Debian package from its build to its purge, on a machine that is made for it: as root, with debootstrap and
# systemd-container. Apart from `make test`, because making that machine takes minutes.
test-package: $(STAMP) $(MODELS)/.fetched
	$(BIN)/python -m pytest -n 0 -q -m package

# Apart from `make test`, because counting lines makes the simulations take nearly three times as long.
coverage: $(STAMP) $(MODELS)/.fetched
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not package" --cov --cov-report=term:skip-covered

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/python -m tests.docs_check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(addprefix bench-,$(patsubst benchmarks/bench_%.py,%,$(wildcard benchmarks/bench_*.py)))
bench-%: $(STAMP) $(MODELS)/.fetched
	$(BIN)/python -m benchmarks.bench_$*

# Patches are compared with other tools, on models that are really trained (torch: large, so not in $(VENV)). xdelta3 and
# zstd are the system's; what is missing is left out.
bench-delta: $(STAMP) $(MODELS)/.fetched $(TOOLCHAIN)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m benchmarks.bench_delta

# Serving is compared with other servers, each in an environment of its own, because what they need does not fit together;
# one that cannot be installed is left out. The load is wrk's: the system's.
bench-agent: $(STAMP) $(MODELS)/.fetched $(BENCH_MODELS)/.fetched $(PEERS)/.tried
	$(BIN)/python -m benchmarks.bench_agent

$(PEERS)/.tried:
	mkdir -p $(PEERS)
	for peer in "fastapi uvicorn[standard]" litserve bentoml mlserver; do \
	  folder=$(PEERS)/$${peer%% *}; \
	  $(PYTHON) -m venv $$folder || exit 1; \
	  $$folder/bin/python -m pip install --quiet --disable-pip-version-check $$peer onnxruntime==1.31.1 \
	    && touch $$folder/.installed || echo "$$folder cannot be installed and is left out" >&2; \
	done
	touch $@

# Small and middle-sized real models: voice activity (MIT), text detection and direction (Apache-2.0).
$(BENCH_MODELS)/.fetched: | $(VENV)/bin/python
	mkdir -p $(BENCH_MODELS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(BENCH_MODELS) \
	  silero-vad==6.2.3 rapidocr-onnxruntime==1.4.4
	for wheel in $(BENCH_MODELS)/*.whl; do \
	  $(BIN)/python -m zipfile -e $$wheel $(BENCH_MODELS)/$$(basename $$wheel | cut -d- -f1) || exit 1; \
	done
	touch $@

$(TOOLCHAIN)/.installed:
	$(PYTHON) -m venv $(TOOLCHAIN)
	$(TOOLCHAIN)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(TOOLCHAIN)/bin/python -m pip install --quiet --disable-pip-version-check zipnn==0.5.4
	touch $@

# The agent as a Debian package, in dist/: for the release of Debian that has this Python. ARCH=arm64 for another machine.
deb: $(STAMP)
	$(BIN)/python deploy/debian/build.py $(if $(ARCH),--arch $(ARCH))

# Half an hour by default; FUZZ_S=SECONDS or FUZZ_RUNS=RUNS (of each target, always the same ones) for another length.
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[fuzz]"
	$(BIN)/python -m tests.fuzz

clean:
	rm -rf $(VENV) .demo .fuzz dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# The demo's two real models: two releases of the content-type model that PyPI's `magika` carries (Apache-2.0).
$(MODELS)/.fetched: | $(VENV)/bin/python
	mkdir -p $(MODELS)
	for version in 0.6.1 0.6.3; do \
	  $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(MODELS) magika==$$version || exit 1; \
	done
	for wheel in $(MODELS)/magika-*.whl; do \
	  $(BIN)/python -m zipfile -e $$wheel $(MODELS)/$$(basename $$wheel | cut -d- -f1,2) || exit 1; \
	done
	touch $@
