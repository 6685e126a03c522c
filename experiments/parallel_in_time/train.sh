#!/usr/bin/env bash
# Trains this experiment's reasoners one after another: train.sh [CELL...], each T-K-SEED, or T-K-SEED-first for sweeps that begin
# with h_1. With K = T latents are sequential. A trained one is left as it is, and a stopped one resumes: re-run the command.
set -euo pipefail
output=${OUTPUT:-outputs/parallel_in_time}
updates=${UPDATES:-400}
ltts=${LTTS:-.venv/bin/ltts}

for cell in "${@:-12-2-0 12-12-0 24-4-0 24-24-0 24-4-0-first 12-3-0 24-24-1 24-4-1-first 24-24-2 24-4-2-first
                  12-2-1 12-12-1 12-2-2 12-12-2 24-4-1 24-4-2 12-4-0 24-2-0 24-3-0}"; do
    for one in $cell; do
        IFS=- read -r latents sweeps seed first <<<"$one"
        [ -f "$output/$one/checkpoint/model.safetensors" ] && continue
        $ltts train-reasoner init=shipped:coconut_arith model=pccot output="$output/$one" seed="$seed" task.seed="$seed" save_every=100 \
            model.latents="$latents" model.sweeps="$sweeps" model.answer_prompt="''" recipe.projection=false \
            model.known_first="$([ "$first" = first ] && echo true || echo false)" \
            recipe.written_updates=0 recipe.stage_updates=[] recipe.final_updates="$updates" \
            optimization.lr=1e-3 optimization.warmup=10 optimization.cosine_updates="$updates"
    done
done
