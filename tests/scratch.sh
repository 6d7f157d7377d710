#!/bin/sh
# Where tests put their servers: memory where 8 GB of it are free, as half of a short test's time on
# a disk's file system goes into making and removing a thousand small files. TMPDIR has the last
# word.
set -eu
free_mb() { df -Pm "$1" 2>/dev/null | awk 'NR == 2 { print $4 }'; }
available_mb() { awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo 2>/dev/null; }
dir=${TMPDIR:-}
if [ -z "$dir" ]; then
	dir=/tmp
	if [ -w /dev/shm ] && [ "$(free_mb /dev/shm)" -ge 8192 ] && [ "$(available_mb)" -ge 8192 ]; then
		dir=/dev/shm
	fi
fi
echo "$dir"
