#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what pip cannot: the browser of the slow test of the Space. Without it that test fails and says so; the others run.
set -u

PACKAGES="chromium chromium-driver"
INSTALL="apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $PACKAGES"

if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then
  exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
  echo "installing $PACKAGES for the browser test"
  if bash -c "$INSTALL" > /dev/null; then
    exit 0
  fi
fi
echo "The browser test needs $PACKAGES, which could not be installed here. As root on Debian: $INSTALL" >&2
exit 0
