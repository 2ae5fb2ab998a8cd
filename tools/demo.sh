#!/usr/bin/env bash
# The whole pipeline, small enough for a laptop: pixels -> tokens -> model -> tokens -> pixels -> report.
#
#   make demo                     built-in handwritten digits; about 5 minutes on 2 CPU cores
#   make demo DATA_ROOT=FOLDER    the same on your own folder of class folders
#
# Every command resumes or skips what is done, so running the demo again does nothing twice.
# Environment: PYTHON, DATA_ROOT, OUT (default outputs/demo, or outputs/demo-NAME for your own folder).
set -euo pipefail

PYTHON=${PYTHON:-python}
DATA=(data=digits)
OUT=${OUT:-outputs/demo}
if [[ -n "${DATA_ROOT:-}" ]]; then
    [[ -d "$DATA_ROOT" ]] || { echo "error: DATA_ROOT=$DATA_ROOT: no such folder" >&2; exit 1; }
    DATA=(data=folder "data.root='$DATA_ROOT'" data.resolution=32)
    name=$(basename "$DATA_ROOT" | tr -c 'A-Za-z0-9._\n-' _) # no letter that Hydra would read
    [[ "$OUT" != outputs/demo ]] || OUT=outputs/demo-$name
fi

stage=0
run() { # TITLE COMMAND...
    stage=$((stage + 1))
    printf '\n== %d/12 %s\n$ python -m %s\n' "$stage" "$1" "${*:2}"
    "$PYTHON" -m "${@:2}"
}

measure() { # TITLE COMMAND...; skipped where the report is newer than what would be measured
    if [[ "$OUT/report.html" -nt "$OUT/samples/images/manifest.json" &&
        "$OUT/report.html" -nt "$OUT/pairs/train/manifest.json" &&
        "$OUT/report.html" -nt "$OUT/pairs/val/manifest.json" ]]; then
        stage=$((stage + 1))
        printf '\n== %d/12 %s: measured already\n' "$stage" "$1"
    else
        run "$@"
    fi
}

run 'train a tokenizer' tokenizer.train "${DATA[@]}" run_name=demo out="$OUT/tokenizer"
run 'images to tokens: training split' \
    tokenizer.encode ckpt="$OUT/tokenizer" "${DATA[@]}" data.split=train out="$OUT/tokens/train"
run 'images to tokens: held-out split' \
    tokenizer.encode ckpt="$OUT/tokenizer" "${DATA[@]}" data.split=val out="$OUT/tokens/val"
run 'train the auto-regressive model on the tokens' \
    ar.train +model=tiny data.shards="$OUT/tokens/train" data.val_shards="$OUT/tokens/val" \
    out="$OUT/ar" steps=450 val_every_steps=150 save_every_steps=150
run 'sample tokens of every class' \
    ar.sample ckpt="$OUT/ar" out="$OUT/samples/tokens" n_per_class=20 sampling.scale=[2.0,2.0]
run 'tokens to images' \
    tokenizer.decode tokens="$OUT/samples/tokens" ckpt="$OUT/tokenizer" out="$OUT/samples/images"
for split in train val; do
    run "reconstruct the $split split" \
        tokenizer.reconstruct ckpt="$OUT/tokenizer" "${DATA[@]}" data.split=$split out="$OUT/pairs/$split"
done
measure 'measure the reconstructions of the held-out split' \
    eval.rfid pairs="$OUT/pairs/val" metrics=[psnr,ssim,ssim_uniform7] out="$OUT/eval"
measure 'measure the use of the codebook' eval.codes tokens="$OUT/tokens/train" out="$OUT/eval"
measure 'measure how often samples are recognised as their class' \
    eval.accuracy samples="$OUT/samples/images" train="$OUT/pairs/train" holdout="$OUT/pairs/val" \
    out="$OUT/eval"
run 'write the report' \
    eval.report run="$OUT/eval" pairs="$OUT/pairs/val" samples="$OUT/samples/images" \
    tokens="$OUT/tokens/train" runs="[$OUT/tokenizer,$OUT/ar]" out="$OUT/report.html" \
    title="'Open-MAGVIT2 demo'"
