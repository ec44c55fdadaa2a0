#!/usr/bin/env bash
# A training on two hosts, which are two network namespaces of this machine with a cable (veth) between them.
#
#     bash benchmarks/two_hosts.sh [FOLDER]
#
# Each host has one process, started by its own torchrun. The second host's process is killed in the middle; both go on
# from the last checkpoint, which only the first host has, and must end with the bits of a run that was not disturbed.
# Exit code 0: "two hosts: equal" was printed. 77: not possible here, with the reason on stderr. Needs root.
set -euo pipefail

here="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:-$(mktemp -d)}"
one="rk$$a" two="rk$$b"
python="${PYTHON:-python3}"

skip() {
    echo "two hosts: not possible here: $1" >&2
    exit 77
}

[ "$(uname)" = Linux ] || skip "network namespaces are Linux's"
[ "$(id -u)" = 0 ] || skip "needs root"
command -v ip > /dev/null || skip "there is no command ip (iproute2)"
command -v unshare > /dev/null || skip "there is no command unshare (util-linux)"

started=()
tidy() {
    for pid in "${started[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait || true
    ip netns del "$one" 2> /dev/null || true
    ip netns del "$two" 2> /dev/null || true
}
trap tidy EXIT

ip netns add "$one" 2> /dev/null || skip "network namespaces cannot be made"
ip netns add "$two"
ip link add "$one" netns "$one" type veth peer name "$two" netns "$two" 2> /dev/null || skip "veth links cannot be made"
ip -n "$one" addr add 10.213.77.1/24 dev "$one"
ip -n "$two" addr add 10.213.77.2/24 dev "$two"
for name in "$one" "$two"; do
    ip -n "$name" link set lo up
    ip -n "$name" link set "$name" up
done

mkdir -p "$folder/results" "$folder/elsewhere"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" - "$folder" "$here" << 'END'
import importlib.util, json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
path = pathlib.Path(sys.argv[2]) / "python_tests/train/distributed/jobs.py"
spec = importlib.util.spec_from_file_location("jobs", path)
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)
run = {"folder": str(folder / "run"), "resume": True, "misfortune": ["SIGKILL", 1, 7]}
plan = [jobs.job("killed", **jobs.LIVELY, **run), jobs.job("whole", **jobs.LIVELY)]
(folder / "plan.json").write_text(json.dumps(plan))
END

# host NAMESPACE ADDRESS FIRST: its torchrun; 1 for the host of the rendezvous, whose name nobody resolves here. Gloo must be told which network to use.
host() {
    ip netns exec "$1" env GLOO_SOCKET_IFNAME="$1" OMP_NUM_THREADS=1 \
        PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" REPKERN_TIMEOUT_MINUTES=2 \
        "${@:4}" "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 3 \
        --rdzv-backend c10d --rdzv-endpoint 10.213.77.1:29400 --rdzv-id two_hosts --rdzv-conf is_host="$3" --local-addr "$2" \
        "$here/python_tests/train/distributed/worker.py" "$folder/plan.json" "$folder/results"
}

host "$one" 10.213.77.1 1 > "$folder/one.log" 2>&1 &
started+=($!)
# The second host has a disk of its own: what it writes into the folder goes elsewhere.
host "$two" 10.213.77.2 0 unshare --mount sh -c 'mount --bind "$0/elsewhere" "$0/results" && exec "$@"' "$folder" \
    > "$folder/two.log" 2>&1 &
started+=($!)
failed=0
for pid in "${started[@]}"; do wait "$pid" || failed=1; done
if [ "$failed" = 1 ]; then
    tail -n 25 "$folder/one.log" "$folder/two.log" >&2
    exit 1
fi

"$python" - "$folder" << 'END'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
killed, whole = (json.loads((folder / "results" / f"{name}.json").read_text()) for name in ("killed", "whole"))
for one, other in zip(whole, killed, strict=True):
    assert other["began"][2] == 6, other["began"]
    assert other["digest"] == one["digest"], "the bits differ"
    assert other["rows"] == one["rows"], "the rows differ"
assert not any((folder / "elsewhere").iterdir()), "the second host wrote files"
log = (folder / "one.log").read_text()
assert "another process of this run ended or cannot be reached" in log, log
print("two hosts: equal")
END
