#!/bin/bash
# Trains {run_name} under Slurm. Written by longcat slurm; change what you like.
#   submit:                  sbatch {script}
#   save and stop:           scancel --batch --signal=TERM JOB     (plain scancel kills after the cluster's KillWait)
#   save and start again:    scancel --batch --signal=USR1 JOB
{sbatch}
set -u

run={run}   # the run folder: checkpoints, exit.json, this job's log
num_nodes={num_nodes}   # nodes that train; further ones of the job stand by
max_requeues={max_requeues}   # times that the job is queued again, time limits included
max_failures={max_failures}   # starts in a row without a new checkpoint

# --- The environment of the ranks
{environment}

say() { echo "$(date '+%F %T') slurm job $SLURM_JOB_ID: $*"; }

# Name of the newest checkpoint, or none
newest_checkpoint() {
    local found=none each
    for each in "$run"/checkpoints/step-????????; do
        [ -d "$each" ] && found=${each##*/}
    done
    echo "$found"
}

# Notes a start and the newest checkpoint; a start that finds the same one again had no progress before it
failures=0 num_starts=0
note_start() {
    local job="" seen="" checkpoint
    checkpoint=$(newest_checkpoint)
    mkdir -p "$run"
    [ -f "$run/slurm.starts" ] && read -r job seen failures <"$run/slurm.starts"
    if [ "$job" = "$SLURM_JOB_ID" ] && [ "$seen" = "$checkpoint" ]; then
        failures=$((failures + 1))
    else
        failures=0
    fi
    echo "$SLURM_JOB_ID $checkpoint $failures" >"$run/slurm.starts"
    if [ "$failures" -ge "$max_failures" ]; then
        say "gives up: $failures starts in a row made no checkpoint after $checkpoint; see this log and $run/exit.json"
        exit 1
    fi
    num_starts=$((num_starts + 1))
    say "start on $1, newest checkpoint: $checkpoint"
}

# The first $num_nodes nodes of the job that answer and are not barred, separated by commas; fails if there are fewer
bad_nodes=" "
usable_nodes() {
    local found=() node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        [[ $bad_nodes == *" $node "* ]] && continue
        [ "${#found[@]}" -lt "$num_nodes" ] || break
        timeout 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --quiet true && found+=("$node")
    done
    [ "${#found[@]}" -eq "$num_nodes" ] && (IFS=,; echo "${found[*]}")
}

# Ends this start of the job and queues it again; Slurm then starts this script anew, perhaps on other nodes
requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
        say "not queued again after $max_requeues times: $1"
        exit "$2"
    fi
    say "queued again: $1"
    trap 'exit 0' TERM   # Slurm ends this script
    trap '' ALRM USR1
    if scontrol requeue "$SLURM_JOB_ID"; then
        sleep 300 &
        wait "$!"
    fi
    say "cannot be queued again; start it with: sbatch {script}"
    exit "$2"
}

# --- Signals: USR1 comes {signal_seconds} s before the time limit, TERM at scancel and at preemption. The ranks save and stop
asked=""
# shellcheck disable=SC2317   # called by the traps
ask() {
    asked=$1
    say "$1: the ranks save and stop"
    squeue --steps --noheader --job="$SLURM_JOB_ID" --format="%i %j" | while read -r step name; do
        [ "$name" = longcat ] && scancel --signal=TERM "$step"
    done
    if [ "$1" = USR1 ]; then
        (sleep {save_seconds} && kill -ALRM $$) &   # at the limit itself Slurm would end the job and not queue it again
    fi
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM
trap 'requeue "the ranks had not saved {save_seconds} s after USR1; raise slurm.signal_seconds" 1' ALRM

# --- Trains on the nodes "$1" until srun ends; `code` is then the code in a new exit.json, or empty
train() {
    local before srun
    before=$(stat -c %i:%y "$run/exit.json" 2>/dev/null)
{rendezvous}    srun --job-name=longcat --nodelist="$1" --nodes="$num_nodes" --ntasks="$num_nodes" {srun} \
        {command} &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do   # a signal ends wait, but not srun
        wait "$srun"
    done
    wait "$srun"
    srun_code=$?
    code=""
    if [ "$(stat -c %i:%y "$run/exit.json" 2>/dev/null)" != "$before" ]; then
        code=$(sed -n 's/^[^0-9]*"code": *\([0-9]*\).*/\1/p' "$run/exit.json" | head -n 1)
    fi
    say "training ended: exit code ${code:-unknown}, signal ${asked:-none}, srun $srun_code"
}

# --- Start, and start again on nodes that answer. exit.json says how training ended; srun's code mixes nodes and signals
while :; do
    nodes=$(usable_nodes)
    [ "$asked" = TERM ] && exit 1
    [ "$asked" = USR1 ] && requeue "the time limit came before a start" 1
    [ -n "$nodes" ] || requeue "fewer than $num_nodes nodes answer" 1
    note_start "$nodes"
    train "$nodes"
    case "$code:$asked" in
    0:* | 2:* | 4:*) exit "$code" ;;   # done; wrong configuration; unhealthy numbers: no start mends them
    *:TERM) exit "${code:-1}" ;;       # someone wants it to stop; 3: saved
    *:USR1) requeue "stopped for the time limit, $([ "$code" = 3 ] && echo saved || echo not saved)" "${code:-1}" ;;
    3:*) exit 3 ;;                     # train.stop_after_seconds, or a signal to the ranks alone
    5:*)                               # silent data corruption: never again on that node
        node=$(sed -n 's/.*"finding".*"host": *"\([^"]*\)".*/\1/p' "$run/exit.json" | head -n 1)
        if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${node%%.*}"; then
            say "never again on ${node%%.*}: silent data corruption"
            bad_nodes+="${node%%.*} "
        fi ;;
    esac
    if [ -z "$code" ] && [ "$srun_code" = 2 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ "$num_starts" = 1 ]; then
        exit 2   # refused before the run folder was touched: the reason is above
    fi
    pause=$((5 << failures))   # ranks of a lost node may live on for a while and hold the run folder
    say "starts again in $pause s"
    sleep "$pause" &
    wait "$!"
done
