# Granary. `make run` and `make test` do all set-up by themselves; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# Compiled dependencies are shared by all clones of this user: RocksDB is built once.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/granary/target
# Its programs are copied into the clone: another clone's build does not change what runs here.
BIN := target/bin
PROGRAMS := granary granary-disk-node granary-bench
TOOLS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/granary/tools/bin
# s3s declares a newer compiler than it needs; --locked keeps every build the same.
# Always the whole workspace: with -p, Cargo would unify features anew and compile half of the dependencies twice.
CARGO_FLAGS := --release --locked --ignore-rust-version

FIRST_BUILD = $(if $(wildcard $(CARGO_TARGET_DIR)/release/build/librocksdb-sys-*),, (the first build on a machine compiles RocksDB: 10 to 20 minutes on two cores))

# make run DIR=/mnt/backup S3=0.0.0.0:9000
DIR ?= $(CURDIR)/.granary
S3 ?= 127.0.0.1:9000
ADMIN ?= 127.0.0.1:9001

# The target folder is shared: one clone at a time builds or tests.
LOCKED := tests/locked.sh

.PHONY: help setup setup-test setup-check build run test check soak bench clean-data

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install missing system packages
	@tests/setup.sh build

setup-test: ## install what the tests need: clients, strace, file system tools
	@tests/setup.sh test

setup-check: ## compile what `make check` needs, into the user's cache
	@tests/setup.sh check

build: setup ## build the programs and put them into target/bin
	@echo "==> building Granary$(FIRST_BUILD)"
	$(LOCKED) bash -c 'cargo build $(CARGO_FLAGS) --workspace --bins && mkdir -p $(BIN) \
	  && install -t $(BIN) $(PROGRAMS:%="$$CARGO_TARGET_DIR"/release/%)'

run: build ## start a cluster of eight disk nodes; options: DIR=.granary S3=127.0.0.1:9000 ADMIN=127.0.0.1:9001
	@exec $(BIN)/granary dev --dir "$(DIR)" --s3 "$(S3)" --admin "$(ADMIN)"

# make test ARGS='--test faults -- part_of_a_name' runs a part of it; still the whole workspace, see above.
ARGS ?=

test: setup-test ## the whole suite, with real clients and real faults; part of it: ARGS='--test s3 -- NAME'
	@echo "==> building Granary and its tests$(FIRST_BUILD)"
	$(LOCKED) cargo test $(CARGO_FLAGS) --workspace --no-run
	@echo "==> running the suite (about ten minutes)"
	$(LOCKED) tests/suite.sh $(CARGO_FLAGS) --workspace $(ARGS)

check: setup setup-check ## formatting, lints, unused dependencies, licences and sources of dependencies
	cargo fmt --all --check
	$(TOOLS)/cargo-machete
	$(TOOLS)/cargo-deny --locked --config .ci/deny.toml check licenses bans sources
	$(LOCKED) cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

soak: setup-test ## the long forms: hours, results go to docs/reliability.md
	$(LOCKED) cargo test $(CARGO_FLAGS) --workspace --no-run
	GRANARY_SOAK=1 $(LOCKED) tests/suite.sh $(CARGO_FLAGS) --workspace --test clients --test faults --test s3 -- --nocapture --test-threads 1

bench: build ## codec kernels, then PUT and GET against a fresh cluster
	$(BIN)/granary-bench codec
	$(BIN)/granary-bench floor
	$(BIN)/granary-bench load --embedded

clean-data: ## remove the data of `make run`; option: DIR=.granary
	@[ -e "$(DIR)" ] || { echo "There is nothing at $(DIR)."; exit 0; }; \
	dir=$$(realpath -e -- "$(DIR)") || exit 1; \
	[ -e "$$dir/dev.json" ] || { echo "$$dir holds no cluster of granary dev; it stays." >&2; exit 1; }; \
	exec 9<>"$$dir/lock" || exit 1; \
	flock -n 9 || { echo "$$dir is in use; stop granary dev first." >&2; exit 1; }; \
	read -r -p "Remove all data in $$dir? [y/N] " answer; \
	if [ "$$answer" = y ]; then rm -rf -- "$$dir"; else echo "It stays."; fi
