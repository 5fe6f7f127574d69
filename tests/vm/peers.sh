#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Traces tcp:tcp_cwnd_reset by tracefs, perf and bpftrace at the same time, as docs/vm.md describes, while
# known_resets.py makes resets and records them with cwndtrace. Run it in the Vagrant VM, as root:
# tests/vm/peers.sh RESETS. The last line has the number of events that each of the three saw.
set -eu
cd "$(dirname "$0")/../.."
tracing=/sys/kernel/tracing
out=$(mktemp -d)
started='' cat=''
end() {
    # A shell starts background processes with SIGINT ignored. perf and bpftrace handle it nevertheless, cat doesn't.
    for pid in $started; do
        kill -INT "$pid" 2>/dev/null || :
    done
    kill "$cat" 2>/dev/null || :
    wait
    echo 0 >$tracing/events/tcp/tcp_cwnd_reset/enable
}
trap end EXIT

echo 1 >$tracing/events/tcp/tcp_cwnd_reset/enable
cat $tracing/trace_pipe >"$out/tracefs" &
cat=$!
perf record -q -a -e tcp:tcp_cwnd_reset -o "$out/perf.data" &
started=$!
program='tracepoint:tcp:tcp_cwnd_reset {
    printf("%s %d: %u -> %u\n", comm, args->dport, args->cwnd_before, args->cwnd_after);
}'
bpftrace -B line -e "$program" >"$out/bpftrace" &
bpftrace=$!
started="$started $bpftrace"
tries=0
until grep -q Attach "$out/bpftrace"; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] && kill -0 $bpftrace || exit 1
    sleep 1
done
${PYTHON:-/opt/cwndtrace/bin/python} -m tests.vm.known_resets "$1"
end
trap - EXIT
by_perf=$(perf script -i "$out/perf.data" | grep -c reason=idle)
echo "seen: tracefs $(grep -c reason=idle "$out/tracefs"), perf $by_perf, bpftrace $(grep -c -e '->' "$out/bpftrace")"
rm -r "$out"
