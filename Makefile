# `make demo` and `make test` work from nothing: each makes its own virtual environment in .venv, builds and
# installs the wheel there, and runs what was installed. Sources that change are installed again.

VENV := .venv
BIN := $(VENV)/bin
CRATE := --manifest-path dataplane/Cargo.toml
ROOMS := kernel ipc dataplane modules cli
SOURCES := $(shell find $(ROOMS) systemd -name target -prune -o -name __pycache__ -prune -o -type f \
	\( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -name '*.toml' -o -name '*.in' -o -name '*.rs' \
	-o -name 'Cargo.lock' -o -path 'systemd/*' \) -print | sort) \
	setup.cfg pyproject.toml README.md LICENSE
DIR ?=
ARGS ?=
# Absolute, so that every cargo run sees the same interpreter and rebuilds nothing.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-python test-rust torture lint bench bench-upgrade bench-pony wheel install clean FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: install ## a real directory tree through a module that is upgraded, killed and rolled back meanwhile (DIR=/any/tree)
	@$(BIN)/snapctl demo $(if $(DIR),--path "$(DIR)") $(ARGS)

test: test-rust test-python ## everything: Rust unit, property and loom tests, then pytest against the installed wheel

test-python: $(VENV)/installed-test ## pytest alone (ARGS="-k ring -x")
	$(BIN)/python -m pytest $(ARGS)

# Without its default feature the crate is pure Rust, and its tests link to no Python. Each of its test programs would take
# long to link as the extension is linked, for nothing.
test-rust: export CARGO_PROFILE_RELEASE_LTO := off
test-rust: export CARGO_PROFILE_RELEASE_CODEGEN_UNITS := 16
test-rust: $(VENV)/ready ## the crate's tests, then the rings under loom's model checker
	cargo test --release --quiet $(CRATE) --no-default-features
	RUSTFLAGS="--cfg loom" cargo test --release --quiet $(CRATE) --no-default-features --target-dir dataplane/target/loom --test 'loom_*'

torture: $(VENV)/installed-test ## upgrades, kills and faults under load, checked by a ledger (ARGS="--events 1000 --seed 7")
	@$(BIN)/python -m tests.torture $(ARGS)

lint: $(VENV)/installed-lint ## ruff, mypy --strict, rustfmt, clippy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --strict -p snap.kernel -p snap.ipc -p snap.dataplane -p snap.modules -p snap.cli
	cargo fmt $(CRATE) --check
	cargo clippy --release --quiet $(CRATE) --all-targets -- -D warnings

bench: $(VENV)/installed-bench ## Snap beside a Unix socket, ZeroMQ, Pipe and iceoryx2, interleaved (ARGS="--quick")
	@$(BIN)/snapctl bench $(ARGS)

bench-upgrade: $(VENV)/installed-bench ## upgrades under load, against stop and restore (ARGS="--quick --plot upgrade.png")
	@$(BIN)/snapctl bench upgrade $(ARGS)

bench-pony: $(VENV)/installed-bench ## Pony Express beside TCP, on one host and between two (ARGS="--quick --plot pony.png")
	@$(BIN)/snapctl bench pony $(ARGS)

wheel: $(VENV)/ready $(VENV)/sources ## dist/*.whl
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

install: $(VENV)/installed ## the package in .venv

clean: ## what the other targets made
	rm -rf $(VENV) build dist dataplane/target .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf *.egg-info

$(VENV)/ready:
	@python=$$(tools/require.sh) && "$$python" -m venv $(VENV)
	@touch $@

# The list itself, so that a file that was deleted or renamed is noticed as well.
$(VENV)/sources: $(VENV)/ready FORCE
	@printf '%s\n' $(SOURCES) | cmp -s - $@ || printf '%s\n' $(SOURCES) > $@

# `build/` goes: setuptools would pack what an older tree left there.
$(VENV)/installed: $(VENV)/sources $(SOURCES)
	@tools/require.sh > /dev/null
	@echo "building and installing snap-kernel into $(VENV) (the first time takes a few minutes)"
	@rm -rf build
	@$(BIN)/python -m pip install --quiet .
	@rm -rf build
	@touch $@

$(VENV)/installed-%: $(VENV)/installed setup.cfg
	@$(BIN)/python tools/extra.py $* | xargs -d '\n' $(BIN)/python -m pip install --quiet
	@touch $@

FORCE:
