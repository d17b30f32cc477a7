# Two commands matter: `make demo` and `make test`. Both work on a fresh Debian machine.

PYTHON ?= /usr/bin/python3
VENV   ?= .venv
BIN    := $(VENV)/bin
APT    := curl gcc iproute2 ipset iptables nftables libnftables1 procps python3-dev python3-venv util-linux
REQUIRE ?=

.PHONY: help setup packages demo test lint bench docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

packages:
	@PYTHON=$(PYTHON) sh tests/support/packages.sh $(APT)

setup: packages $(VENV)/.stamp  ## Debian packages and .venv

$(VENV)/.stamp: pyproject.toml
	@echo "setup: creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --use-pep517 --editable '.[test,lint]'
	@touch $@

demo: setup  ## the product live, in a private internet (as root); INTERACTIVE=1 ends in a shell in the box
	@INTERACTIVE=$(INTERACTIVE) $(BIN)/python -m tests.support.demo

clean:  ## remove what make made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
