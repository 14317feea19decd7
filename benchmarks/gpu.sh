#!/bin/sh
# Everything that a session on a GPU should measure, in calls of less than ten minutes; tables go to $OUT as Markdown.
#
#   OUT=tables OFFICIAL=DMD2 sh benchmarks/gpu.sh [PART ...]     a PART is a call; by default all, one after the other
#   OUT=/tmp/tables TINY=1 sh benchmarks/gpu.sh                  a trial on a CPU, with small networks
#
# OFFICIAL is a checkout of tianweiy/DMD2 (8d8fa55), which the user brings; without it ours are measured alone. PRECISION,
# COMPILE and GRAPHS are what is compared. A measurement that fails or takes too long leaves its error in $OUT/NAME.log.
OUT=${OUT:?"set OUT to the folder of the tables"}
PRECISION=${PRECISION:-bf16,bf16-body}
COMPILE=${COMPILE:-blocks,network}
GRAPHS=${GRAPHS:-on}
cd "$(dirname "$0")/.." && mkdir -p "$OUT" || exit 1
if [ -z "$PYTHON" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
failed=0

# measure NAME SECONDS MODULE [OPTION ...]
measure() {
    name=$1 limit=$2 module=$3
    shift 3
    echo "$name: $module $*" >&2
    if timeout "$limit" "$PYTHON" -m "benchmarks.$module" "$@" >"$OUT/$name.md" 2>"$OUT/$name.log"; then
        cat "$OUT/$name.md"
    else
        failed=1
        echo "$name failed or took more than $limit s:" && tail -n 3 "$OUT/$name.log"
    fi
}

beside=${OFFICIAL:+--official $OFFICIAL}
[ -n "$TINY" ] && step="--tiny --blocks 1" evaluation="--tiny --images 8 --rounds 1 --sizes 32 --workers 0"
for part in ${*:-step compiled graphs evaluation sdxl-lora sdxl}; do
    case $part in
    step) measure step 540 train_step $beside --precision "$PRECISION" $step ;;
    compiled) measure compiled 590 train_step $beside --precision "${PRECISION##*,}" --compile "$COMPILE" $step ;;
    graphs) measure graphs 590 train_step $beside --precision "${PRECISION##*,}" --graphs "$GRAPHS" $step ;;
    evaluation) measure evaluation 590 evaluation ${evaluation:---images 2048 --sizes 64 --rounds 2} ;;
    sdxl-lora)
        [ -n "$TINY" ] || measure sdxl-lora 590 full_size sdxl --checkpointing --lora 64 --batch 1,4 --precision "$PRECISION"
        ;;
    sdxl) [ -n "$TINY" ] || measure sdxl 590 full_size sdxl --checkpointing --batch 1,4 ;;
    *) echo "there is no part $part" >&2 && failed=1 ;;
    esac
done
exit $failed
