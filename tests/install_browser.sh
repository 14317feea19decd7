#!/bin/sh
# Headless Chromium for tests/browser, where it can be installed; elsewhere those tests skip with their reason.
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "no Chromium and no way to install it: browser tests skip"; exit 0; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
