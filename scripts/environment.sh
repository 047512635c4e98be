# To be sourced from the repository's root: `install FILE` puts requirements and this package, editable, into .venv.

# XLA takes fresh memory for every step on CPU. In huge pages that is a third faster; elsewhere it changes nothing.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

install() {
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
      echo "error: Python 3.11 to 3.13 is needed; set PYTHON=/path/to/python3.12, say" >&2
      return 1
    }
    "${PYTHON:-python3}" -m venv .venv
  fi
  # Once for each content of the files: a second run starts at once.
  local stamp
  stamp=.venv/installed-$(cat "$1" requirements.txt pyproject.toml | cksum | tr ' ' -)
  [ -e "$stamp" ] && return
  echo "installing $1 into .venv (about a minute)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
  touch "$stamp"
}
