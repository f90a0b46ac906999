# vlarl-bench. Every target sets up what it needs first: .venv with pinned packages, and the GL libraries.
# Another interpreter: make setup PYTHON=/path/to/python3.11
VENV := .venv
BIN := $(VENV)/bin
# Written last, so an interrupted set-up leaves none and the next `make` starts it again.
STAMP := $(VENV)/.setup-done

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo reproduce report test torture lint type bench bench-sim bench-policies bench-updates clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned packages (the other targets do it when needed)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@rm -f $@
	@PYTHON='$(PYTHON)' sh scripts/setup.sh
	@touch $@

demo: $(STAMP) ## fine-tune a flow policy with FPO on LIBERO and show what it gained
	$(BIN)/vlarl-bench run --algo fpo --suite libero

reproduce: $(STAMP) ## run a published run again: make reproduce CELL='results/main/fpo-pi0_tiny-*'
	@[ -n "$(CELL)" ] || { echo 'make: CELL: missing; name a run folder, or a run of a pack as PACK/NAME' >&2; exit 2; }
	$(BIN)/vlarl-bench reproduce '$(CELL)'

report: $(STAMP) ## tables, figures and page of the published runs, and what README.md and docs/ show of them
	$(BIN)/python scripts/report.py

# In the order that tests/conftest.py gives: else the files with the most tests come first, and SLURM's few, which wait for
# minutes, run last and alone. Four processes for two cores, since much of what they do is to wait, for SLURM and for
# other processes.
test: $(STAMP) ## run the tests in four processes (benchmarks run once, untimed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --benchmark-disable -n 4 --dist loadfile --no-loadscope-reorder --durations 30

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy
	$(BIN)/mypy

torture: $(STAMP) ## kill, fill, flip and unplug everything as often as promised; writes docs/torture.md
	$(BIN)/python scripts/torture.py

bench: $(STAMP) ## speed of the parts that decide how long a run takes
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only

bench-sim: $(STAMP) ## speed of LIBERO and ALOHA against the stock environments and raw MuJoCo
	$(BIN)/python -m pytest tests/benchmarks/test_libero_speed.py tests/benchmarks/test_aloha_speed.py --benchmark-only --benchmark-columns=min,median,rounds

bench-policies: $(STAMP) ## speed of the policies, and of pi0 against transformers' own sampler
	$(BIN)/python -m pytest tests/benchmarks/test_policy_speed.py --benchmark-only --benchmark-columns=min,median,rounds -s

bench-updates: $(STAMP) ## cost of each method's update, of FPO's draws with and without a shared prefix; DPPO=CHECKOUT: DPPO's against its public implementation's
	$(BIN)/python -m pytest tests/benchmarks/test_update_speed.py --benchmark-only --benchmark-columns=min,rounds -s
	$(if $(DPPO),PYTHONPATH=. $(BIN)/python scripts/bench_dppo.py '$(DPPO)' --epochs 5,@echo 'skipped: DPPO against its public implementation; to have it, clone irom-princeton/dppo and run make bench-updates DPPO=CHECKOUT')

clean: ## remove .venv and caches (runs, demonstrations and results stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
