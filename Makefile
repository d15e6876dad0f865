# SPDX-License-Identifier: GPL-2.0-or-later
# Each target does its own set-up (tools/setup): Debian 12 or 13, root for packages and libvirtd.

PYTHON := .venv/bin/python
# More words for pytest (make test ARGS="-k drift") or for the demonstration.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench deb lab lab-test lab-smoke clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: ## build .venv with rtpind and rtpinctl in .venv/bin
	@tools/setup venv

demo: ## see rtpind work on throwaway guests, in about a minute (root)
	@tools/setup demo
	@$(PYTHON) -m demo.run $(ARGS)

test: ## all checks and tests; ARGS="-k word" passes words to pytest (live tests: root)
	@tools/setup test
	@$(MAKE) --no-print-directory lint
	$(if $(ARGS),$(PYTHON) -m pytest $(ARGS),@tools/test)

lint: ## ruff, mypy --strict and the import contracts
	@tools/setup venv
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy --strict
	.venv/bin/lint-imports --no-cache

bench: ## rtpind beside what people use today, in docs/benchmarks.md; ARGS=--full for hours of it (root)
	@tools/setup test
	$(PYTHON) -m bench.planning
	$(PYTHON) -m bench.run $(ARGS)

deb: ## build dist/rtpind_VERSION_all.deb (root for build packages)
	@tools/deb

lab: ## build the images of the lab that are missing (root; minutes)
	@tools/lab build

lab-test: ## boot whole realtime hosts and test the package on them; ARGS="-k word" (root; under half an hour)
	@tools/lab test $(ARGS)

lab-smoke: ## a few of these tests, on bookworm-rt (root; some minutes)
	@tools/lab smoke $(ARGS)

clean: ## remove .venv and everything else that was built
	rm -rf .venv .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
