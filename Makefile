# make demo   install, time layers as wide as DiT-XL/2's, run the default sweep on small-dit-outliers, write the page
# make test   install, run the tests (all but tests/cluster: whole sweeps by joblib, SLURM and Ray, see .ci/run)
# make check  lint, format, types
# make mutants  small mistakes in what decides a number: do the tests see them? (an hour and more)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Which torch: `make TORCH='torch==2.12.*' …` takes that one. Left to itself (auto), a machine without an NVIDIA GPU gets a CPU build
# instead of gigabytes of CUDA, if pip sees one as it is configured or at PyTorch's own index. Otherwise pip chooses.
TORCH ?= auto
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
newest_cpu_build = $(PIP) index versions torch $(1) 2>/dev/null | tr -s ' ,' '\n' | sed -n '/+cpu$$/{s/^/torch==/p;q}'

.PHONY: demo test check mutants install install-test format clean

# Its sweep prints the table; of the report only the last line is shown, which is the page's path.
demo: install
	@echo 'How fast: two of the 28 blocks of DiT-XL/2 in their true width (random weights)'
	$(BIN)/ditbench bench model=dit-xl-2-256-random model.random.num_layers=2 results_dir=outputs --formats w8a8 w4a8 --modes eager --batches 2
	@echo 'How good: a small model that draws digits'
	$(BIN)/ditbench run experiment=demo
	@$(BIN)/ditbench report --experiment demo --format html > $(VENV)/report.txt && tail -n 1 $(VENV)/report.txt

test: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore tests/cluster

check: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: install-test
	OMP_NUM_THREADS=1 $(BIN)/python bench/mutants.py

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A constraint on torch for pip, or nothing; nothing as well where torch is installed already.
$(VENV)/torch.txt: pyproject.toml | $(BIN)/python
	@echo '$(filter-out auto,$(TORCH))' > $@.part
	@if [ '$(TORCH)' = auto ] && ! nvidia-smi >/dev/null 2>&1 && ! $(PIP) show torch >/dev/null 2>&1; then \
	  $(call newest_cpu_build,) > $@.part; \
	  if [ ! -s $@.part ]; then \
	    $(call newest_cpu_build,--index-url $(CPU_INDEX) --retries 0 --timeout 5) > $@.part; \
	    [ ! -s $@.part ] || $(PIP) install -q --index-url $(CPU_INDEX) -c $@.part torch torchvision || : > $@.part; \
	  fi; \
	fi
	@mv $@.part $@

$(VENV)/.installed: pyproject.toml $(VENV)/torch.txt
	$(PIP) install -q -c $(VENV)/torch.txt -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/torch.txt
	$(PIP) install -q -c $(VENV)/torch.txt -e ".[test]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
