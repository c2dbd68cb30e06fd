# Granary. `make run` and `make test` do all set-up by themselves; `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# Compiled dependencies are shared by all clones of this user: RocksDB is built once.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/granary/target
BIN := $(CARGO_TARGET_DIR)/release
# s3s declares a newer compiler than it needs; --locked keeps every build the same.
# Always the whole workspace: with -p, Cargo would unify features anew and compile half of the dependencies twice.
CARGO_FLAGS := --release --locked --ignore-rust-version

# make run DIR=/mnt/backup S3=0.0.0.0:9000
DIR ?= $(CURDIR)/.granary
S3 ?= 127.0.0.1:9000
ADMIN ?= 127.0.0.1:9001

.PHONY: help setup setup-test fresh build run test check soak bench clean-data

# Cargo tells a changed file by its time alone, and the target folder is shared: a clone that was checked out before another one was
# built would be taken for built. Whoever builds after another clone touches its sources.
fresh:
	@mkdir -p "$(CARGO_TARGET_DIR)"
	@if [ "$$(cat "$(CARGO_TARGET_DIR)/.last-clone" 2>/dev/null)" != "$(CURDIR)" ]; then \
	  find placement disk-node gateway bench tests -name '*.rs' -exec touch -c {} +; \
	  echo "$(CURDIR)" > "$(CARGO_TARGET_DIR)/.last-clone"; \
	fi

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## install missing system packages
	@tests/setup.sh build

setup-test: ## install what the tests need: clients, strace, file system tools
	@tests/setup.sh test

build: setup fresh ## build the server and the disk node
	@echo "==> building Granary (the first build on a machine compiles RocksDB: 10 to 20 minutes on two cores)"
	cargo build $(CARGO_FLAGS) --workspace --bins

run: build ## start an embedded cluster of six disk nodes: S3 on $(S3), data kept in $(DIR)
	@exec $(BIN)/granary dev --dir "$(DIR)" --s3 "$(S3)" --admin "$(ADMIN)"

test: setup setup-test fresh ## the whole suite, with real clients and real faults
	@echo "==> building Granary and its tests (the first build on a machine compiles RocksDB: 10 to 20 minutes on two cores)"
	cargo test $(CARGO_FLAGS) --workspace --no-run
	@echo "==> running the suite (about ten minutes)"
	cargo test $(CARGO_FLAGS) --workspace

check: setup fresh ## formatting and lints
	cargo fmt --all --check
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

soak: setup setup-test fresh ## the long forms: hours, results go to docs/reliability.md
	cargo test $(CARGO_FLAGS) --workspace --no-run
	GRANARY_SOAK=1 cargo test $(CARGO_FLAGS) --workspace --test clients --test faults --test s3 -- --nocapture --test-threads 1

bench: build ## codec kernels, then PUT and GET against a fresh cluster
	$(BIN)/granary-bench codec
	$(BIN)/granary-bench floor
	$(BIN)/granary-bench load --embedded

clean-data: ## remove the data of `make run`
	@read -r -p "Remove all data in $(DIR)? [y/N] " answer && [ "$$answer" = y ] && rm -rf -- "$(DIR)"
