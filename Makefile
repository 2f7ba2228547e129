PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test torture bench clean

demo: .venv/installed            ## train a small RWKV-8 on real text and generate from it
	$(BIN)/heron demo

test: .venv/installed-dev        ## the whole suite
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

torture: .venv/installed-dev     ## the promises under attack at full count, and the table of docs/reliability.md
	$(BIN)/python -m tests.torture --write

bench: .venv/installed-dev       ## the figures that README and docs quote
	$(BIN)/python benchmarks/wkv7_cpu.py
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/rosa_op.py
	$(BIN)/python benchmarks/rosa_learning.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/generate.py

clean:                           ## remove the virtual environment and the runs
	rm -rf .venv runs

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/installed
