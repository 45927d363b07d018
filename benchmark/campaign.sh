#!/usr/bin/env bash
# Prints the paper's campaign, a list of complete commands, one a line; run it with run_local.sh or run_slurm.sh.
#
#   benchmark/campaign.sh [minatar|mujoco|all] [options] > campaign.txt
#
#   --seeds "1 2 3"        seeds (default: 1 to 20); they are the outermost loop, so that a part of the list is all tasks
#   --variants "SAC KLAC"  of SAC KLAC KLAC-a KLAC-b KLAC-ab (default: all five)
#   --envs "Ant-v5"        tasks among those of the suite (default: all)
#   --steps N              a shorter budget: a prefix of the paper's runs, annealed as if they went on
#   --compress             with --steps: the schedule ends with the run, the whole algorithm at a smaller budget
#   --track                send the runs to Weights & Biases
#   --dry-run              print the number of runs, the steps and the core-hours instead
#
# Core-hours are by the throughput of one thread with every core busy in results/throughput/rates.csv; tasks that were not
# measured are taken to be as fast as the one of their suite that was.
set -euo pipefail

fail() { echo "campaign.sh: $1" >&2; exit 2; }

minatar=(Breakout-v1 Asterix-v1 Seaquest-v1 Freeway-v1 SpaceInvaders-v1)
mujoco=(Hopper-v5 Walker2d-v5 HalfCheetah-v5 Ant-v5 Humanoid-v5 Swimmer-v5 InvertedPendulum-v5 Reacher-v5)
all_variants="SAC KLAC KLAC-a KLAC-b KLAC-ab"
suite="" seeds=$(seq 1 20) variants=$all_variants envs="" steps="" compress="" track="" dry_run=""
while (($#)); do
  case $1 in
    minatar | mujoco | all)
      [[ -z $suite ]] || fail "$1: one suite at a time; all is both"
      suite=$1
      ;;
    --seeds | --variants | --envs | --steps)
      [[ ${2-} =~ [^[:space:]] ]] || fail "$1: needs a value"
      declare "${1#--}=$2"
      shift
      ;;
    --compress) compress=1 ;;
    --track) track=" --track" ;;
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit ;;
    *) fail "$1: must be minatar, mujoco, all or an option; see --help" ;;
  esac
  shift
done

suite=${suite:-all} tasks=()
[[ $suite != mujoco ]] && tasks+=("${minatar[@]}")
[[ $suite != minatar ]] && tasks+=("${mujoco[@]}")
for env in $envs; do [[ " ${tasks[*]} " == *" $env "* ]] || fail "--envs $env: must be among ${tasks[*]}"; done
for variant in $variants; do [[ " $all_variants " == *" $variant "* ]] || fail "--variants $variant: must be among $all_variants"; done
for seed in $seeds; do [[ $seed =~ ^(0|[1-9][0-9]{0,8})$ ]] || fail "--seeds $seed: must be numbers"; done
[[ -z $steps || $steps =~ ^[1-9][0-9]{0,11}$ ]] || fail "--steps $steps: must be a positive number"
[[ -z $compress || -n $steps ]] || fail "--compress: needs --steps: the paper's budget is not compressed"

list() {
  for seed in $seeds; do
    for env in ${envs:-${tasks[*]}}; do
      kind=continuous budget=1000000
      [[ " ${minatar[*]} " == *" $env "* ]] && kind=discrete budget=3000000
      for variant in $variants; do
        flags=""
        case $variant in KLAC-a) flags=" --no-anneal" ;; KLAC-b) flags=" --no-bias" ;; KLAC-ab) flags=" --no-bias --no-anneal" ;; esac
        [[ -n $steps && -z $compress && ($variant == KLAC || $variant == KLAC-b) ]] && flags+=" --anneal-timesteps $budget"
        script=klac_$kind.py
        [[ $variant == SAC ]] && script=sac_$kind.py
        echo "python $script --env-id $env$flags --total-timesteps ${steps:-$budget} --seed $seed$track" \
          "--run-name ${env}__${variant}__$seed${steps:+-$steps}${compress:+-compressed} --resume"
      done
    done
  done | awk '!seen[$0]++'
}

if [[ -z $dry_run ]]; then
  list
else
  rates=$(dirname "$0")/../results/throughput/rates.csv
  [[ -r $rates ]] || fail "--dry-run: needs the repository, whose results/throughput/rates.csv is not here"
  list | awk -v FS=' ' -v rates="$rates" '
    BEGIN { while ((getline line < rates) > 0) { split(line, x, ","); if (x[3] == "2x1") rate[x[2]] = x[4] / 2 } }
    { script = $2; sub(/\.py$/, "", script); if (!(script in rate)) { missing = script; exit }
      for (i = 1; i <= NF; i++) if ($i == "--total-timesteps") n = $(i + 1)
      runs++; total += n; hours += n / rate[script] / 3600 }
    END { if (missing) { print "campaign.sh: --dry-run: " rates " has no 2x1 rate of " missing >"/dev/stderr"; exit 2 }
      printf "%d runs, %.0f steps, %.0f core-hours\n", runs, total, hours }'
fi
