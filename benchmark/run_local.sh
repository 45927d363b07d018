#!/usr/bin/env bash
# Runs a list of commands on this machine through GNU parallel, one thread each; the same command goes on where it stopped.
#
#   benchmark/run_local.sh campaign.txt [--workers N] [--retry-failed] [-- options of GNU parallel]
#
# Lines whose run is finished (runs/NAME/actor.pt) are left out. A run that fails is named and not tried again until
# --retry-failed. Logs are in campaign.txt.logs/NAME.log, GNU parallel's own in campaign.txt.joblog, failures in
# campaign.txt.failed. Ctrl-C lets every run save itself. The exit status is 1 if any run failed or was killed, 130 after
# Ctrl-C.
set -euo pipefail

fail() { echo "run_local.sh: $1" >&2; exit 2; }

list="" workers=$(env -u OMP_NUM_THREADS nproc) retry="" extra=()
while (($#)); do
  case $1 in
    --workers) (($# > 1)) || fail "--workers: needs a number"; workers=$2; shift ;;
    --retry-failed) retry=1 ;;
    --) shift; extra=("$@"); break ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
    -*) fail "$1: no such option; see --help" ;;
    *) [[ -z $list ]] || fail "$1: one list at a time"; list=$1 ;;
  esac
  shift
done
[[ -f $list && -r $list ]] || fail "${list:-LIST}: must be a readable list of commands, as benchmark/campaign.sh prints it"
[[ $workers =~ ^[1-9][0-9]*$ ]] || fail "--workers $workers: must be a positive number"
[[ $(parallel --version 2>/dev/null) == "GNU parallel"* ]] || fail "GNU parallel is not installed (Debian: apt install parallel)"
exec 9>>"$list.lock" # inherited by every run: what a killed driver left going is not run twice
flock -n 9 || { session=$(<"$list.lock"); fail "$list: already being run${session:+ (to stop it: pkill -s $session 'parallel|python')}"; }
: >"$list.lock"

name_of() { sed -n 's/.*--run-name[= ] *\([^ ]*\).*/\1/p' <<<"$1"; }
logs=$list.logs failed=$list.failed todo=()
mkdir -p "$logs"
touch "$failed"
declare -A seen=()
BEFORE=0
while IFS= read -r line; do
  name=$(name_of "$line")
  [[ -n $name ]] || fail "$list: a line without --run-name: $line"
  [[ $name != *[\'\"\\]* ]] || fail "$list: --run-name $name: must be without quotes and spaces"
  [[ -z ${seen[$name]-} ]] || fail "$list: two lines of --run-name $name"
  seen[$name]=1
  if [[ -e runs/$name/actor.pt ]]; then
    ((++BEFORE))
  elif [[ -n $retry ]] || ! grep -qxF "$name" "$failed"; then
    todo+=("$line")
  fi
done < <(tr -d '\r' <"$list" | grep -v '^ *\(#\|$\)')
total=$(tr -d '\r' <"$list" | grep -vc '^ *\(#\|$\)') || fail "$list: holds no command"
# Forget the failures that are tried again, were since finished by hand, or are no longer in the list
mapfile -t before <"$failed"
for name in "${before[@]}"; do [[ -z ${seen[$name]-} || -n $retry || -e runs/$name/actor.pt ]] || echo "$name"; done >"$failed"
echo "${#todo[@]} runs to do, of $total"
NAMES=$logs/.names # a file: an environment holds 128 KiB a variable
for line in "${todo[@]}"; do name_of "$line"; done >"$NAMES"

# How many runs of the list are finished, and at the pace of those of this call how long the others take
progress() {
  local name finished=0 left=""
  while read -r name; do [[ -e runs/$name/actor.pt ]] && ((++finished)); done <"$NAMES"
  local minutes=$((($(date +%s) - START) * (TODO - finished) / (finished ? finished : 1) / 60))
  ((finished)) && left=", $((minutes / 60)) h $((minutes % 60)) min left"
  echo "$((BEFORE + finished))/$TOTAL finished$left"
}

# A run of the list: its output to its log; its name to the list of failures unless it was stopped by a signal
one() {
  local name code=0
  name=$(name_of "$1")
  # in the background and waited for, so that a signal reaches the run at once; memory in huge pages is faster
  bash -c "exec env GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1} $1" >>"$LOGS/$name.log" 2>&1 &
  trap : TERM INT # parallel sends it to the run as well, which saves itself: a second one would end it at once
  wait $! || code=$?
  # a signal ends the first wait and not the run
  while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done
  ((code == 0 || code > 128)) || echo "$name" >>"$FAILED"
  echo "$(date +%T) $name: $(((code == 0)) && echo finished || echo "exit code $code"); $(progress)"
  return $code
}
export -f one name_of progress
export LOGS=$logs FAILED=$failed NAMES BEFORE TOTAL=$total TODO=${#todo[@]} OMP_NUM_THREADS=1
START=$(date +%s)
export START
stopped=0
if ((${#todo[@]})); then
  trap 'stopped=1' INT TERM
  # parallel is in the background for the traps to run; ten minutes for every run to save itself, then no mercy
  printf '%s\n' "${todo[@]}" | setsid parallel --jobs "$workers" --joblog "+$list.joblog" --line-buffer \
    --termseq TERM,600000,KILL,25 "${extra[@]}" one &
  echo $! >"$list.lock" # parallel leads a session of its own
  while kill -0 $! 2>/dev/null; do
    wait $! || true
    if ((stopped == 1)); then
      echo "run_local.sh: stopping, every run saves itself; the same command goes on" >&2
      # the second one stops the runs; too soon after the first, the two would be one
      kill -TERM $! && sleep 1 && kill -TERM $! && stopped=2
    fi
  done
fi
killed=()
for line in "${todo[@]}"; do
  name=$(name_of "$line")
  [[ -e runs/$name/actor.pt ]] || grep -qxF "$name" "$failed" || killed+=("$name")
done
if [[ -s $failed ]]; then
  echo "failed (see $logs/NAME.log; --retry-failed tries them again):" >&2
  sort -u "$failed" >&2
fi
((stopped)) && exit 130
((${#killed[@]} == 0)) || printf '%s\n' "killed (the same command goes on with them):" "${killed[@]}" >&2
[[ ! -s $failed && ${#killed[@]} == 0 ]]
