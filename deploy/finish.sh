#!/bin/sh
# finish.sh VENV PACKAGE COMMAND…: compile a virtual environment, and take out what only building needed, what names a path or a time of
# the build, and what the other image is for.
set -eu
venv=$1; shift
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for unwanted in "$@"; do rm -rf "$site/$unwanted" "$venv/bin/$unwanted"; done
# Pictures and pages of litellm's own proxy, which is not installed.
rm -rf "$site/litellm/proxy/_experimental/out" "$site/litellm/proxy/swagger"
rm -rf "$site"/pip "$site"/pip-* "$site"/_distutils_hack "$site"/distutils-precedence.pth "$venv"/bin/pip*
find "$venv/bin" -type f ! -name 'hybridgate*' -delete   # other packages' commands; python is a link
[ "${KEEP_SETUPTOOLS:-}" ] || rm -rf "$site"/setuptools "$site"/setuptools-* "$site"/pkg_resources
find "$site" -name direct_url.json -delete
find "$site" -type d \( -name tests -o -name test \) -path '*/site-packages/*/*' -not -path '*/torch/*' -prune -exec rm -rf {} +
# What was compiled while building has times in it.
find "$site" -type d -name __pycache__ -prune -exec rm -rf {} +
# Hashes instead of times, so that the same source gives the same bytes; unchecked, since nothing changes in an image. Of torch one file
# is for a later Python.
"$venv/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash -x /py312_ "$site" >/dev/null
