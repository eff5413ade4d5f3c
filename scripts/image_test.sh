#!/usr/bin/env bash
# Builds the image for real, runs it once and proves what deploy.md says of it; prints its figures. Opt-in: `make image-test`.
#
#   RUNTIME=cpu|gpu   which image (default cpu)        PYTHON=python3   whose pip downloads the wheels
#   KEEP=1            leave the built image in a running Docker (only where Docker was running already)
#
# Uses the Docker daemon that runs; where none does, and we are root on Debian, installs and starts one of its own in a scratch folder.
# The build has no network: all wheels come from a wheelhouse that this machine's pip fills, as in an air-gapped build.
# Where no registry can be reached, a stand-in for the base image is made from this machine's own Debian mirror.
# Ends everything it started.
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
  "$PYTHON" scripts/image_requirements.py "$RUNTIME" pyproject.toml > "$SCRATCH/requirements.txt"
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --python-version 3.11 --implementation cp \
    --dest "$SCRATCH/context/wheelhouse" -r "$SCRATCH/requirements.txt" "${EXTRA_WHEELS[@]}" > "$SCRATCH/pip.log" 2>&1 ||
    { tail -5 "$SCRATCH/pip.log" >&2; die "pip could not fill the wheelhouse"; }
}

build() {
  docker buildx version > /dev/null 2>&1 && [ -z "$DAEMON_PID" ] || export DOCKER_BUILDKIT=0
  docker build --network none --build-arg BASE="$BASE" --build-arg RUNTIME="$RUNTIME" --tag "$IMAGE" "$SCRATCH/context" > "$SCRATCH/build.log" 2>&1 ||
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

http() { "$PYTHON" scripts/image_http.py "$@"; }
inside() { docker exec "$NAME" "$@"; }
health() { docker inspect --format '{{.State.Health.Status}}' "$NAME"; }
becomes_healthy() {
  for _ in $(seq 60); do
    [ "$(health)" = healthy ] && return
    sleep 0.5
  done
  docker inspect --format '{{json .State.Health}}' "$NAME"
  return 1
}
exit_code() { docker inspect --format '{{.State.ExitCode}}' "$1"; }

start_docker
get_base
started=$(now); make_context; wheels_s=$(seconds_since "$started")
started=$(now); build; build_s=$(seconds_since "$started")
say "built $IMAGE on $BASE_KIND"
