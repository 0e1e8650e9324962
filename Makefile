# make test   everything that CI runs        make demo   a SANA transformer, before and after
# make fuzz SECONDS=600   new random programs, as long as one wants
# make test-matrix   the suite on the oldest, the pinned and the newest torch (long, not in CI)
# A virtual environment is made on the first call. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# CPU builds of torch where this index can be reached; else PyPI's, with gigabytes of CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MATRIX ?= 2.11.0 2.13.0 newest
# What torch itself brings on a GPU; triton 3.6's interpreter fails with numpy 2.4.
BESIDE_2.11.0 := triton==3.6.0 'numpy<2.4'
BESIDE_2.13.0 := triton==3.7.1
MATRIX_TESTS ?= tests

.PHONY: test fuzz test-matrix demo lint format clean

test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4

fuzz: $(INSTALLED)
	BLA_FUZZ_SECONDS=$(or $(SECONDS),600) $(BIN)/python -m pytest -q --timeout=0 tests/fuzz

test-matrix: $(MATRIX:%=matrix-%)

matrix-%:
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		--extra-index-url $(TORCH_INDEX) \
		$(if $(filter newest,$*),torch,torch==$*) $(BESIDE_$*) -e '.[test]'
	$(VENV)-$*/bin/python -m pytest -q -n auto --maxprocesses 4 $(MATRIX_TESTS)

demo: $(INSTALLED)
	$(BIN)/python examples/demo_sana.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt tests/models/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'bla needs Python 3.11 or later: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[test,models,demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps -r tests/models/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
