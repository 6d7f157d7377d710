# `make demo` shows it, `make test` proves it. Both install what they need, and say so first.

# Source-target, and where pgoutput by streaming is not meant, /decoder/transport.
FAR = 10-18 11-16 18-13
UP = 10-11 11-12 12-13 13-14 14-15 15-16 16-17 17-18
DOWN = 11-10 12-11 13-12 14-13 15-14 16-15 17-16 18-17
PAIRS = $(FAR) $(UP) $(DOWN) $(patsubst %,%/test_decoding/pull,$(UP) $(FAR)) \
	$(patsubst %,%/test_decoding/stream,$(FAR)) $(patsubst %,%/pgoutput/pull,$(FAR))

.PHONY: help demo demo-kafka test fuzz decode-bench kill faults failover patroni heartbeat ddl maps matrix regress states switches two-way two-way-loop partitions n-to-m bench spool-bench kill-spool outage latency cutover-bench stalls setup check-style without-kafka build clean

help:
	@echo "make demo [SCALE=60]  move a live database between two throw-away servers and back"
	@echo "make demo-kafka       the same through a throw-away Apache Kafka"
	@echo "make test             everything a change must pass: style, lints, all tests"
	@echo "make fuzz [FUZZ=1000000]  that many mutated messages through each decoder"
	@echo "make decode-bench     what a message costs in each decoder; fails where a bar is missed"
	@echo "make kill [KILLS=200] [BUFFER=spool|kafka]  kill -9 at random moments; the end is exact each time"
	@echo "make spool-bench      throughput of the spool beside dd, release build"
	@echo "make kill-spool       kill -9 of run and of both servers, through a spool and memory [KILLS=200]"
	@echo "make outage           the target away for ten minutes of writes [SECONDS=600]"
	@echo "make latency          memory, spool and Kafka at 500 tx/s; large transactions by streaming"
	@echo "make patroni          a source that Patroni runs switches and fails over in each phase"
	@echo "make heartbeat        an idle database beside pgbench pins no WAL [SECONDS=600 MAJOR=15]"
	@echo "make failover         a standby of the source takes over at random moments [PROMOTIONS=50]"
	@echo "make maps [MAPS=1000]  random maps: by copy, by stream and by SQL the same"
	@echo "make two-way          writers on both sides, conflicts counted from outside [SECONDS=600 POLICY=last-commit]"
	@echo "make n-to-m           3 sources to 5 targets by each hash, kills in every phase"
	@echo "make two-way-loop     of a million transactions none comes back [TRANSACTIONS=1000000]"
	@echo "make partitions       8,192 partitions a group at a time, beside at once [PARTITIONS=8192 GROUPS=128]"
	@echo "make faults           restarts and network faults in every phase"
	@echo "make regress          PostgreSQL's own regression suite as the workload (a download first)"
	@echo "make ddl              DDL of every class on three versions and two decoders [MAJORS='12 15 18']"
	@echo "make states [TRANSACTIONS=1000000]  a reader of the target sees only states of the source"
	@echo "make switches         a job for each optimisation that is off, and what it leaves"
	@echo "make matrix [PAIRS=\"10-18 ...\"]  the whole job between any two of PostgreSQL 10 to 18"
	@echo "make cutover-bench    stalls of writers through pgbouncer, release binary [ROUNDS=5]"
	@echo "make stalls           stalls of writers while shards of Citus (where there is one) and plproxy move"
	@echo "make bench [SCALE=1 ROUNDS=5]  whole jobs beside the peers (two hours, see bench/README.md)"
	@echo "make check-style      only formatting and lints"
	@echo "make without-kafka    lints and a job's tests of a build without librdkafka"
	@echo "make build            the release binary, target/release/walferry"

# SCALE: about 5 MB of database for each unit; walferry's own default is about 300 MB.
demo:
	@sh tests/setup.sh demo
	cargo build --release --quiet --locked
	target/release/walferry demo $(if $(SCALE),--scale $(SCALE))

demo-kafka:
	@sh tests/setup.sh demo-kafka
	cargo build --release --quiet --locked
	target/release/walferry demo --kafka $(if $(SCALE),--scale $(SCALE))

# Servers of tests live in memory where there is enough of it. A good part of a test is waiting, for
# turns, time-outs and servers, so that there are half as many more at a time than processors.
test: setup check-style
	TMPDIR=$$(sh tests/scratch.sh) RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$(($$(nproc) * 3 / 2))} \
		cargo test --locked --all-targets --no-fail-fast

# Two rounds more than the default test, and the binary that users run.
cutover-bench: build
	WALFERRY_ROUNDS=$(or $(ROUNDS),5) WALFERRY_BINARY=$(CURDIR)/target/release/walferry \
		cargo test --locked --test pooler -- --nocapture

# The release binary. Ten moves between nodes of Citus at about 1,000 transactions a second, and
# sixteen databases of a plproxy cluster: they fail where a bar is missed.
stalls: setup build
	WALFERRY_MOVES=10 WALFERRY_BINARY=$(CURDIR)/target/release/walferry \
		cargo test --locked --test it -- --nocapture citus::stalls
	WALFERRY_STALLS=1 WALFERRY_PARTITIONS=16 WALFERRY_BINARY=$(CURDIR)/target/release/walferry \
		cargo test --locked --test it -- --nocapture cluster::double

# Optimised, as a million runs of a debug build take many minutes. WALFERRY_SEED repeats a run.
fuzz:
	WALFERRY_FUZZ=$(or $(FUZZ),1000000) cargo test --release --locked --lib -- --nocapture mutated

decode-bench:
	cargo bench --locked --bench decode

setup:
	@sh tests/setup.sh test

check-style:
	@cargo fmt --version >/dev/null && cargo clippy --version >/dev/null \
		|| { echo "install them: rustup component add rustfmt clippy"; exit 1; }
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

# The feature `kafka` is on by default; this is what those get who build without librdkafka.
without-kafka: setup
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	cargo test --locked --no-default-features --lib
	cargo test --locked --no-default-features --test it job::

build:
	cargo build --release --locked

clean:
	cargo clean

# Sequential writing of 2 GB, three times each: at least 300 MB/s, or 80 % of dd.
spool-bench:
	cargo test --release --locked --lib throughput_beside_dd -- --ignored --nocapture

# BUFFER=spool or kafka: through that instead of memory; works for `make faults` too. With kafka the
# broker and both servers are killed in turn as well, beside `run` and beside its two halves: KILLS=250
# is fifty for each of five.
# KILLS: how often `walferry run` is killed with kill -9; WALFERRY_SEED repeats a run.
kill: setup
	WALFERRY_KILLS=$(or $(KILLS),200) WALFERRY_TEST_BUFFER=$(BUFFER) cargo test --locked --test it -- --nocapture \
		$(if $(filter kafka,$(BUFFER)),kafka::moving::kill_9 kafka::halves::kill_9) faults::kill_9

# The run, the source and the target each go down, the servers 50 times, at random moments: through a
# spool, and through memory.
kill-spool: setup
	WALFERRY_SPOOL_KILLS=$(or $(KILLS),200) cargo test --locked --test it -- --nocapture spool::a_move_through

# A standby of the source takes over, at so many random moments.
failover: setup
	WALFERRY_PROMOTIONS=$(or $(PROMOTIONS),50) cargo test --locked --test it -- --nocapture failover::promotions

# Switchovers and failovers of a source that Patroni runs, with etcd; both are installed first.
patroni: setup
	sh tests/setup.sh patroni
	cargo test --locked --test it -- --ignored --nocapture failover::patroni

# The target away for ten minutes of writes, once with a spool and once with Kafka: the source's WAL
# stays under the budget.
outage: setup
	WALFERRY_OUTAGE=$(or $(SECONDS),600) WALFERRY_PATIENCE=900 cargo test --locked --test it -- --nocapture a_target_outage_goes_into

# How long a change takes through memory, a spool and Kafka, and a large transaction by streaming
# and without; release binary. The first fails beyond its bars.
latency: setup build
	WALFERRY_BINARY=$(CURDIR)/target/release/walferry cargo test --locked --test it -- \
		--ignored --nocapture --test-threads 1 large::measure

# Release binary. Fails where a statement waits for over 150 ms, or where the groups take over 1.3
# times as long as one switch of all.
partitions: setup build
	WALFERRY_PARTITIONS=$(or $(PARTITIONS),8192) WALFERRY_GROUPS=$(GROUPS) WALFERRY_PATIENCE=1800 \
		WALFERRY_BINARY=$(CURDIR)/target/release/walferry cargo test --locked --test it -- \
		--ignored --nocapture groups::thousands_of_partitions

# Servers restarted, and networks cut, silently cut and stalled, in every phase.
faults: setup
	WALFERRY_FAULTS=long WALFERRY_TEST_BUFFER=$(BUFFER) cargo test --locked --test it -- --nocapture --test-threads 2 faults::

# Random [[map]] sections, thirty a job, by every decoder and buffer in turn; WALFERRY_SEED repeats a
# run.
maps: setup
	WALFERRY_MAPS=$(or $(MAPS),1000) cargo test --locked --test it -- --nocapture maps::random

# Both sides written at once, five writes in a hundred to keys in common, with three kills; settled by
# POLICY, such as greatest:rev,last-commit, a random number in each version.
two-way: setup
	WALFERRY_TWO_WAY=$(or $(SECONDS),600) WALFERRY_ON_CONFLICT=$(or $(POLICY),last-commit) cargo test --locked --test it -- \
		--ignored --nocapture two_way::ten_minutes_of_both_sides

# Three sources to five targets, walferry and a target killed in every phase.
n-to-m: setup
	WALFERRY_PATIENCE=600 cargo test --locked --test it -- --ignored --nocapture reshard::three_sources

two-way-loop: setup
	WALFERRY_TRANSACTIONS=$(or $(TRANSACTIONS),1000000) cargo test --locked --test it -- \
		--ignored --nocapture two_way::of_a_million_transactions

# An idle database beside ten minutes of pgbench in the same server: WAL retained for it.
heartbeat: setup
	WALFERRY_HEARTBEAT=$(or $(SECONDS),600) WALFERRY_MAJOR=$(or $(MAJOR),15) cargo test --locked --test it -- \
		--ignored --nocapture heartbeat::an_idle_database_beside_pgbench

# DDL of every class carried by event triggers and without, on each version and decoder.
ddl:
	@WALFERRY_TEST_MAJORS="$(or $(MAJORS),12 18)" sh tests/setup.sh test
	WALFERRY_DDL="$(or $(MAJORS),12 15 18)" cargo test --locked --test it -- \
		--ignored --nocapture ddl::every_version

# The suite is fetched and built in the cache; the servers are those of the other tests.
regress: setup
	@suite=$$(sh tests/regress/fetch.sh) && WALFERRY_REGRESS=$$suite cargo test --locked --test it -- \
		--ignored --nocapture --test-threads 1 regress::

# A million transactions and 20 kills of the run; release binary.
states: setup build
	WALFERRY_TRANSACTIONS=$(or $(TRANSACTIONS),1000000) WALFERRY_BINARY=$(CURDIR)/target/release/walferry \
		cargo test --locked --test it -- --nocapture states::

# Each optimisation off alone, and not one of each stage at a time.
switches: setup
	WALFERRY_SWITCHES=1 cargo test --locked --test it -- --nocapture switches::

# All majors are installed for it, 60 MB each.
matrix:
	@WALFERRY_TEST_MAJORS="10 11 12 13 14 16 17 18" sh tests/setup.sh test
	WALFERRY_PAIRS="$(PAIRS)" cargo test --locked --test it -- --nocapture matrix::

# Whole jobs beside the peers; no figures at full scale yet, see bench/README.md.
bench:
	@sh tests/setup.sh bench
	SCALE=$(SCALE) ROUNDS=$(ROUNDS) ONLY=$(ONLY) PEERS=$(PEERS) \
		cargo bench --locked --bench jobs

BENCHES = copy tables catchup shapes large follow far cost growth
.PHONY: $(addprefix bench-,$(BENCHES))
$(addprefix bench-,$(BENCHES)): bench-%:
	@$(MAKE) --no-print-directory bench ONLY=$*
