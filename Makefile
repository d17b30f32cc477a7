# Two commands matter: `make demo` and `make test`. Both work on a fresh Debian machine.

PYTHON  ?= /usr/bin/python3
VENV    ?= .venv
BIN     := $(VENV)/bin
# Debian 12's own cargo is of 2022 and fetches its index with git; its cargo-web is a current one.
CARGO   := $(shell . /etc/os-release; [ "$$VERSION_ID" = 12 ] && echo cargo-web || echo cargo)
# What the product and the lab run on, what the tests compare it with or drive it by, and what people run in the box.
RUNTIME := curl gcc iproute2 iptables libnftables1 nftables procps python3-dev python3-venv util-linux
TESTS   := catatonit conntrack debootstrap dnsmasq-base docker.io dumb-init fish ipset iptables musl-tools netavark podman \
           slirp4netns strace tini uidmap zsh
TOOLS   := $(CARGO) default-jdk-headless git golang-go
REQUIRE ?=
INTERACTIVE ?=

.PHONY: help setup demo test test-vm soak lint bench docs clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: setup  ## show the product at work, about 15 s (INTERACTIVE=1 ends in a shell in the box)
	@INTERACTIVE=$(INTERACTIVE) $(BIN)/python -m tests.support.demo

test: setup lint $(VENV)/.tools  ## run everything; without root what can be run (REQUIRE=all turns a skip into a failure)
	@sh tests/support/packages.sh $(if $(REQUIRE),,--optional) $(TESTS) $(TOOLS)
	@$(BIN)/python -m tests.support.halves $(if $(REQUIRE),--require=$(REQUIRE))

test-vm: setup  ## boot Debian 12's and 13's kernels and run the kernel tests there, about 15 min (docs/portability.md)
	@sh tests/support/packages.sh cpio debootstrap kmod qemu-system-x86 zstd
	tests/vm/run

soak: setup  ## sessions, reloads, faults and kills for HOURS= or MINUTES=, SEED= (docs/soak.md)
	@$(BIN)/python -m tests.soak $(if $(HOURS),--hours $(HOURS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(SEED),--seed $(SEED)) $(if $(BACKEND),--backend $(BACKEND))

lint: setup  ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## measure beside peers in one run; docs/benchmarks.md says how to read it
	@sh tests/support/packages.sh $(TESTS) bind9-dnsutils
	$(BIN)/python -m bench

docs: setup $(VENV)/.tools  ## write the generated pages again, in a few minutes of a quiet machine
	@sh tests/support/packages.sh $(TESTS) $(TOOLS)
	$(BIN)/python -m tests.pid1.matrix > docs/init.md
	$(BIN)/python -m tests.support.fwctl_docs > docs/fwctl.md
	$(BIN)/python -m tests.support.transcript
	$(BIN)/python -m tests.support.tools_page

setup: $(VENV)/.stamp  ## install what is missing: Debian packages, .venv
	@sh tests/support/packages.sh $(RUNTIME)

$(VENV)/.tools: $(VENV)/.stamp
	@$(BIN)/pip install -qq --disable-pip-version-check --use-pep517 --editable '.[tools]'
	@touch $@

$(VENV)/.stamp: pyproject.toml
	@sh tests/support/packages.sh $(RUNTIME)
	@echo "setup: creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --use-pep517 --editable '.[test,lint]'
	@touch $@

clean:  ## remove what make made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
