# Everything on a machine that has only Python (3.11 or newer) and make.
#   make quickstart   install, prepare the embedded data, train, evaluate, write pictures
#   make test         install with the test tools, run the tests
#   make test-fast    those that need neither processes nor minutes
#   make lint         format, lint and type checks
PYTHON ?= python3
RUN ?= runs/quickstart

.PHONY: quickstart test test-fast lint clean

quickstart: .venv/installed
	.venv/bin/python main.py --config=configs/quickstart.py --workdir=$(RUN)
	.venv/bin/python main.py --mode=eval --workdir=$(RUN) --checkpoint=best
	.venv/bin/python main.py --mode=predict --workdir=$(RUN) --checkpoint=best \
		--input=contrastseg_jax/data/builders/landcover_data/images/val --output=$(RUN)/predictions
	@echo "Look at $(RUN)/curves.png, $(RUN)/eval/*/index.html and $(RUN)/predictions/overlays"

test: .venv/installed-dev
	.venv/bin/python -m pytest -q

test-fast: .venv/installed-dev
	.venv/bin/python -m pytest -q -m "not slow and not multiprocess and not torch"

lint: .venv/installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/basedpyright

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt pyproject.toml | .venv/bin/python
	.venv/bin/pip install -q -e .
	@touch $@

.venv/installed-dev: requirements.txt pyproject.toml | .venv/bin/python
	.venv/bin/pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .cache *.egg-info
