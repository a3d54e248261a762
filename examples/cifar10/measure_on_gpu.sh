#!/usr/bin/env bash
# All that a GPU must show, each part with a limit of seconds and a log of its own, in OUT:
#
#     examples/cifar10/measure_on_gpu.sh OUT [toy]
#
# In the working directory: cifar10/train and cifar10/classifier.pt (examples/cifar10/README.md).
# "toy" tries the script without a GPU, with a small network.
#
# The distance is one of 2000 samples here. Runs stay in a temporary folder; OUT gets their tables
# and pictures.
mkdir -p "$1"
out=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")/../.." && pwd)
configs=$here/configs
samples=2000 slower=1
[ "$2" = toy ] && samples=130 slower=4
folder=$(mktemp -d)
ln -s "$PWD/cifar10" "$folder/cifar10"
cd "$folder" || exit
sed "s/samples: 10000/samples: $samples/" "$configs/cifar10.yaml" > cifar10.yaml

vr="python -m lightning_vr"
job=(--config cifar10.yaml --data.num_workers 8)
work=(--segments 6 --steps 20 --data.num_workers 8)
ddpm=() edm=(--data.batch_size 128)
targets=(DSM "STF(4096)" "STF(all)")
short=(--trainer.max_steps 600 --trainer.val_check_interval 600)
if [ "$2" = toy ]; then
    tiny=(--model.network.init_args.layers_per_block 1 --model.network.init_args.norm_num_groups 4
          --data.batch_size 8 --data.num_workers 0)
    ddpm=("${tiny[@]}" "--model.network.init_args.block_out_channels=[8,8,8,8]")
    edm=("${tiny[@]}" "--model.network.init_args.block_out_channels=[8,8,8]")
    job+=("${ddpm[@]}" --model.target.init_args.references 64 --model.sampler.steps 2
          --trainer.accelerator cpu --trainer.limit_val_batches 1)
    work=(--segments 2 --steps 1)
    targets=(DSM "STF(all)")
    short=(--trainer.max_steps 4 --trainer.val_check_interval 4)
fi

part() {  # part NAME SECONDS COMMAND...: into a file, never through a pipe
    local name=$1 limit=$((slower * $2))
    shift 2
    local start=$SECONDS
    timeout -k 3 "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit status $?, $((SECONDS - start)) s" >> "$out/parts.txt"
}

[ "$2" = toy ] || nvidia-smi -L > "$out/card.txt" 2>&1
part waits 40 python -m pytest -n 0 -q -m gpu "$here/tests/training/test_fused_optimizers.py"
part steps 110 python "$here/examples/cifar10/measure_steps.py" "$configs/cifar10.yaml" \
    "${work[@]}" "${ddpm[@]}" --targets "${targets[@]}"
part steps_compiled 80 python "$here/examples/cifar10/measure_steps.py" "$configs/cifar10.yaml" \
    "${work[@]}" "${ddpm[@]}" --model.compile_network true
part steps_edm 70 python "$here/examples/cifar10/measure_steps.py" "$configs/cifar10_edm.yaml" \
    "${work[@]}" "${edm[@]}"
part fit 130 $vr fit "${job[@]}" "${short[@]}"
last=$(ls -d runs/cifar10/version_*/checkpoints/last.ckpt 2> /dev/null | head -1)
part predict 30 $vr predict "${job[@]}" --ckpt_path "$last" --num_samples 64
part export 30 $vr export "${job[@]}" --ckpt_path "$last" --output exported
part audit 70 $vr audit "${job[@]}" --ckpt_path "$last" --budget 40
part ddp 30 $vr fit "${job[@]}" --trainer.strategy ddp --trainer.max_steps 20 \
    --trainer.limit_val_batches 0 --trainer.devices 1
cp --parents -t "$out" $(find runs -name "*.csv" -o -name "*.png" -o -name "*.md")
cat "$out/parts.txt"
