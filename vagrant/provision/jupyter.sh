#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs Jupyter as a service that runs as the user vagrant and needs a token.
#   HOST_PORT   its port on the host, for the message
. "$(dirname "$0")/common.sh"
need_root
: "${HOST_PORT:=8888}"
HOME_DIR=/home/vagrant
TOKEN=$STATE/jupyter.env
UNIT=/etc/systemd/system/cwndtrace-jupyter.service

# VirtualBox forwards the port to the guest's address, and ssh with libvirt to loopback.
ip=127.0.0.1
[ "$(systemd-detect-virt)" != oracle ] || ip=$(ip -4 -o route get 10.0.2.2 | sed 's/.* src \([0-9.]*\).*/\1/')

# The user works on copies of the notebooks, because each sync overwrites $PROJECT. They read ../tests/data.
for folder in notebooks tests/data; do
    if [ ! -e "$HOME_DIR/$folder" ]; then
        mkdir -p "$(dirname "$HOME_DIR/$folder")"
        cp -r "$PROJECT/$folder" "$HOME_DIR/$folder"
    fi
done
chown -R vagrant: "$HOME_DIR/notebooks" "$HOME_DIR/tests"

mkdir -p "$STATE"
if [ ! -e "$TOKEN" ]; then
    (umask 077 && printf 'JUPYTER_TOKEN=%s\n' "$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')" >"$TOKEN")
fi

unit="[Unit]
Description=JupyterLab with cwndtrace
After=network.target

[Service]
User=vagrant
WorkingDirectory=$HOME_DIR
EnvironmentFile=$TOKEN
ExecStart=/opt/cwndtrace/bin/jupyter-lab --no-browser --ip=$ip --port=8888 --port-retries=0
Restart=on-failure

[Install]
WantedBy=multi-user.target"
if [ "$(cat "$UNIT" 2>/dev/null)" != "$unit" ]; then
    printf '%s\n' "$unit" >"$UNIT"
    systemctl daemon-reload
    systemctl stop cwndtrace-jupyter
fi
systemctl -q enable --now cwndtrace-jupyter

say "waiting for Jupyter"
/opt/cwndtrace/bin/python - "http://$ip:8888/api" <<'END' || die "Jupyter doesn't answer." "See: sudo journalctl -u cwndtrace-jupyter"
import sys, time, urllib.request
deadline = time.monotonic() + 300
while True:
    try:
        urllib.request.urlopen(sys.argv[1], timeout=30)
        break
    except OSError:
        if time.monotonic() > deadline:
            sys.exit(1)
        time.sleep(1)
END
# shellcheck source=/dev/null
. "$TOKEN"
say "Jupyter: http://127.0.0.1:$HOST_PORT/lab?token=$JUPYTER_TOKEN"
took
