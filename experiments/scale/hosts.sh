#!/usr/bin/env bash
# Several "hosts" on one Linux machine, to try a cluster's setup and its failures. Needs root, iproute2 and util-linux.
#
#     experiments/scale/hosts.sh up N [FOLDER]  # hosts h1 ... hN, 10.77.0.1 ... 10.77.0.N; all see FOLDER as /root/shared
#     experiments/scale/hosts.sh on h1 COMMAND  # a shell command in /root/work on a host
#     experiments/scale/hosts.sh cut h3         # take its link down; `join h3` takes it up again
#     experiments/scale/hosts.sh down           # end all processes of the hosts and remove them
#
# A host has its own network, processes, name, /tmp, /root and /dev/shm, all of them empty. It sees the rest of the file
# system, this repository as /mnt/code, and the folder of the Python that runs (PYTHON, or python3 of the PATH).
set -euo pipefail
state=/run/latent_tts_hosts bridge=ltts_bridge
code=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}

add_host() { # number, shared folder
    local name=h$1 address=10.77.0.$1 base venv process
    base=$("$python" -c 'import sys; print(sys.base_prefix)') venv=$("$python" -c 'import sys; print(sys.prefix)')
    ip netns add "ltts_$name"
    ip link add "ltts_$name" type veth peer name eth0 netns "ltts_$name"
    ip link set "ltts_$name" master $bridge up
    ip -n "ltts_$name" addr add "$address/24" dev eth0
    ip -n "ltts_$name" link set eth0 up
    ip -n "ltts_$name" link set lo up
    # what a fresh /tmp or /root would hide is mounted again in its place
    ip netns exec "ltts_$name" unshare --mount --propagation private --uts --pid --ipc --fork --mount-proc \
        --kill-child bash -euc '
        hostname "$1"
        mount -t tmpfs tmpfs /mnt
        mkdir /mnt/code /mnt/base /mnt/venv /mnt/shared
        mount --bind "$3" /mnt/code; mount --bind "$4" /mnt/base; mount --bind "$5" /mnt/venv
        [ -z "$6" ] || mount --bind "$6" /mnt/shared
        for folder in /tmp /root /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
        mkdir -p /root/work /root/shared "$4" "$5"
        mount --bind /mnt/base "$4"; mount --bind /mnt/venv "$5"; mount --bind /mnt/shared /root/shared
        printf "127.0.0.1 localhost\n%s %s\n" "$2" "$1" > /mnt/hosts
        mount --bind /mnt/hosts /etc/hosts
        touch /mnt/ready
        exec sleep infinity' bash "$name" "$address" "$code" "$base" "$venv" "$2" < /dev/null > /dev/null 2>&1 &
    until process=$(pgrep -P $!) && [ -e "/proc/$process/root/mnt/ready" ]; do
        kill -0 $! # it has not failed
        sleep 0.1
    done
    echo "$process" > "$state/$name"
    echo "$venv/bin" > "$state/path"
}

case ${1:-} in
    up)
        mkdir -p $state
        ip link add $bridge type bridge
        ip link set $bridge up
        for number in $(seq 1 "$2"); do add_host "$number" "${3:-}"; done
        ;;
    on)
        exec nsenter -t "$(cat "$state/$2")" -m -u -n -p -i env -i PATH="$(cat $state/path):/usr/sbin:/usr/bin:/sbin:/bin" \
            HOME=/root TERM=dumb OMP_NUM_THREADS=1 PYTHONPATH=/mnt/code/src RAY_USAGE_STATS_ENABLED=0 \
            bash -c "cd /root/work && ${*:3}"
        ;;
    cut) ip link set "ltts_$2" down ;;
    join) ip link set "ltts_$2" up ;;
    down)
        for host in "$state"/h*; do
            kill -9 "$(cat "$host")" || true
            ip netns del "ltts_$(basename "$host")"
        done
        ip link del $bridge
        rm -r $state
        ;;
    *) sed -n '2,10p' "$0" ;;
esac
