#!/bin/sh
# Headless Chromium for tests/browser and the font of the emoji, where they can be installed; elsewhere those tests skip
# with their reason.
font=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
command -v chromium >/dev/null && command -v chromedriver >/dev/null && [ -e $font ] && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "no Chromium or emoji and no way to install them: their tests skip"; exit 0; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-noto-color-emoji >/dev/null
