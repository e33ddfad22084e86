# make demo   a talking video out of the bundled portrait and speech, on any machine with Python 3.11
# make test   the tests
PYTHON ?= python3
BIN := .venv/bin
# Processes that share the test files: most tests wait.  `pytest tests/test_x.py` alone needs none.
WORKERS ?= 3
# Pins of everything that the pinned packages bring along.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench test-comfyui test-long programs clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

# What only tests and measurements need; clients of the service among it.
.venv/dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/infinitetalk render --image examples/portrait.png --audio examples/speech.wav --gpus 2 --width 512 --height 512 -o out/demo.mp4

# For the tests that use a browser, a PostgreSQL server, or Redis for Ray's state; where they can't be installed,
# those tests say that they are skipped.
programs:
	@ls /usr/bin/chromium /usr/lib/postgresql/*/bin/initdb /usr/bin/redis-server >/dev/null 2>&1 \
	|| if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium postgresql redis-server iproute2 >/dev/null; \
	else false; fi || echo "no chromium, PostgreSQL or Redis: tests that need them are skipped"

test: .venv/dev programs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

bench: .venv/dev
	$(BIN)/python -m bench.scaling

# A real ComfyUI on the CPU with tiny random weights: make test-comfyui COMFYUI_DIR=... [COMFYUI_PYTHON=...]
test-comfyui: .venv/dev
	COMFYUI_DIR="$(COMFYUI_DIR)" COMFYUI_PYTHON="$(COMFYUI_PYTHON)" $(BIN)/pytest -m comfyui tests

# Kills, crashes and clusters, many minutes together.  Some need Debian's redis-server, or root (a network cut in two).
test-long: .venv/dev programs
	TEST_LONG=1 $(BIN)/pytest -m long tests

clean:
	rm -rf .venv out build *.egg-info
