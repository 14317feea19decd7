#!/bin/sh
# Everything that a session on a GPU should measure, in calls of less than ten minutes; tables go to $OUT as Markdown.
#
#   OUT=tables OFFICIAL=DMD2 sh benchmarks/gpu.sh [PART ...]     a PART is a call; by default all, one after the other
#   OUT=/tmp/tables TINY=1 sh benchmarks/gpu.sh                  a trial on a CPU, with small networks
#
# OFFICIAL is a checkout of tianweiy/DMD2 (8d8fa55), which the user brings; without it ours are measured alone. PRECISION
# lists those that are compared; the last one is compiled and captured. A measurement that fails or takes too long leaves
# its error in $OUT/NAME.log; a training step then measures what was ready, which takes another minute.
OUT=${OUT:?"set OUT to the folder of the tables"}
PRECISION=${PRECISION:-bf16,bf16-body}
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
    if ! timeout -k 100 "$limit" "$PYTHON" -m "benchmarks.$module" "$@" >"$OUT/$name.md" 2>"$OUT/$name.log"; then
        failed=1
        echo "$name failed or took more than $limit s:" && tail -n 3 "$OUT/$name.log"
    fi
    cat "$OUT/$name.md"
}

beside=${OFFICIAL:+--official $OFFICIAL}
best=${PRECISION##*,}
[ -n "$TINY" ] && step="--tiny --blocks 1" evaluation="--images 8 --rounds 1 --sizes 32 --workers 0 --tiny" bases=
# What takes minutes to build or to compile is a call of its own; in a trial full-size networks are left out.
for part in ${*:-step blocks network graphs evaluation small sdxl-lora sdxl}; do
    case $part in
    step) measure step 480 train_step $beside --precision "$PRECISION" $step ;;
    blocks | network) measure "compiled-$part" 480 train_step $beside --precision "$best" --compiled "$part" $step ;;
    graphs) measure graphs 480 train_step $beside --precision "$best" --graphs off,on $step ;;
    network-graphs) measure $part 480 train_step $beside --precision "$best" --compiled network --graphs on $step ;;
    evaluation) measure evaluation 590 evaluation ${evaluation:---images 2048 --sizes 64 --rounds 2} ;;
    small)
        for base in digits ${bases-fashion}; do
            measure "small-$base" 250 train_step --base $base --graphs off,on ${TINY:+--blocks 1}
        done
        ;;
    sdxl-lora | sdxl)
        rank=0 && [ $part = sdxl-lora ] && rank=64
        [ -n "$TINY" ] || measure $part 590 full_size sdxl --checkpointing --lora $rank --batch 1,4 --blocks 1 \
            --precision "$([ $part = sdxl-lora ] && echo "$PRECISION" || echo bf16)"
        ;;
    *) echo "there is no part $part" >&2 && failed=1 ;;
    esac
done
exit $failed
