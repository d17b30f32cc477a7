#!/bin/sh
# Install the Debian packages that are missing, and say which. Usage: packages.sh [--optional] PACKAGE...
# --optional: without root, say what is missing and go on.
set -eu
optional=
if [ "$1" = --optional ]; then
    optional=yes
    shift
fi
missing=
for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "setup: missing Debian packages:$missing" >&2
    [ -z "$optional" ] || exit 0
    echo "hint: run as root, or: sudo apt-get install$missing" >&2
    exit 1
fi
echo "setup: installing Debian packages:$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Services that a package brings stay off: the tests start what they need themselves.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f "$log" $policy' EXIT
fi
# shellcheck disable=SC2086
if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends $missing; } >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
