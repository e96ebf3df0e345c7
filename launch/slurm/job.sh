#!/bin/bash
# Trains {run_name} under Slurm. Written by longcat slurm; change what you like.
#   submit:                  sbatch {script}
#   save and stop:           scancel --batch --signal=TERM JOB     (plain scancel kills after the cluster's KillWait)
#   save and start again:    scancel --batch --signal=USR1 JOB
{sbatch}

# --- The environment of the ranks
{environment}
# --- The job
set -u
script={script}
run={run}   # the run folder: checkpoints, exit.json, this job's log
num_nodes={num_nodes}   # nodes that train; further ones of the job stand by
most_nodes={most_nodes}   # that longcat train runs on; with launch.restarts spare nodes join and wait
max_requeues={max_requeues}   # times that the job is queued again, time limits included
max_failures={max_failures}   # starts in a row without a new checkpoint
resume_from={resume_from}   # checkpoint.resume; it counts once, then training goes on from its newest checkpoint
bad_nodes=$run/slurm.bad_nodes   # had silent data corruption, one on a line; take a repaired one out

say() { echo "$(date '+%F %T') slurm job $SLURM_JOB_ID: $*"; }

# What is new after each write of a file; nothing where there is none
identity() { stat -c %i:%y "$1" 2>/dev/null; }

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
    note_resume
    say "start on $1, newest checkpoint: $checkpoint"
}

# Sets resume to auto once a start has followed checkpoint.resume. slurm.resume tells: the value, and the
# identity of config.yaml before, which a start writes when it has loaded its checkpoint. Remove it to start there again
resume=""
note_resume() {
    local value="" before=""
    [ "$resume_from" = auto ] && return
    { IFS= read -r value && IFS= read -r before; } 2>/dev/null <"$run/slurm.resume"
    if [ "$value" != "$resume_from" ]; then
        before=$(identity "$run/config.yaml")
        printf '%s\n' "$resume_from" "$before" >"$run/slurm.resume"
    fi
    [ "$before" = "$(identity "$run/config.yaml")" ] || resume=checkpoint.resume=auto
}
# Sets nodes to the first $most_nodes of the job that answer and are not barred, separated by commas; to nothing if
# fewer than $num_nodes do, or when a signal comes. All are asked at the same time
barred=""
[ -f "$bad_nodes" ] && barred=$(tr -s '\n' ' ' <"$bad_nodes")
find_nodes() {
    local node each asked_nodes=() pids=() found=()
    nodes=""
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        [[ " $barred" == *" $node "* ]] && continue
        timeout 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --quiet true &
        asked_nodes+=("$node") pids+=("$!")
    done
    for each in "${!pids[@]}"; do
        wait "${pids[each]}" && found+=("${asked_nodes[each]}")
        [ -z "$asked" ] || return   # a signal ends wait
    done
    if [ "${#found[@]}" -ge "$num_nodes" ]; then
        nodes=$(IFS=,; echo "${found[*]:0:most_nodes}")
    fi
}

# Bars the node on which exit.json says that data was corrupted
bar_node() {
    local key node=""
    for key in node host; do
        node=$(sed -n "s/.*\"finding\".*\"$key\": *\"\([^\"]*\)\".*/\1/p" "$run/exit.json" | head -n 1)
        [ "$key" = host ] && node=${node%%.*}
        scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -qxF "$node" && break
        node=""
    done
    if [ -z "$node" ]; then
        say "silent data corruption, but $run/exit.json names no node of this job"
        return
    fi
    bar "$node"
}

# Bars the nodes that longcat train has left out since line "$1" of launch.jsonl, because they compute wrongly
bar_recorded() {
    local node
    [ -f "$run/launch.jsonl" ] || return 0
    for node in $(tail -n "+$(($1 + 1))" "$run/launch.jsonl" |
        sed -n 's/.*"event": "end".*"cause": "corruption".*"nodes": \[\([^]]*\)\].*/\1/p' | tr -d '",'); do
        ! scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -qxF "$node" || bar "$node"
    done
}

bar() {
    [[ " $barred" == *" $1 "* ]] && return
    say "never again on $1: silent data corruption; it is in $bad_nodes"
    barred+="$1 "
    echo "$1" >>"$bad_nodes"
}

# Gives the job back to Slurm's queue. Nodes can be excluded from a job only while it waits, so it is held meanwhile
queue_again() {
    local excluded bad=${barred% }
    if [ -z "$barred" ]; then
        scontrol requeue "$SLURM_JOB_ID" && return 0   # in a trap, return alone gives the code of what it interrupted
        return 1
    fi
    excluded=$(scontrol -o show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' | sed 's/(null)//')
    excluded="${excluded:+$excluded,}${bad// /,}"
    scontrol requeuehold "$SLURM_JOB_ID" || return 1
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$excluded" || say "cannot exclude $excluded from the next start"
    scontrol release "$SLURM_JOB_ID" || say "the job is held; let it go on with: scontrol release $SLURM_JOB_ID"
    return 0
}

# Ends this start of the job and queues it again; Slurm then starts this script anew, perhaps on other nodes
requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
        say "not queued again after $max_requeues times: $1"
        exit "$2"
    fi
    say "queued again: $1"
    trap '' TERM ALRM USR1 USR2   # Slurm sends TERM at once to all that runs here, scontrol too
    queue_again && exit 0
    say "cannot be queued again; start it with: sbatch $script"
    exit "$2"
}

# --- Signals: USR1 comes {signal_seconds} s before the time limit, TERM at scancel and at preemption. The ranks save and stop
asked=""
# shellcheck disable=SC2317   # called by the traps
ask() {
    [ "$asked" = TERM ] || [ "$asked" = "$1" ] && return   # a job that is to stop stops, near its time limit too
    asked=$1
    say "$1: the ranks save and stop"
    if [ "$1" = USR1 ]; then
        (sleep {save_seconds} && kill -ALRM $$) &   # at the limit itself Slurm would end the job and not queue it again
    fi
    tell_ranks
}
# Sends TERM to the ranks; tries again as long as Slurm does not know their step, which srun may be about to start
# shellcheck disable=SC2317
tell_ranks() {
    local step name told=""
    while read -r step name; do
        [ "$name" = "longcat-$num_starts" ] && scancel --signal=TERM "$step" && told=yes
    done < <(squeue --steps --noheader --job="$SLURM_JOB_ID" --format="%i %j")
    [ -n "$told" ] || (sleep 1 && kill -USR2 $$) 2>/dev/null &
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM
trap '[ -z "$asked" ] || tell_ranks' USR2
trap 'requeue "the ranks had not saved {save_seconds} s after USR1; raise slurm.signal_seconds" 1' ALRM

# --- Trains on the nodes "$1" until srun ends; `code` is then the run's exit code, or empty where nothing tells it.
# gave_up is set where longcat train says that a person has to act (launch.restarts)
gave_up=""
train() {
    local exit_before config_before gave_up_after gave_up_before journal_before srun count
    count=$(tr ',' '\n' <<<"$1" | wc -l)
    exit_before=$(identity "$run/exit.json")
    gave_up_before=$(identity "$run/gave_up.txt")
    journal_before=0
    [ -f "$run/launch.jsonl" ] && journal_before=$(wc -l <"$run/launch.jsonl")
    config_before=$(identity "$run/config.yaml")
    # Ranks that refuse the configuration write the reason here, since exit.json may be another run's
    export LONGCAT_REFUSAL="$run/slurm.refusal-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$num_starts"
{rendezvous}    srun --job-name="longcat-$num_starts" --nodelist="$1" --nodes="$count" --ntasks="$count" {srun} \
        {command} &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do   # a signal ends wait, but not srun
        wait "$srun"
    done
    wait "$srun"
    srun_code=$?
    code=""
    if [ "$(identity "$run/exit.json")" != "$exit_before" ]; then
        code=$(sed -n 's/^[^0-9]*"code": *\([0-9]*\).*/\1/p' "$run/exit.json" | head -n 1)
    elif [ -f "$LONGCAT_REFUSAL" ]; then
        code=2
    elif [ "$srun_code" = 0 ]; then
        code=0   # all ranks are done, but could not write exit.json
    elif [ -n "$asked" ] && [ "$(identity "$run/config.yaml")" = "$config_before" ]; then
        code=3   # ended before a first step: the checkpoints are all there is
    fi
    rm -f "$LONGCAT_REFUSAL"
    gave_up_after=$(identity "$run/gave_up.txt")
    if [ -n "$gave_up_after" ] && [ "$gave_up_after" != "$gave_up_before" ]; then
        # nothing but this script can start a node's part again that has ended
        tail -n 1 "$run/launch.jsonl" | grep -q '"too_few_nodes": true' || gave_up=yes
    fi
    bar_recorded "$journal_before"
    say "training ended: exit code ${code:-unknown}, signal ${asked:-none}, srun $srun_code"
}

# --- Start, and start again on nodes that answer. exit.json says how training ended; srun's code mixes nodes and signals
while :; do
    [ -n "$asked" ] || find_nodes
    [ -n "$gave_up" ] && [ -n "$asked" ] && exit "${code:-1}"
    [ "$asked" = TERM ] && say "stopped while no ranks ran" && exit 3
    [ "$asked" = USR1 ] && requeue "the time limit came while no ranks ran" 3
    [ -n "$nodes" ] || requeue "fewer than $num_nodes nodes answer and are not barred" 1
    [ -n "$gave_up" ] && say "longcat train gave up after launch.restarts; read $run/gave_up.txt" && exit "${code:-1}"
    note_start "$nodes"
    train "$nodes"
    [ "$code" = 5 ] && bar_node
    case "$code:$asked" in
    0:* | 2:* | 4:*) exit "$code" ;;   # done; wrong configuration; unhealthy numbers: no start mends them
    *:TERM) exit "${code:-1}" ;;       # someone wants it to stop; 3: saved
    *:USR1) requeue "stopped for the time limit, $([ "$code" = 3 ] && echo saved || echo not saved)" "${code:-1}" ;;
    3:*) exit 3 ;;                     # train.stop_after_seconds, or a signal to the ranks alone
    esac
    if [ -z "$code" ] && [ "$srun_code" = 2 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ "$num_starts" = 1 ]; then
        exit 2   # the program refused what it was given, or another training has the run folder: the reason is above
    fi
    [ -n "$gave_up" ] && [ "$code" != 5 ] && continue   # the nodes that are left decide
    gave_up=""
    pause=$((5 << failures))   # ranks of a lost node may live on for a while and hold the run folder
    say "starts again in $pause s"
    sleep "$pause" &
    wait "$!"
done
