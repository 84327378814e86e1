# shellcheck shell=bash
# What the commands in hack/ share: installing what is missing on this machine.
# Source it after `set -euo pipefail`. Every function says in one line what it did or found, and a
# second run finds everything there.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/external-storage
TOOLS=$CACHE/tools
ENVIRONMENT=$ROOT/.venv

# shellcheck disable=SC2034  # for those who source this
APT_PACKAGES=(nfs-ganesha nfs-ganesha-vfs libnfs-utils dbus util-linux strace fdisk e2fsprogs xfsprogs)
# What a cluster that runs pods needs.
# shellcheck disable=SC2034
NODE_PACKAGES=(containerd runc containernetworking-plugins nftables iproute2 mount util-linux
  busybox-static)
# What a virtual machine with a storage kernel needs.
# shellcheck disable=SC2034
GUEST_PACKAGES=(qemu-system-x86 qemu-utils mmdebstrap openssh-client e2fsprogs)
TOOL_PACKAGES=('uv>=0.5' 'tox>=4.25,<5' 'tox-uv>=1.20,<2' 'ruff>=0.14,<1')
# What tox can run beside the tests of a package: always, and only when it is named.
# shellcheck disable=SC2034
CHECKS=(e2e guest hack types lint imports generate) RARE_CHECKS=(e2e-images images)

say() { printf '%-14s %s\n' "$1" "$2" >&2; }

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 1
}

# The directories that hold a package: lib first, then every provisioner.
packages() {
  local file
  echo lib
  for file in "$ROOT"/*/pyproject.toml; do
    file=${file%/pyproject.toml}
    [[ ${file##*/} == lib ]] || echo "${file##*/}"
  done
}

# The directories of packages that have scenarios.
scenarios() {
  local directory
  for directory in "$ROOT"/*/e2e; do
    [[ ! -d $directory ]] || basename "${directory%/e2e}"
  done
}

# One at a time changes the shared cache: `lock` waits for it, `unlock` gives it back.
lock() {
  mkdir -p "$CACHE"
  exec 9>"$CACHE/hack.lock"
  flock --nonblock 9 || { say waiting "another hack/ command is installing" && flock 9; }
}

unlock() { exec 9>&-; }

# need_apt PACKAGE... : Debian packages, installed when missing.
need_apt() {
  local missing=() package
  for package in "$@"; do
    dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null |
      grep -qx installed || missing+=("$package")
  done
  if ((${#missing[@]} == 0)); then
    say packages "$*"
    return
  fi
  local install=(apt-get install --yes --no-install-recommends "${missing[@]}")
  ((EUID == 0)) || die "Debian packages are missing; run: sudo apt-get update && sudo ${install[*]}"
  say packages "installing ${missing[*]}"
  apt-get update --quiet=2 >&2
  DEBIAN_FRONTEND=noninteractive "${install[@]}" --quiet=2 >&2 </dev/null
  # Where there is systemd the package starts a server of its own, on port 2049; ours are private.
  if [[ " ${missing[*]} " == *" nfs-ganesha "* && -d /run/systemd/system ]]; then
    say packages "stopping the nfs-ganesha service that the package has started"
    systemctl disable --now --quiet nfs-ganesha.service || true
  fi
}

# need_mtab : Ganesha looks file systems up in /etc/mtab, which minimal installations lack.
need_mtab() {
  [[ ! -e /etc/mtab ]] || return 0
  ((EUID == 0)) || die "/etc/mtab is missing; run: sudo ln -s /proc/self/mounts /etc/mtab"
  say mtab "linking /etc/mtab to /proc/self/mounts"
  ln -s /proc/self/mounts /etc/mtab
}

# Prints a Python of 3.11 or newer that can make environments; status 1 when there is none.
find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    # pyenv has a stand-in for each name, also for versions that are not chosen.
    if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  return 1
}

# need_tools : uv, tox and ruff in an environment of their own, first on PATH afterwards.
need_tools() {
  local python want="${TOOL_PACKAGES[*]}"
  if ! "$TOOLS/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python) || { need_apt python3 python3-venv && python=$(find_python); } ||
      die "Python 3.11 or newer with its venv module is needed"
    rm -rf "$TOOLS"
    "$python" -m venv "$TOOLS"
  fi
  if [[ $(cat "$TOOLS/made-of" 2>/dev/null) == "$want" ]]; then
    say tools "$TOOLS"
  else
    say tools "installing ${TOOL_PACKAGES[*]} to $TOOLS"
    # Into what is there: another hack/test may be running out of it.
    "$TOOLS/bin/python" -m pip install --quiet --disable-pip-version-check "${TOOL_PACKAGES[@]}"
    echo "$want" >"$TOOLS/made-of"
  fi
  export PATH=$TOOLS/bin:$PATH
}

# need_environment : $ENVIRONMENT with lib and every provisioner, with their testing extras, installed
# from their directories so that a change of the code needs no new run.
need_environment() {
  local names want package editables=(--editable './lib[testing]')
  mapfile -t names < <(packages)
  want=$(cd "$ROOT" && "$TOOLS/bin/python" --version && cat "${names[@]/%//pyproject.toml}")
  want=$(sha256sum <<<"$want")
  if [[ -x $ENVIRONMENT/bin/python && $(cat "$ENVIRONMENT/made-of" 2>/dev/null) == "$want" ]]; then
    say environment "$ENVIRONMENT"
    return
  fi
  say environment "installing ${names[*]} to $ENVIRONMENT"
  uv venv --quiet --clear --python "$TOOLS/bin/python" "$ENVIRONMENT"
  for package in "${names[@]:1}"; do
    editables+=(--editable "./${package}[testing]")
  done
  # All in one command: alone, a provisioner would look for the lib on the index.
  (cd "$ROOT" && VIRTUAL_ENV=$ENVIRONMENT uv pip install --quiet "${editables[@]}")
  echo "$want" >"$ENVIRONMENT/made-of"
}

# need_control_plane : etcd and Kubernetes' programs; building them tells how far it is.
need_control_plane() {
  local place
  place=$("$ENVIRONMENT/bin/python" -m external_storage.testing.binaries)
  say 'control plane' "$place"
}

# need_node : the programs of a node too.
need_node() {
  local place
  place=$("$ENVIRONMENT/bin/python" -m external_storage.testing.binaries --node)
  say node "$place"
}

# need_guest : the image of the virtual machine; building it tells how far it is.
need_guest() {
  local place
  place=$("$ENVIRONMENT/bin/python" -m external_storage.testing.guest --build)
  say guest "$place"
}
