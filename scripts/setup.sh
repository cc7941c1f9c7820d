# Sourced with $root set to the checkout.

# What .venv is made from: the folder's own path, pyproject.toml, constraints.txt. Kept as .venv/stamp once it is made.
wanted() {
    printf '# %s\n' "$root" | cat - "$root/pyproject.toml" "$root/constraints.txt"
}

# set_up .venv makes that folder of the checkout match, where it does not; with what to install after the folder's name,
# it installs that on every call. Exits with one line where it cannot.
set_up() {
    if [ $# = 1 ] && wanted | cmp -s - "$root/$1/stamp"; then
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    if [ "$python" = none ]; then
        echo "lrk: Python 3.11 or newer is needed; found $(python3 --version 2>/dev/null || echo 'no python3')" >&2
        exit 1
    fi
    wanted | "$python" "$root/scripts/setup_venv.py" "$@" >&2
}
