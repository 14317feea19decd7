#!/bin/sh
# What some tests need, where it can be installed; elsewhere they skip with their reason: nvidia-modelopt, with which
# tests/golden/test_oracle.py compares the method, in a folder that nothing else imports from; headless Chromium for
# tests/browser; the font of the emoji.
oracle=.venv/oracle
[ -d $oracle ] || uv pip install -q --no-deps --require-hashes --target $oracle -r - <<END || echo "no nvidia-modelopt: its tests skip"
nvidia-modelopt==0.47.0 --hash=sha256:db13e62d7efe4a1512e8b8c3f479e28d64022306f94a194f13234e7dca1d3120
END
font=/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
command -v chromium >/dev/null && command -v chromedriver >/dev/null && [ -e $font ] && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "no Chromium or emoji and no way to install them: their tests skip"; exit 0; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-noto-color-emoji >/dev/null
