#!/bin/sh
# Check that this machine can build Snap: Python 3.11+ with venv, a C linker, cargo.
#
# Prints the Python to use and exits 0, or names everything that is missing, with the way to get it, and
# exits 1. The Python is $PYTHON when it is set, else the first of the usual names that is new enough.
set -u
here=$(dirname "$0")
missing=0

lack() { # what is missing, how to get it
    missing=1
    printf 'missing: %s\n    %s\n' "$1" "$2" >&2
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3
fi
python=
for candidate in "$@"; do
    if new_enough "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    lack "Python 3.11 or newer (looked at: $*)" \
        "apt install python3 python3-venv | dnf install python3 | https://www.python.org/downloads/ ; or make PYTHON=/path/to/python3.11"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    lack "the venv module of $python" "apt install python3-venv (Debian and Ubuntu split it off)"
fi

if ! command -v "${CC:-cc}" >/dev/null 2>&1; then
    lack "a C linker (${CC:-cc})" "apt install gcc libc6-dev | dnf install gcc"
fi

rustup='curl --proto =https --tlsv1.2 -sSf https://sh.rustup.rs | sh    (then open a new shell)'
wanted=$(sed -n 's/^rust-version *= *"\([0-9]*\.[0-9]*\).*/\1/p' "$here/../dataplane/Cargo.toml" 2>/dev/null)
found=$(cargo --version 2>/dev/null | sed -n 's/^cargo \([0-9]*\.[0-9]*\).*/\1/p')
if [ -z "$found" ]; then
    lack "cargo, Rust's build tool" "$rustup"
elif [ -n "$wanted" ] && [ "$(printf '%s\n%s\n' "$wanted" "$found" | sort -V | head -n 1)" != "$wanted" ]; then
    lack "cargo $wanted or newer (this is $found)" "rustup update, or: $rustup"
fi

[ "$missing" -eq 0 ] || exit 1
printf '%s\n' "$python"
