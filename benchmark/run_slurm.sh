#!/usr/bin/env bash
# Submits a list of commands to SLURM, an array job of a task a run; the same command submits again what is unfinished.
#
#   benchmark/run_slurm.sh campaign.txt [--throttle N] [--time LIMIT] [--mem SIZE] [--cpus N] [--retry-failed]
#                                       [-- options of sbatch]
#
#   --throttle N   runs at a time (default: 100)
#   --time LIMIT   of one run, as sbatch has it (default: 08:00:00); a longer run saves itself two minutes before and is
#                  requeued
#   --mem SIZE     of one run (default: 5G, enough for Humanoid-v5)
#   --cpus N       of one run (default: 1)
#   --retry-failed submits runs again that failed
#
# Call it where the scripts and runs/ are, in a shared folder, with the virtual environment active: jobs inherit both.
# Lines whose run is finished (runs/NAME/actor.pt) are left out. A preempted or cancelled run saves itself, if its episode
# ends within the cluster's KillWait (30 seconds by default); SLURM requeues the preempted one. Logs and failures are as
# run_local.sh's: campaign.txt.logs/NAME.log and campaign.txt.failed, and what SLURM says of a job in campaign.txt.slurm.
# The exit status is 1 if any run failed before and is not submitted again.
set -euo pipefail

fail() { echo "run_slurm.sh: $1" >&2; exit 2; }

list="" throttle=100 time=08:00:00 mem=5G cpus=1 retry="" extra=()
while (($#)); do
  case $1 in
    --throttle | --time | --mem | --cpus)
      (($# > 1)) || fail "$1: needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    --retry-failed) retry=1 ;;
    --) shift; extra=("$@"); break ;;
    -h | --help) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit ;;
    -*) fail "$1: no such option; see --help" ;;
    *) [[ -z $list ]] || fail "$1: one list at a time"; list=$1 ;;
  esac
  shift
done
[[ -f $list && -r $list ]] || fail "${list:-LIST}: must be a readable list of commands, as benchmark/campaign.sh prints it"
for flag in throttle cpus; do [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag ${!flag}: must be a positive number"; done
command -v sbatch >/dev/null || fail "sbatch is not there: SLURM's commands must be on the PATH"

exec 9>>"$list.lock"
flock -n 9 || fail "$list: already being run, by run_local.sh, or being submitted"
: >"$list.lock"
name=klac-$(realpath "$list" | cksum | cut -d' ' -f1)
queued=$(squeue --me --noheader --array --name "$name" --format %i) || fail "squeue does not answer"
[[ -z $queued ]] || fail "$list: already submitted, $(wc -l <<<"$queued") runs are queued or running (scancel --name $name)"

name_of() { sed -n 's/.*--run-name[= ] *\([^ ]*\).*/\1/p' <<<"$1"; }
logs=$list.logs failed=$list.failed todo=()
mkdir -p "$logs"
touch "$failed"
declare -A seen=()
while IFS= read -r line; do
  run=$(name_of "$line")
  [[ -n $run ]] || fail "$list: a line without --run-name: $line"
  [[ $run != *[\'\"\\]* ]] || fail "$list: --run-name $run: must be without quotes and spaces"
  [[ -z ${seen[$run]-} ]] || fail "$list: two lines of --run-name $run"
  seen[$run]=1
  [[ -e runs/$run/actor.pt ]] && continue
  [[ -z $retry ]] && grep -qxF "$run" "$failed" || todo+=("$line")
done < <(tr -d '\r' <"$list" | grep -v '^ *\(#\|$\)')
total=$(tr -d '\r' <"$list" | grep -vc '^ *\(#\|$\)') || fail "$list: holds no command"
# Forget the failures that are tried again, were since finished by hand, or are no longer in the list
mapfile -t before <"$failed"
for run in "${before[@]}"; do [[ -z ${seen[$run]-} || -n $retry || -e runs/$run/actor.pt ]] || echo "$run"; done >"$failed"
echo "${#todo[@]} runs to do, of $total"

# A task of the array: its line's run, its output to its log; its name to the list of failures unless a signal stopped it
one() {
  local line=${lines[SLURM_ARRAY_TASK_ID]} run code=0 late=""
  run=$(name_of "$line")
  bash -c "exec env GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1} $line" >>"$logs/$run.log" 2>&1 &
  trap : TERM # SLURM sends it to the run as well, which saves itself
  trap 'late=1; kill -TERM $! 2>/dev/null' USR1 # the time limit is near, and only this shell is told
  wait $! || code=$?
  # a signal ends the first wait and not the run
  while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done
  ((code == 0 || code > 128)) || echo "$run" >>"$failed"
  echo "$(date +%FT%T) $run: $( ((code == 0)) && echo finished || echo "exit code $code")${late:+, requeued at the time limit}"
  [[ -n $late && $code -gt 128 ]] && scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  return $code
}
# An array has at most so many tasks; the next one waits for it, so that the throttle is the campaign's
size=$(($(scontrol show config | sed -n 's/^MaxArraySize *= *//p') - 1)) after=""
((size > 0)) || fail "this cluster allows no array jobs: its MaxArraySize is $((size + 1))"
for ((start = 0; start < ${#todo[@]}; start += size)); do
  lines=("${todo[@]:start:size}")
  # SLURM keeps a copy of the script, and with it of the list
  job=$({
    echo '#!/usr/bin/env bash'
    declare -p lines logs failed
    declare -f name_of one
    echo "export OMP_NUM_THREADS=$cpus"
    echo one
  } | sbatch --parsable --job-name "$name" --array "0-$((${#lines[@]} - 1))%$throttle" --ntasks 1 --cpus-per-task "$cpus" \
    --mem "$mem" --time "$time" --signal B:USR1@120 --requeue --output "$list.slurm" --open-mode append \
    ${after:+--dependency "$after"} "${extra[@]}") || fail "sbatch refused, see above; what was submitted before goes on"
  echo "submitted job $job: ${#lines[@]} runs, $throttle at a time (squeue --name $name)"
  after=afterany:${job%%;*}
done
if [[ -s $failed ]]; then
  echo "failed (see $logs/NAME.log; --retry-failed submits them again):" >&2
  sort -u "$failed" >&2
  exit 1
fi
