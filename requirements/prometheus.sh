#!/usr/bin/env bash
# Unpacks Debian's prometheus, which brings promtool, into the folder that is named: for tests, without installing it.
set -euo pipefail
into=$1
if command -v prometheus promtool >/dev/null; then
  mkdir -p "$into"
  ln -sf "$(command -v prometheus)" "$(command -v promtool)" "$into/"
  exit 0
fi
command -v apt-get dpkg >/dev/null || { echo "no prometheus: its tests are skipped (install it, or use Debian)" >&2; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 . # apt downloads as a user of its own
apt-get download -qq prometheus 2>/dev/null || { apt-get update -qq && apt-get download -qq prometheus; } ||
  { echo "no prometheus: its tests are skipped (apt-get could not get it)" >&2; exit 0; }
dpkg -x prometheus_*.deb unpacked
mkdir -p "$into"
mv unpacked/usr/bin/prometheus unpacked/usr/bin/promtool "$into/"
