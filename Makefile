# SPDX-License-Identifier: Apache-2.0
# Targets for tools/setup, tools/test and other scripts, in which the steps are explained.

PREFIX ?= /opt/cwndtrace
BINDIR ?= /usr/local/bin
# PYTHON is the Python to use (default: the distribution's). PACKAGES=no installs no distribution packages.
PYTHON ?=
PACKAGES ?= yes

SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
# env passes the values on, because sudo removes most variables. They are exported and quoted, so that the shell doesn't
# interpret any character in them.
install uninstall demo: export PREFIX := $(PREFIX)
install uninstall demo: export BINDIR := $(BINDIR)
# All targets export these two, so they have other names: a program that a target starts may use PYTHON differently.
export SETUP_PYTHON := $(PYTHON)
export SETUP_PACKAGES := $(PACKAGES)
SETUP := env PREFIX="$$PREFIX" BINDIR="$$BINDIR" PYTHON="$$SETUP_PYTHON" PACKAGES="$$SETUP_PACKAGES" tools/setup

.DEFAULT_GOAL := help
.PHONY: help install uninstall demo develop lint audit fuzz fuzz-guided mutants bench test test-slow soak test-distributions test-users kernels-test vm-test vm-test-all vm-soak vm-shell \
	vagrant-test

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' Makefile

install: ## install into PREFIX (/opt/cwndtrace), and `cwndtrace` on root's PATH; runs this checkout's code as root
	@$(SETUP) install

uninstall: ## remove the installation; the distribution's packages stay
	@$(SETUP) uninstall

# -I makes Python import the installed package, and not the one in this folder.
demo: ## install, trace a connection that is idle while a disk is read, then measure what the resets cost
	@$(SUDO) $(SETUP) install demo
	@$(SUDO) "$$PREFIX/bin/python" -I -m cwndtrace.lab.demo
	@$(SUDO) "$$PREFIX/bin/cwndtrace" reproduce --preset quick

develop: ## install development packages, and .venv with this checkout in it
	@$(SETUP) develop

lint: develop ## run ruff, mypy and shellcheck, and validate the Vagrantfile
	@$(SETUP) packages lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	tools/lint

audit: develop ## ask the package index for known vulnerabilities of the packages in .venv
	@tools/audit

fuzz: develop ## run the property tests on many examples, and read 20,000 mutated capture files; about 20 minutes
	@CWNDTRACE_EXAMPLES=$${CWNDTRACE_EXAMPLES:-1000} .venv/bin/python -m pytest -q -n 2 -m hypothesis --timeout 3600 tests/unit
	@.venv/bin/python -m tests.fuzz

fuzz-guided: develop ## the same with atheris, guided by code coverage; ten minutes; needs x86-64
	@.venv/bin/python -m pip install --quiet --no-input --editable '.[fuzz]'
	@.venv/bin/python -m tests.fuzz_guided

# Mutants of each package to try (default: all, which takes more than a day), and the packages (default: all).
MUTANTS_SAMPLE ?= 0
MUTANTS_ONLY ?=

mutants: export CWNDTRACE_MUTANTS_SAMPLE := $(MUTANTS_SAMPLE)
mutants: export CWNDTRACE_MUTANTS_ONLY := $(MUTANTS_ONLY)
mutants: develop ## put mistakes into the modules one at a time, and see whether unit tests notice (MUTANTS_SAMPLE=40 MUTANTS_ONLY=store)
	@.venv/bin/python -m tests.mutants --sample "$$CWNDTRACE_MUTANTS_SAMPLE" --only $$CWNDTRACE_MUTANTS_ONLY

test: develop ## run the quick unit tests, and as root the live tests too
	@tools/test

test-slow: develop ## run the slow unit tests, and the property tests on 50 examples
	@tools/test slow

# The length of the longest soak test, in seconds.
SOAK ?= 600

soak: export CWNDTRACE_SOAK_SECONDS := $(SOAK)
soak: develop ## as root: test kills, floods, churn and long runs at full length (SOAK=600 seconds for the longest)
	@tools/test soak

test-distributions: develop ## as root: test the project in minimal root file systems of Debian 12 and 13
	@$(SETUP) packages distributions
	@tools/test distributions

test-users: develop ## as root: the same for make test as an ordinary user
	@$(SETUP) packages distributions
	@tools/test users

kernels-test: develop ## as root: boot Debian's stock kernels, 5.10 to the newest and arm64, check them, update docs/kernels.md
	@$(SETUP) packages kernels
	@.venv/bin/python tools/kernels btf
	@.venv/bin/python tools/kernels test

vm-test: develop ## build Linux 6.12 with and without the patches, boot both in software emulation, test in them
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm test
	@.venv/bin/python -m pytest -q -m vm tests/vm/test_tool.py tests/vm/test_build.py

vm-test-all: develop ## the same for each kernel line that kernel-patches/ serves and Debian has: 6.1, 7.2 and 7.3 too
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm test all

bench: develop ## run every benchmark, about 27 minutes; results go to benchmarks/results
	@$(SUDO) $(SETUP) packages bench
	@for name in starting block_io flood starved tcp following reading fleet workloads top always_on growth; do $(SUDO) .venv/bin/python -m benchmarks.$$name || exit 1; done

vm-soak: develop ## run half an hour of mixed load in a virtual machine
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm soak

vm-shell: develop ## open a shell in a virtual machine with the patched kernel
	@$(SETUP) packages vm
	@.venv/bin/python tools/vm shell

vagrant-test: develop ## as root: test the Vagrant VM from box to destroy, in software emulation; logs the time of each step
	@$(SETUP) packages vagrant
	@.venv/bin/python -m pytest -q -m vm tests/vm/test_vagrant_tool.py
	@.venv/bin/python tools/vagrant
