# make demo   a talking video out of the bundled portrait and speech, on any machine with Python 3.11
# make test   the tests
PYTHON ?= python3
BIN := .venv/bin
# Pins of everything that the pinned packages bring along.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench test-comfyui chromium clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/infinitetalk render --image examples/portrait.png --audio examples/speech.wav --gpus 2 --width 512 --height 512 -o out/demo.mp4

# For the test that plays a video in a browser; where it can't be installed, that test says that it is skipped.
chromium:
	@command -v chromium >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else false; fi || echo "no chromium: the test in a browser is skipped"

test: .venv/installed chromium
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/python -m bench.scaling

# A real ComfyUI on the CPU with tiny random weights: make test-comfyui COMFYUI_DIR=... [COMFYUI_PYTHON=...]
test-comfyui: .venv/installed
	COMFYUI_DIR="$(COMFYUI_DIR)" COMFYUI_PYTHON="$(COMFYUI_PYTHON)" $(BIN)/pytest -m comfyui tests

clean:
	rm -rf .venv out build *.egg-info
