# make demo: set up, train both stages on the embedded world, shortened, print the evaluations (7 minutes on two quiet cores)
# make test: set up, ruff, pytest in as many processes as there are cores
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup
demo: setup
	$(BIN)/python train_sft.py --steps 1500 --eval-every -1
	$(BIN)/python train_rl.py --world-clips 2400 --steps 30 --no-eval-before
	$(BIN)/python eval.py progress

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

setup: .venv/ready

# One thing that pip cannot bring is FFmpeg, whose libraries torchcodec decodes with; Debian splits venv off, too.
# The oldest and the newest transformers that are promised lie beside the pinned one, for tests/test_platforms.py.
.venv/ready: requirements.txt Makefile
	@if ! command -v ffmpeg >/dev/null || ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	  if ! command -v apt-get >/dev/null; then echo "FFmpeg or venv is missing. On macOS run: brew install ffmpeg"; exit 1; \
	  elif [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q ffmpeg python3-venv; \
	  elif sudo -n true 2>/dev/null; then sudo apt-get update -q && sudo apt-get install -y -q ffmpeg python3-venv; \
	  else echo "FFmpeg or venv is missing. Run: sudo apt-get install ffmpeg python3-venv"; exit 1; fi; fi
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	for version in 5.18.0 5.24.0; do \
	  $(BIN)/pip install -q --no-deps --upgrade --target .venv/transformers-$$version transformers==$$version || exit 1; done
	touch $@
