# `make demo` shows it, `make test` proves it. Both install what they need, and say so first.

.PHONY: help demo test fuzz kill faults cutover-bench setup check-style build clean bench

help:
	@echo "make demo [SCALE=60]  move a live database between two throw-away servers and back"
	@echo "make test             everything a change must pass: style, lints, all tests"
	@echo "make fuzz [FUZZ=1000000]  that many mutated messages through each decoder"
	@echo "make kill [KILLS=200]  kill -9 at random moments; the end is exact each time"
	@echo "make faults           restarts and network faults in every phase"
	@echo "make cutover-bench    stalls of writers through pgbouncer, release binary [ROUNDS=5]"
	@echo "make bench [SCALE=1 ROUNDS=5]  whole jobs beside the peers; make bench-copy for one of them"
	@echo "make check-style      only formatting and lints"
	@echo "make build            the release binary, target/release/walferry"

# SCALE: about 5 MB of database for each unit; walferry's own default is about 300 MB.
demo:
	@sh tests/setup.sh demo
	cargo build --release --quiet --locked
	target/release/walferry demo $(if $(SCALE),--scale $(SCALE))

test: setup check-style
	cargo test --locked --all-targets

# Two rounds more than the default test, and the binary that users run.
cutover-bench: build
	WALFERRY_ROUNDS=$(or $(ROUNDS),5) WALFERRY_BINARY=$(CURDIR)/target/release/walferry \
		cargo test --locked --test pooler -- --nocapture

# Optimised, as a million runs of a debug build take many minutes. WALFERRY_SEED repeats a run.
fuzz:
	WALFERRY_FUZZ=$(or $(FUZZ),1000000) cargo test --release --locked --lib -- --nocapture mutated

setup:
	@sh tests/setup.sh test

check-style:
	@cargo fmt --version >/dev/null && cargo clippy --version >/dev/null \
		|| { echo "install them: rustup component add rustfmt clippy"; exit 1; }
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

build:
	cargo build --release --locked

clean:
	cargo clean

# KILLS: how often `walferry run` is killed with kill -9; WALFERRY_SEED repeats a run.
kill: setup
	WALFERRY_KILLS=$(or $(KILLS),200) cargo test --locked --test it -- --nocapture faults::kill_9

# Servers restarted, and networks cut, silently cut and stalled, in every phase.
faults: setup
	WALFERRY_FAULTS=long cargo test --locked --test it -- --nocapture --test-threads 2 faults::

# Whole jobs beside the peers, see bench/README.md. SCALE=0.01 ROUNDS=1 shows in a minute that it works.
bench:
	@sh tests/setup.sh bench
	SCALE=$(SCALE) ROUNDS=$(ROUNDS) ONLY=$(ONLY) PEERS=$(PEERS) \
		cargo bench --locked --bench jobs

BENCHES = copy tables catchup shapes large follow far cost growth
.PHONY: $(addprefix bench-,$(BENCHES))
$(addprefix bench-,$(BENCHES)): bench-%:
	@$(MAKE) --no-print-directory bench ONLY=$*
