# Each target sets itself up: the first one makes .venv and installs requirements.txt, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo --data petals

.PHONY: demo test test-all faults docs wheel-check lint clean

# Without a GPU two processes of one thread each are faster than one of two threads: these layers are small.
PROCESSES := $(shell nvidia-smi > /dev/null 2>&1 && echo 1 || echo 2)

demo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(PROCESSES) train/pretrain.py demo --overwrite
	for init in "--init pixels" "--init random" ""; do $(BIN)/python eval/knn.py $(DEMO) $$init > /dev/null || exit 1; done
	for init in "--init random" ""; do $(BIN)/python eval/linear.py $(DEMO) $$init > /dev/null || exit 1; done
	$(BIN)/python eval/table.py runs/demo
	$(BIN)/python eval/report.py runs/demo

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

faults: $(VENV)/installed
	$(BIN)/python tests/faults.py

# The API reference, a static site in site/; a test checks its links.
docs: $(VENV)/installed
	$(BIN)/python -W ignore -m pdoc scott_sparse scott_sparse.model.masks scott_sparse.model.stages scott_sparse.model.engines --output-directory site

# Downloads torch into an empty environment: gigabytes.
wheel-check: $(VENV)/installed
	$(BIN)/python tests/wheel.py

lint: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs site

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@
