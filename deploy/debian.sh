#!/bin/sh
# debian.sh SNAPSHOT PACKAGE…: install Debian packages and leave nothing behind; from a snapshot's address where that is not empty.
set -eu
snapshot=$1; shift
export DEBIAN_FRONTEND=noninteractive
if [ -n "$snapshot" ]; then
    rm -f /etc/apt/sources.list.d/*
    echo "deb [check-valid-until=no] $snapshot bookworm main" >/etc/apt/sources.list
fi
apt-get update -qq
[ -n "$snapshot" ] || apt-get upgrade -qq -y >/dev/null
apt-get install -qq -y --no-install-recommends "$@" >/dev/null
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log /var/cache/ldconfig/aux-cache \
    /usr/share/doc/* /usr/share/man/* /usr/share/locale/* /usr/share/info/*
