#!/bin/sh
# Train and evaluate all that docs/results.md has, or the parts named: full further seeds ablations
# fig1 photographs finetune. Killed at any moment and started again, it goes on where it was.
#
#     configs/results/train.sh                      # all; hours
#     configs/results/train.sh seeds ablations
set -eu
cd "$(dirname "$0")/../.."
run=${ALEXNET_DIST:-.venv/bin/alexnet-dist}
python=${PYTHON:-.venv/bin/python}
seeds=${SEEDS:-0 1 2}
more=${MORE:-}  # key=value for every training

trained() { # NAME CONFIG...: train, or continue; nothing where it is done
    name=$1
    shift
    # shellcheck disable=SC2086
    "$run" train "$@" name="$name" $more
}

scored() { # VIEWS OUT RUN...: evaluate once
    views=$1 out=$2
    shift 2
    [ -s "$out" ] || { "$run" evaluate "$@" --views "$views" --json >"$out.part" && mv "$out.part" "$out"; }
}

classes() { # DATA: how many
    "$python" -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["classes"]))' "$1/dataset.json"
}

fashion_mnist() {
    "$run" prepare fashion_mnist data/fashion-mnist
}

full() {
    fashion_mnist
    trained fashion-mnist-227-alexnet-2012-0 results/fashion-mnist-227
    for views in 1 10; do
        scored $views runs/fashion-mnist-227-alexnet-2012-0/evaluation-views-$views.json \
            runs/fashion-mnist-227-alexnet-2012-0
    done
    "$run" figures runs/fashion-mnist-227-alexnet-2012-0 --fig4
}

further() { # from where full ended, by the same recipe, over other windows in another order
    trained fashion-mnist-227-further-alexnet-2012-1 results/fashion-mnist-227 seed=1 \
        train.init_from=runs/fashion-mnist-227-alexnet-2012-0 train.epochs=8
    for views in 1 10; do
        scored $views runs/fashion-mnist-227-further-alexnet-2012-1/evaluation-views-$views.json \
            runs/fashion-mnist-227-further-alexnet-2012-1
    done
}

cheap() { # NAME SEEDS CONFIG...: a variant over seeds, one view and ten
    variant=$1 of=$2
    shift 2
    for seed in $of; do
        trained cheap-"$variant"-"$seed" "$@" seed="$seed"
        for views in 1 10; do
            out=runs/cheap-$variant-$seed/evaluation-views-$views.json
            scored $views "$out" runs/cheap-"$variant"-"$seed"
        done
    done
}

seeds() {
    fashion_mnist
    cheap alexnet-2012 "0 1 2 3 4" results/cheap
    for views in 1 10; do
        scored $views runs/cheap-ensemble-5-views-$views.json \
            runs/cheap-alexnet-2012-0 runs/cheap-alexnet-2012-1 runs/cheap-alexnet-2012-2 \
            runs/cheap-alexnet-2012-3 runs/cheap-alexnet-2012-4
    done
}

ablations() {
    fashion_mnist
    cheap alexnet-2012 "$seeds" results/cheap
    for preset in one-column no-lrn no-overlap no-exchange no-lighting; do
        cheap $preset "$seeds" paper/$preset results/cheap
    done
    cheap no-dropout "$seeds" results/cheap model.dropout=0
}

fig1() {
    for seed in $seeds; do
        "$run" prepare fashion_mnist /usr/share/datasets/fashion-mnist data/fashion-mnist-keep --keep
        for unit in relu tanh sigmoid; do
            for rate in 0.0003 0.001 0.003 0.01 0.03 0.1; do
                trained fashion-rate-$rate-fig1-$unit-"$seed" paper/fig1-$unit seed="$seed" \
                    schedule.rate=$rate data.path=data/fashion-mnist-keep train.epochs=3 \
                    log.every_steps=10 || echo "$unit at $rate: did not end" # a rate may be too high
            done
        done
    done
}

cut() {
    [ -d data/photographs-cut ] || {
        "$python" configs/results/cut_photographs.py data/photographs-cut.part
        mv data/photographs-cut.part data/photographs-cut
    }
}

photographs() {
    cut
    "$run" prepare folder data/photographs-cut data/photographs
    for seed in $seeds; do
        trained photographs-"$seed" results/photographs seed="$seed" \
            model.classes="$(classes data/photographs)"
        "$run" figures runs/photographs-"$seed"
    done
}

finetune() { # half of the photographs, then the other half with a new last layer
    cut
    photographs_cut=data/photographs-cut
    for half in 0 1; do
        [ -d data/photographs-half-$half-cut ] || {
            number=0
            for class in "$photographs_cut"/train/*; do
                number=$((number + 1))
                [ $((number % 2)) -eq $half ] || continue
                for split in train val; do
                    [ -d "$photographs_cut/$split/$(basename "$class")" ] || continue
                    mkdir -p data/photographs-half-$half-cut.part/$split
                    cp -al "$photographs_cut/$split/$(basename "$class")" \
                        data/photographs-half-$half-cut.part/$split/
                done
            done
            mv data/photographs-half-$half-cut.part data/photographs-half-$half-cut
        }
        "$run" prepare folder data/photographs-half-$half-cut data/photographs-half-$half
    done
    trained photographs-pretrain results/photographs data.path=data/photographs-half-0 \
        model.classes="$(classes data/photographs-half-0)"
    for start in finetuned scratch; do
        from="train.init_from=runs/photographs-pretrain train.init_new=[fc8]"
        [ $start = finetuned ] || from=
        # shellcheck disable=SC2086
        trained photographs-$start results/photographs data.path=data/photographs-half-1 \
            model.classes="$(classes data/photographs-half-1)" train.epochs=20 $from
    done
}

for part in ${*:-seeds ablations fig1 photographs finetune full further}; do
    $part
done
"$run" report runs/* --out runs/report.html
