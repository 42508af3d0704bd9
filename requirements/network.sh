#!/usr/bin/env bash
# Unpacks Debian's nftables and iproute2, with their libraries, into the folder that is named: for tests, without installing them.
set -euo pipefail
into=$1
if PATH=$PATH:/usr/sbin:/sbin type ip nft >/dev/null 2>&1; then
  exit 0
fi
command -v apt-get dpkg >/dev/null || { echo "no nft and ip: tests that run pods are skipped (install nftables and iproute2)" >&2; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
chmod 755 . # apt downloads as a user of its own
wanted() { # both, and the libraries that they need, not libc
  apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances nftables iproute2 |
    grep -E '^(nftables|iproute2|lib[a-z0-9.-]+)$' | grep -vE '^(libc6|libgcc-s1|libcrypt1)$' | sort -u
}
get() { wanted >list && grep -q '^nftables$' list && xargs apt-get download -qq <list 2>/dev/null; }
get || { apt-get update -qq && get; } ||
  { echo "no nft and ip: tests that run pods are skipped (apt-get could not get them)" >&2; exit 0; }
for package in *.deb; do dpkg -x "$package" unpacked; done
mkdir -p "$into"
rm -rf "$into/files"
mv unpacked "$into/files"
libraries=$(find "$into/files" -name '*.so.*' -printf '%h\n' | sort -u | paste -sd:)
for name in ip nft; do
  program=$(find "$into/files" -path "*bin/$name" | head -1)
  printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$program" >"$into/$name"
  chmod 755 "$into/$name"
done
