#!/bin/sh
# Puts PostgreSQL 15's regression suite into the cache, with regress.so and pg_regress built from the
# same source package: nothing of it is in this repository. Says what it downloads first; takes no
# time where it is there. Prints the suite's directory (src/test/regress of the built tree) last.
# Usage: fetch.sh; the cache is $WALFERRY_CACHE, /var/cache/walferry under root, ~/.cache/walferry.
set -eu

if [ -n "${WALFERRY_CACHE:-}" ]; then cache=$WALFERRY_CACHE
elif [ "$(id -u)" = 0 ]; then cache=/var/cache/walferry
else cache=${XDG_CACHE_HOME:-$HOME/.cache}/walferry
fi
place=$cache/regress
tree=$place/postgresql
suite=$tree/src/test/regress

if [ -e "$place/ready" ]; then
    echo "$suite"
    exit 0
fi

need() {
    command -v "$1" >/dev/null || { echo "regress: $1 is missing: apt-get install $2" >&2; exit 1; }
}
need apt-get apt
need cc "gcc libc6-dev"
need make make
need perl perl
need bzip2 bzip2
[ -x /usr/lib/postgresql/15/bin/psql ] || { echo "regress: make setup comes first" >&2; exit 1; }

echo "regress: will download the source package of postgresql-15 (25 MB) and its index (10 MB) by" \
    "apt into $place, and build regress.so and pg_regress there" >&2

# A configuration of our own: the machine's lists and sources stay as they are. Source packages are
# asked of wherever this machine has its Debian packages from.
apt=$place/apt
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$place/package"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
signed=
[ ! -e $keys ] || signed="[signed-by=$keys] "
apt-get indextargets --format "deb-src $signed\$(REPO_URI) \$(RELEASE) \$(COMPONENT)" \
    'Created-By: Packages' 'Origin: Debian' | sort -u >"$apt/sources.list"
[ -s "$apt/sources.list" ] || { echo "regress: apt has no Debian sources" >&2; exit 1; }
private() {
    apt-get -q -o Dir::State::Lists="$apt/lists" -o Dir::Etc::SourceList="$apt/sources.list" \
        -o Dir::Etc::SourceParts=/dev/null -o Dir::Cache="$apt" -o APT::Sandbox::User=root "$@" >&2
}
private update
# The sources of the server that is installed; of another minor release where they are gone. An
# archive may list one that it does not have (yet, or any more).
known() {
    apt-cache -o Dir::State::Lists="$apt/lists" -o Dir::Etc::SourceList="$apt/sources.list" \
        -o Dir::Etc::SourceParts=/dev/null -o Dir::Cache="$apt" showsrc postgresql-15 |
        sed -n 's/^Version: //p' | sort -u
}
cd "$place/package"
found=
for version in $(dpkg-query -W -f '${source:Version}' postgresql-15) $(known); do
    if private source --download-only "postgresql-15=$version"; then found=yes; break; fi
done
cd "$OLDPWD"
[ -n "$found" ] || { echo "regress: no archive of apt's has the sources" >&2; exit 1; }

rm -rf "$tree"
mkdir "$tree"
tar -xjf "$(ls "$place"/package/postgresql-15_*.orig.tar.bz2 | tail -n 1)" -C "$tree" \
    --strip-components 1
# Only headers, two small libraries and the suite's own programs are built; the servers are Debian's.
{
    cd "$tree"
    ./configure --quiet --prefix=/usr/lib/postgresql/15 --without-readline --without-zlib
    make -s -C src/test/regress all
    make -s -C contrib/spi
} >"$place/build.log" 2>&1 || { tail -n 20 "$place/build.log" >&2; exit 1; }
touch "$place/ready"
echo "$suite"
