PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lint test torture bench docs docs-serve wheel wheel-cuda clean

demo: .venv/installed            ## train a small RWKV-8 on real text and generate from it
	$(BIN)/heron demo

lint: .venv/installed-dev        ## ruff over all files, their format too, pyright over heron/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint                       ## the whole suite
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --dist worksteal

torture: .venv/installed-dev     ## the tests that take long; the promises under attack at full count, and the table of docs/reliability.md
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m tests.torture --write

bench: .venv/installed-dev       ## the figures that README and docs quote
	$(BIN)/python benchmarks/wkv7_cpu.py
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/rosa_op.py
	$(BIN)/python benchmarks/rosa_learning.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/serve.py

docs: .venv/installed-docs       ## the documentation's pages into site/; a broken link or docstring fails
	$(BIN)/mkdocs build --strict

docs-serve: .venv/installed-docs ## the same on http://127.0.0.1:8000, built anew when a file changes
	$(BIN)/mkdocs serve --strict

wheel: .venv/bin/python          ## dist/*.tar.gz and *.whl; the wheel is complete, and trains in an environment of its own
	rm -rf dist .venv-wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build
	$(BIN)/python .github/check_wheel.py dist/*.whl
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd .venv-wheel && bin/heron doctor
	cd .venv-wheel && bin/heron train --max_steps 2 --ctx_len 32 --micro_bsz 1 --sample_tokens 8 --out runs/wheel
	cd .venv-wheel && bin/heron generate runs/wheel --prompt "def " --max_tokens 8

wheel-cuda: .venv/installed      ## dist/cuda/*.whl for this platform, with built CUDA kernels in it; needs nvcc, no GPU
	rm -rf heron/ops/_built build dist/cuda
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python .github/build_kernels.py
	$(BIN)/python -m build --wheel --outdir dist/cuda -C--build-option=--plat-name=$$($(BIN)/python -c \
		'import sysconfig; print(sysconfig.get_platform())')
	rm -rf heron/ops/_built build

clean:                           ## remove what the other targets made, and the runs
	rm -rf .venv .venv-wheel runs dist site heron/ops/_built

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/installed

.venv/installed-docs: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
