# SPDX-License-Identifier: Apache-2.0
# Names for what tools/setup and tools/test do; they hold the how and the why.

PREFIX ?= /opt/cwndtrace
BINDIR ?= /usr/local/bin
# A Python of your own, and "no" to leave the distribution's packages alone.
PYTHON ?=
PACKAGES ?= yes

SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
# By env, because sudo drops what it isn't told to keep. As variables, so that no character in them is the shell's.
install uninstall demo: export PREFIX := $(PREFIX)
install uninstall demo: export BINDIR := $(BINDIR)
# Under names of this Makefile's own, because every goal has them, and what it starts may mean something else by PYTHON.
export SETUP_PYTHON := $(PYTHON)
export SETUP_PACKAGES := $(PACKAGES)
SETUP := env PREFIX="$$PREFIX" BINDIR="$$BINDIR" PYTHON="$$SETUP_PYTHON" PACKAGES="$$SETUP_PACKAGES" tools/setup

.DEFAULT_GOAL := help
.PHONY: help install uninstall demo develop lint audit fuzz fuzz-guided bench test soak test-distributions test-users vm-test vm-soak vm-shell \
	vagrant-test

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' Makefile

install: ## install into PREFIX (/opt/cwndtrace), and `cwndtrace` on root's PATH; runs this checkout's code as root
	@$(SETUP) install

uninstall: ## take that away again; the distribution's packages stay
	@$(SETUP) uninstall

# -I: the installed package, not the one in this folder.
demo: ## install, trace a connection with idle times while a disk is read, then measure what the resets cost
	@$(SUDO) $(SETUP) install demo
	@$(SUDO) "$$PREFIX/bin/python" -I -m cwndtrace.lab.demo
	@$(SUDO) "$$PREFIX/bin/cwndtrace" reproduce --preset quick

develop: ## development packages, and .venv with this checkout in it
	@$(SETUP) develop

lint: develop ## ruff, mypy, shellcheck, and whether the Vagrantfile holds
	@$(SETUP) packages lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	tools/lint

audit: develop ## ask the package index whether what is in .venv has known vulnerabilities
	@tools/audit

fuzz: develop ## read 20,000 mutated files of captures, about a quarter of an hour
	@.venv/bin/python -m tests.fuzz

fuzz-guided: develop ## the same by atheris, led by what code is reached, ten minutes; needs x86-64
	@.venv/bin/python -m pip install --quiet --no-input --editable '.[fuzz]'
	@.venv/bin/python -m tests.fuzz_guided

test: develop ## unit tests, and as root the live tests too
	@tools/test

# How long the longest one runs, in seconds.
SOAK ?= 600

soak: export CWNDTRACE_SOAK_SECONDS := $(SOAK)
soak: develop ## as root: kills, floods, churn and long runs at full length (SOAK=600 seconds for the longest)
	@tools/test soak

test-distributions: develop ## as root: the project in bare Debian 12 and 13 roots
	@$(SETUP) packages distributions
	@tools/test distributions

test-users: develop ## as root: make test by a user without root in bare Debian 12 and 13 roots
	@$(SETUP) packages distributions
	@tools/test users

vm-test: develop ## build kernels with and without the patches, boot each by software emulation, test in them
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm test
	@.venv/bin/python -m pytest -q -m vm tests/vm/test_tool.py tests/vm/test_build.py

bench: develop ## every benchmark, about twenty minutes; results in benchmarks/results
	@$(SUDO) $(SETUP) packages bench
	@for name in starting block_io flood tcp reading; do $(SUDO) .venv/bin/python -m benchmarks.$$name || exit 1; done

vm-soak: develop ## half an hour of mixed load in a virtual machine
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm soak

vm-shell: develop ## a shell in a virtual machine with the patched kernel
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm shell

vagrant-test: develop ## as root: the Vagrant VM from box to destroy, by software emulation; its log has a time per step
	@$(SETUP) packages vagrant
	@.venv/bin/python -m pytest -q -m vm tests/vm/test_vagrant_tool.py
	@.venv/bin/python tools/vagrant
