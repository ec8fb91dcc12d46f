#!/usr/bin/env bash
# A SLURM of one node and a Ray cluster of two workers, on loopback, for the tests of launcher=slurm and launcher=ray.
#
#   tests/cluster/setup.sh start   install SLURM from Debian's packages where it is missing (root and apt), start both
#   tests/cluster/setup.sh stop    end what this script started
#   . /tmp/ditbench-cluster/env    what the tests want to know of it
#
# What cannot be had is said in a line and left out; its tests skip. PYTHON: whose ray is started (else python3's).
set -euo pipefail

PYTHON=${PYTHON:-python3}
HOME_OF_IT=${CLUSTER_HOME:-/tmp/ditbench-cluster}
RAY_PORT=${RAY_PORT:-6397}
say() { echo "cluster: $*" >&2; }

install_slurm() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "no SLURM: it is not installed, and that takes root and apt"; return 1; }
  { timeout 60 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 120 \
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; } >/dev/null 2>&1 \
    || { say "no SLURM: apt cannot install slurmctld, slurmd and munge"; return 1; }
}

start_slurm() {
  install_slurm || return 0
  [ "$(id -u)" = 0 ] || { say "no SLURM: its daemons want root"; return 0; }
  mkdir -p "$HOME_OF_IT"/{state,spool} /run/munge
  [ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none; }
  chown -R munge: /run/munge /etc/munge /var/lib/munge /var/log/munge
  chmod 0400 /etc/munge/munge.key
  chmod 0755 /run/munge
  munge -n >/dev/null 2>&1 || {
    su -s /bin/sh munge -c /usr/sbin/munged
    cp /run/munge/munged.pid "$HOME_OF_IT/munged.pid"
  }
  local node cores
  node=$(hostname -s)
  cores=$(nproc)
  cat >"$HOME_OF_IT/slurm.conf" <<END
ClusterName=loopback
SlurmctldHost=$node(127.0.0.1)
SlurmctldParameters=idle_on_node_suspend
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$HOME_OF_IT/state
SlurmdSpoolDir=$HOME_OF_IT/spool
SlurmctldPidFile=$HOME_OF_IT/slurmctld.pid
SlurmdPidFile=$HOME_OF_IT/slurmd.pid
SlurmctldLogFile=$HOME_OF_IT/slurmctld.log
SlurmdLogFile=$HOME_OF_IT/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=10
MinJobAge=600
NodeName=$node NodeAddr=127.0.0.1 CPUs=$cores State=UNKNOWN
PartitionName=loopback Nodes=$node Default=YES MaxTime=INFINITE State=UP
END
  export SLURM_CONF="$HOME_OF_IT/slurm.conf"
  if ! timeout 10 sinfo >/dev/null 2>&1; then
    slurmctld -c -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF"
  fi
  for _ in $(seq 30); do
    if [ "$(timeout 5 sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
      echo "export DITBENCH_TEST_SLURM=$SLURM_CONF" >>"$HOME_OF_IT/env"
      say "SLURM answers"
      return 0
    fi
    sleep 1
  done
  say "no SLURM: its node does not come up ($HOME_OF_IT/slurmctld.log, slurmd.log)"
}

start_ray() {
  "$PYTHON" -c 'import ray' 2>/dev/null || { say "no Ray: $PYTHON has none (pip install 'ditbench[ray]')"; return 0; }
  mkdir -p "$HOME_OF_IT"
  ray_node head --head --port "$RAY_PORT" --include-dashboard false --temp-dir "$HOME_OF_IT/ray"
  ray_node second --address "127.0.0.1:$RAY_PORT"
  local until=$((SECONDS + 60))
  while [ $SECONDS -lt $until ]; do
    if timeout 20 "$PYTHON" -m ray.scripts.scripts status --address "127.0.0.1:$RAY_PORT" 2>/dev/null | grep -q '/2.0 CPU'; then
      echo "export DITBENCH_TEST_RAY=127.0.0.1:$RAY_PORT" >>"$HOME_OF_IT/env"
      say "Ray answers"
      return 0
    fi
    sleep 1
  done
  say "no Ray: it does not start ($HOME_OF_IT/ray-*.log)"
}

# With --block the process that starts a node stays, and ends all of the node when it is ended: nobody else's Ray is touched.
ray_node() {
  local name=$1
  shift
  [ -s "$HOME_OF_IT/ray-$name.pid" ] && kill -0 "$(cat "$HOME_OF_IT/ray-$name.pid")" 2>/dev/null && return 0
  RAY_USAGE_STATS_ENABLED=0 setsid "$PYTHON" -m ray.scripts.scripts start --block --node-ip-address 127.0.0.1 --num-cpus 1 \
    --object-store-memory 100000000 "$@" </dev/null >"$HOME_OF_IT/ray-$name.log" 2>&1 &
  echo $! >"$HOME_OF_IT/ray-$name.pid"
  sleep 3
}

stop() {
  [ -d "$HOME_OF_IT" ] || return 0
  : >"$HOME_OF_IT/env"
  for name in ray-second ray-head slurmd slurmctld munged; do
    [ -s "$HOME_OF_IT/$name.pid" ] && kill "$(cat "$HOME_OF_IT/$name.pid")" 2>/dev/null || true
    rm -f "$HOME_OF_IT/$name.pid"
  done
}

case "${1:-}" in
  start)
    mkdir -p "$HOME_OF_IT"
    : >"$HOME_OF_IT/env"
    start_slurm
    start_ray
    ;;
  stop) stop ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
