#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs cwndtrace with its notebooks' packages. If there are wheels in vagrant/wheels, they are used instead of PyPI.
. "$(dirname "$0")/common.sh"
need_root
need_disk 2048 / "cwndtrace with its Python packages"

if [ -n "$(find "$PROJECT/vagrant/wheels" -name '*.whl' 2>/dev/null | head -n 1)" ]; then
    say "taking Python packages from vagrant/wheels"
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$PROJECT/vagrant/wheels"
fi
EXTRAS=jupyter "$PROJECT/tools/setup" install
took
