#!/usr/bin/env bash
# Builds the image for real, runs it once and proves what deploy.md says of it; prints its figures. Opt-in: `make image-test`.
#
#   RUNTIME=cpu|gpu   which image (default cpu)        PYTHON=python3   whose pip downloads the wheels
#   MODEL=FILE        a detector of yours instead of the one that ships
#   KEEP=1            leave the built image in a running Docker (only where Docker was running already)
#
# Uses the Docker daemon that runs; where none does, and we are root on Debian, installs and starts one of its own in a scratch folder.
# The build has no network: all wheels come from a wheelhouse that this machine's pip fills, as in an air-gapped build.
# Where no registry can be reached, a stand-in for the base image is made from this machine's own Debian mirror.
# Ends everything it started; only the stand-in's files stay, in the user's cache folder (190 MB).
set -euo pipefail
cd "$(dirname "$0")/.."

RUNTIME=${RUNTIME:-cpu}
PYTHON=${PYTHON:-python3}
BASE=$(sed -n 's/^ARG BASE=//p' Dockerfile)
STAND_IN=onset-image-test-base:latest
IMAGE=onset-image-test:$RUNTIME
NAME=onset-image-test-$$
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/onset-image-test
SCRATCH=$(mktemp -d -t onset-image-XXXXXX)
DAEMON_PID=
EXTRA_WHEELS=('hatchling>=1.27')
FAILURES=0

say() { printf '%s\n' "$*"; }
die() { printf 'image-test: %s\n' "$*" >&2; exit 1; }
seconds_since() { "$PYTHON" -c "import sys, time; print(f'{time.time() - float(sys.argv[1]):.2f}')" "$1"; }
now() { date +%s.%N; }
megabytes() { echo $(($1 / 1000000)); }
check() { # check SENTENCE COMMAND...: the sentence is true when the command succeeds
  local sentence=$1
  shift
  if "$@" > "$SCRATCH/check.log" 2>&1; then say "  ok    $sentence"; else
    say "  FAIL  $sentence"
    sed 's/^/        /' "$SCRATCH/check.log" | tail -20
    FAILURES=$((FAILURES + 1))
  fi
}
fails() { ! "$@"; }
equals() { if [ "$1" != "$2" ]; then echo "$1, not $2"; return 1; fi; }

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  docker rm --force --volumes "$NAME" "$NAME-b" "$NAME-store" > /dev/null 2>&1 || true
  if [ -n "$DAEMON_PID" ]; then
    kill "$DAEMON_PID" 2> /dev/null || true
    wait "$DAEMON_PID" 2> /dev/null || true
    umount "$SCRATCH/exec/netns/default" 2> /dev/null || true
  elif [ -z "${KEEP:-}" ]; then
    docker rmi "$IMAGE" "$STAND_IN" > /dev/null 2>&1 || true
  fi
  rm -rf "$SCRATCH"
  exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

install_packages() { # install_packages PACKAGE...: by apt, if this is Debian and we are root
  [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null || die "needs a running Docker, or root on Debian to start one ($* missing)"
  apt-get install --yes --no-install-recommends "$@" > "$SCRATCH/apt.log" 2>&1 || { tail -5 "$SCRATCH/apt.log" >&2; die "apt-get could not install $*"; }
}

start_docker() {
  if docker info > /dev/null 2>&1; then
    say "docker: the daemon that runs here"
    return
  fi
  command -v dockerd > /dev/null && command -v iptables > /dev/null || install_packages docker.io iptables
  export DOCKER_HOST=unix://$SCRATCH/docker.sock
  dockerd --data-root "$SCRATCH/root" --exec-root "$SCRATCH/exec" --host "$DOCKER_HOST" --pidfile "$SCRATCH/docker.pid" \
    --bridge=none --iptables=false > "$SCRATCH/dockerd.log" 2>&1 &
  DAEMON_PID=$!
  for _ in $(seq 60); do
    docker info > /dev/null 2>&1 && break
    kill -0 "$DAEMON_PID" 2> /dev/null || { tail -5 "$SCRATCH/dockerd.log" >&2; die "dockerd ended"; }
    sleep 0.5
  done
  say "docker: its own dockerd $(docker version --format '{{.Server.Version}}'), process $DAEMON_PID"
}

# The base image, from its registry or, where none is in reach, Debian's own Python 3.11 in its place: good for building and running, not for size claims.
get_base() {
  if docker image inspect "$BASE" > /dev/null 2>&1 || timeout 120 docker pull --quiet "$BASE" > /dev/null 2>&1; then
    BASE_KIND="$BASE"
    return
  fi
  BASE_KIND="stand-in for $BASE made by debootstrap"
  local tree=$CACHE/bookworm.tar
  if [ ! -s "$tree" ]; then
    command -v debootstrap > /dev/null || install_packages debootstrap
    local mirror
    mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' | awk '$2 == "bookworm" && $3 == "main" {print $1; exit}')
    [ -n "$mirror" ] || die "apt names no mirror of Debian bookworm"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$SCRATCH/rootfs" "$mirror" > "$SCRATCH/debootstrap.log" 2>&1 ||
      { tail -5 "$SCRATCH/debootstrap.log" >&2; die "debootstrap failed"; }
    ln -s python3 "$SCRATCH/rootfs/usr/bin/python"
    rm -rf "$SCRATCH"/rootfs/var/cache/apt/archives/*.deb "$SCRATCH"/rootfs/var/lib/apt/lists/*
    mkdir -p "$CACHE"
    tar -C "$SCRATCH/rootfs" -cf "$tree.part" . && mv "$tree.part" "$tree"
    rm -rf "$SCRATCH/rootfs"
  fi
  docker import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' "$tree" "$STAND_IN" > /dev/null
  BASE=$STAND_IN
  # pip resolves markers for the Python it runs on; Debian's 3.11.2 needs one wheel more (redis: python_full_version < "3.11.3").
  EXTRA_WHEELS+=(async-timeout)
}

# The files of this checkout as they are now, and beside them every wheel that the build will ask for.
make_context() {
  mkdir -p "$SCRATCH/context/wheelhouse"
  git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -cf - -T - 2> /dev/null | tar -xf - -C "$SCRATCH/context"
  make --no-print-directory console > "$SCRATCH/console.log" 2>&1 || { tail -5 "$SCRATCH/console.log" >&2; die "the console could not be built"; }
  [ -e service/console/dist/index.html ] || die "without npm there is no console to put into the image"
  cp -R service/console/dist "$SCRATCH/context/service/console/dist"
  "$PYTHON" scripts/image_requirements.py "$RUNTIME" pyproject.toml > "$SCRATCH/requirements.txt"
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version 3.11 --implementation cp \
    --dest "$SCRATCH/context/wheelhouse" -r "$SCRATCH/requirements.txt" "${EXTRA_WHEELS[@]}" > "$SCRATCH/pip.log" 2>&1 ||
    { tail -5 "$SCRATCH/pip.log" >&2; die "pip could not fill the wheelhouse"; }
}

build() {
  docker buildx version > /dev/null 2>&1 && [ -z "$DAEMON_PID" ] || export DOCKER_BUILDKIT=0
  docker build --network none --build-arg BASE="$BASE" --build-arg NODE="$BASE" --build-arg RUNTIME="$RUNTIME" --tag "$IMAGE" "$SCRATCH/context" > "$SCRATCH/build.log" 2>&1 ||
    { tail -30 "$SCRATCH/build.log" >&2; die "the build failed"; }
}

free_port() { "$PYTHON" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"; }

# As Kubernetes and docker-compose.yml run it: read-only root, no capabilities, no new privileges, bounded.
run_service() { # run_service NAME PORT [DOCKER OPTION...]
  local name=$1 port=$2
  shift 2
  docker run --detach --name "$name" --network host --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --memory 1g --pids-limit 256 \
    --env ONSET_HOST=127.0.0.1 --env ONSET_PORT="$port" "$@" "$IMAGE" > /dev/null
}

client() { "$PYTHON" scripts/image_client.py "$@"; }
inside() { docker exec "$NAME" "$@"; }
state() { docker inspect --format "$1" "${2:-$NAME}"; }
becomes_healthy() {
  for _ in $(seq 60); do
    [ "$(state '{{.State.Health.Status}}')" = healthy ] && return
    sleep 0.5
  done
  state '{{json .State.Health}}'
  return 1
}

start_docker
get_base
started=$(now); make_context; wheels_s=$(seconds_since "$started")
started=$(now); build; build_s=$(seconds_since "$started")
say "built $IMAGE on $BASE_KIND"

MODEL_OPTIONS=()
if [ -n "${MODEL:-}" ]; then MODEL_OPTIONS=(--volume "$(realpath "$MODEL"):/models/$(basename "$MODEL"):ro" --env ONSET_MODEL=/models); fi

say "with its embedded store, read-only root, no capabilities:"
port=$(free_port)
started=$(now)
run_service "$NAME" "$port" "${MODEL_OPTIONS[@]}"
check "it becomes ready" client ready "$port" 60
ready_s=$(seconds_since "$started")
check "it answers a first event with state_version 1" client post "$port" image-test/a 1
check "Docker's health check finds it healthy" becomes_healthy
check "and would find a service that is not there unhealthy" fails docker exec --env ONSET_PORT=1 "$NAME" python -I /opt/onset/healthcheck.py
check "it runs as user 10001" equals "$(inside id -u)" 10001
check "its process 1 is the service" equals "$(inside cat /proc/1/cmdline | tr '\0' ' ')" "python -m service serve "
check "it cannot write its own code" fails inside touch /opt/onset/x
check "torch is not in it" inside python -c "import importlib.util as u; assert u.find_spec('torch') is None"
check "training is not in it" inside python -c "import importlib.util as u; assert u.find_spec('training') is None"
check "exactly one ONNX Runtime is in it" inside python -c "
import importlib.metadata as m
names = sorted({d.name for d in m.distributions() if d.name.startswith('onnxruntime')})
assert len(names) == 1, names"
memory=$(inside sh -c 'awk "/^VmRSS/ {print \$2 * 1024}" /proc/1/status')
started=$(now)
docker stop --time 30 "$NAME" > /dev/null
stop_s=$(seconds_since "$started")
check "SIGTERM drains and ends it with 0" equals "$(state '{{.State.ExitCode}}')" 0
docker start "$NAME" > /dev/null
check "started again, it becomes ready" client ready "$port" 60
check "and goes on where the stream was: state_version 2" client post "$port" image-test/a 2
docker kill --signal KILL "$NAME" > /dev/null
docker start "$NAME" > /dev/null
check "killed with -9 and started again, it becomes ready" client ready "$port" 60
check "and goes on where the stream was: state_version 3" client post "$port" image-test/a 3
docker stop --time 30 "$NAME" > /dev/null

say "two replicas on one store, as in Kubernetes (no data folder):"
store_port=$(free_port)
docker run --detach --name "$NAME-store" --network host --read-only --tmpfs /tmp --entrypoint python "$IMAGE" -c "
import os
from service.embedded import find_server
server = find_server()
os.execv(server, [server, '--port', '$store_port', '--bind', '127.0.0.1', '--dir', '/tmp', '--save', ''])" > /dev/null
docker rm --force --volumes "$NAME" > /dev/null
replica=(--tmpfs /data:ro --env ONSET_REDIS_URL="redis://127.0.0.1:$store_port/0" "${MODEL_OPTIONS[@]}")
other=$(free_port)
run_service "$NAME" "$port" "${replica[@]}"
run_service "$NAME-b" "$other" "${replica[@]}"
check "the first becomes ready" client ready "$port" 60
check "the second becomes ready" client ready "$other" 60
check "the first scores a stream's first event" client post "$port" image-test/b 1
check "the second scores the same stream's second" client post "$other" image-test/b 2
check "the first scores its third" client post "$port" image-test/b 3
docker stop --time 30 "$NAME-store" > /dev/null
check "without the store the first is not ready" client not-ready "$port" 15
check "but live" inside python -I /opt/onset/healthcheck.py /health/live
docker start "$NAME-store" > /dev/null
check "and ready again once the store is back" client ready "$port" 30
check "and scores again, though the store came back empty" client post "$port" image-test/b 1
docker stop --time 30 "$NAME" "$NAME-b" > /dev/null
check "both end with 0" equals "$(state '{{.State.ExitCode}}') $(state '{{.State.ExitCode}}' "$NAME-b")" "0 0"

size=$(docker image inspect --format '{{.Size}}' "$IMAGE")
base_size=$(docker image inspect --format '{{.Size}}' "$BASE")
wheels=$(du -sb "$SCRATCH/context/wheelhouse" | cut -f1)
say "figures (runtime $RUNTIME, base: $BASE_KIND):"
say "  image            $(megabytes "$size") MB, of which base $(megabytes "$base_size") MB, ours $(megabytes $((size - base_size))) MB"
say "  wheelhouse       $(megabytes "$wheels") MB, filled in $wheels_s s"
say "  build            $build_s s, without a network"
say "  start to ready   $ready_s s (docker run until /health/ready answers 200)"
say "  resident memory  $(megabytes "$memory") MB after the first event"
say "  docker stop      $stop_s s"
if [ "$FAILURES" -gt 0 ]; then die "$FAILURES checks failed"; fi
say "image-test: all checks passed"
