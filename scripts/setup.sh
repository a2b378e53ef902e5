# Sourced by `run` and `test`: a virtual environment that is built once and checked in milliseconds afterwards.
#
#   prepare 3.11 .venv pinned         the versions of constraints.txt
#   prepare 3.12 .venv-3.12 newest    the newest that pyproject.toml allows
#
# On return $python is the environment's interpreter. The stamp is written last and holds all that the environment was built from, so
# a build that was killed, a moved checkout or other pins are seen. What differs is then installed into the environment that there is,
# under whatever runs in it; one whose interpreter does not work, or that was built elsewhere, is built anew. The stamp is compared
# without the lock first: only a build has to wait for another.
#
# JAXOPT_LAB_EXTRAS names optional dependencies of pyproject.toml to install as well: JAXOPT_LAB_EXTRAS=cuda, or cuda,data. It must be
# given at each start, as it is part of what the environment is built from.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    echo "error: $*" >&2
    exit 1
}

# A usable interpreter of version $1: it can make environments (some systems ship Python without ensurepip).
find_python() {
    local version=$1 candidate
    local check="import ensurepip, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')"
    if [[ -n ${PYTHON:-} ]]; then
        "$PYTHON" -c "$check" >/dev/null 2>&1 || fail "PYTHON=$PYTHON is not a Python $version with venv and ensurepip; set PYTHON to one, or unset it"
        echo "$PYTHON"
        return
    fi
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3 python3; do
        if "$candidate" -c "$check" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python $version with venv and ensurepip is on PATH; install it (python$version and its venv package), or set PYTHON to one"
}

# What the environment is built from, word for word: of pyproject.toml the parts that an installation reads, not the options of tools.
recipe() {
    local version=$1 kind=$2
    echo "$root $version $kind"
    echo "$extras"
    awk '/^\[/ { wanted = !/^\[tool\./ || /^\[tool\.setuptools/ } wanted && !/^ *(#|$)/' "$root/pyproject.toml"
    if [[ $kind == pinned ]]; then cat "$root/constraints.txt"; fi
}

prepare() {
    local version=$1 environment=$root/$2 kind=$3 base options
    local stamp=$environment/stamp extras=dev${JAXOPT_LAB_EXTRAS:+,$JAXOPT_LAB_EXTRAS}
    python=$environment/bin/python
    if [[ -x $python ]] && recipe "$version" "$kind" | cmp -s - "$stamp"; then return; fi

    base=$(find_python "$version")
    exec 9>"$environment.lock"
    "$base" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX)"
    if ! { [[ -x $python ]] && recipe "$version" "$kind" | cmp -s - "$stamp"; }; then
        if [[ $kind == pinned ]]; then options=(-c "$root/constraints.txt"); else options=(--upgrade --upgrade-strategy eager); fi
        # Both branches inherit the lock: one that outlives a kill of this shell keeps the next build waiting.
        if [[ -f $stamp && $(head -n 1 "$stamp") == "$root $version $kind" ]] && "$python" -c "import pip" >/dev/null 2>&1; then
            echo "bringing $environment up to date" >&2
            # Only its first line stays: until the work is done, no recipe is equal to it.
            head -n 1 "$stamp" >"$stamp.new"
            mv "$stamp.new" "$stamp"
        else
            echo "building $environment (once; a few minutes)" >&2
            rm -rf "$environment"
            "$base" -m venv "$environment"
        fi
        "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-input "${options[@]}" -e "${root}[$extras]" >&2
        recipe "$version" "$kind" >"$stamp.new"
        mv "$stamp.new" "$stamp"
    fi
    exec 9>&-
}
