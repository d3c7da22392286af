#!/bin/bash
# What the tests of the desktop and of the runtime need besides Go. As root on
# Debian or Ubuntu it is installed; otherwise what is missing is named, with the
# way to get it. Where all is there, this takes a few milliseconds.
set -eu

missing=()
need() { # program, package
  command -v "$1" >/dev/null || missing+=("$2")
}
need sway sway
need swaybar sway
need swaybg swaybg
need grim grim
need foot foot
need waybar waybar
need tmux tmux
# Containerd itself is built by its test, which only runs as root.
if [ "$(id -u)" = 0 ]; then need runc runc; fi
fonts=(/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf /usr/share/fonts/*/DejaVuSansMono.ttf /usr/share/fonts/*/*/DejaVuSansMono.ttf)
found=
for f in "${fonts[@]}"; do if [ -e "$f" ]; then found=1; fi; done
[ -n "$found" ] || missing+=(fonts-dejavu-core)
[ ${#missing[@]} -gt 0 ] || exit 0

mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "The tests of the desktop and of the runtime need what is not here: ${missing[*]}" >&2
  echo "On Debian or Ubuntu: sudo hack/install-test-deps.sh; elsewhere install packages of these names." >&2
  exit 0 # the tests themselves fail, and say the same; the others need none of it
fi
echo "Installing for the tests of the desktop and of the runtime: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -q --no-install-recommends "${missing[@]}" >"$log" 2>&1; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install; then
  # The package lists may be absent or old.
  if ! apt-get update -q >"$log" 2>&1 || ! install; then
    tail -20 "$log" >&2
    echo "$0: installing ${missing[*]} failed" >&2
    exit 1
  fi
fi
