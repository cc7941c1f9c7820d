# Sourced with $root set to the checkout: makes $root/.venv match pyproject.toml, or exits with one line.
# The stamp is written after a finished install: the folder's own path, then a copy of pyproject.toml.

wanted() {
    printf '# %s\n' "$root" | cat - "$root/pyproject.toml"
}

if ! wanted | cmp -s - "$root/.venv/stamp"; then
    for python in python3 python3.14 python3.13 python3.12 python3.11 none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    if [ "$python" = none ]; then
        echo "lrk: Python 3.11 or newer is needed; found $(python3 --version 2>/dev/null || echo 'no python3')" >&2
        exit 1
    fi
    wanted | "$python" "$root/scripts/setup_venv.py" "$root" >&2
fi
