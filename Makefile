# The two commands a newcomer needs: `make demo` and `make test`.
# TORCH chooses the build: a CUDA machine or PyTorch's CPU index may want another one.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Test processes of one thread each: threads of two processes on two cores get in each other's way.
WORKERS ?= 2
RUN = $(VENV)/bin/python

.PHONY: demo test lint types tests clean

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet pydensecrf2 || echo "pydensecrf2 does not build here; its tests will be skipped"
	touch $@

demo: $(VENV)/.demo
	$(RUN) -m em_core demo --out output/demo --overwrite

test: $(VENV)/.dev lint types tests

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

tests: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile

clean:
	rm -rf $(VENV) output build *.egg-info
