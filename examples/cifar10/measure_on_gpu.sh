#!/usr/bin/env bash
# All that a GPU must show, in parts, each with a limit of seconds and a log of its own, in OUT:
#
#     examples/cifar10/measure_on_gpu.sh OUT
#     TOY=1 examples/cifar10/measure_on_gpu.sh OUT      # without a GPU, with a small network
#
# In the working directory: cifar10/train and cifar10/classifier.pt (examples/cifar10/README.md).
#
# A call begins no part that may not end within LIMIT seconds (570; all together take up to 760).
# The same command again goes on: parts that ended well have a file OUT/NAME.done and are left out.
# Runs and their checkpoints are in WORK (OUT/work); OUT gets their tables and pictures. The status
# is 0 whatever fails: OUT/parts.txt says what ran. The distance is one of 2000 samples here.
out=$(realpath -m "${1:?give a folder for the results}")
work=$(realpath -m "${WORK:-$out/work}")
here=$(cd "$(dirname "$0")/../.." && pwd)
limit=${LIMIT:-570} samples=2000 budget=40 slower=1
[ "$TOY" ] && limit=${LIMIT:-36000} samples=130 budget=5 slower=6
mkdir -p "$out" "$work/ddp"
ln -sfn "$PWD/cifar10" "$work/cifar10"
ln -sfn "$PWD/cifar10" "$work/ddp/cifar10"
cd "$work" || exit
sed "s/samples: 10000/samples: $samples/" "$here/configs/cifar10.yaml" > cifar10.yaml

vr="python -m lightning_vr"
steps="python $here/examples/cifar10/measure_steps.py"
job=(--config "$work/cifar10.yaml" --data.num_workers 8)
segments=(--segments 6 --steps 20 --data.num_workers 8)
ddpm=() edm=(--data.batch_size 128)
targets=(DSM "STF(4096)" "STF(all)")
short=(--trainer.max_steps 600 --trainer.val_check_interval 600)
waits=(-m gpu)
ratios=()
if [ "$TOY" ]; then
    tiny=(--model.network.init_args.layers_per_block 1 --model.network.init_args.norm_num_groups 4
          --data.batch_size 8 --data.num_workers 0)
    ddpm=("${tiny[@]}" "--model.network.init_args.block_out_channels=[8,8,8,8]")
    edm=("${tiny[@]}" "--model.network.init_args.block_out_channels=[8,8,8]")
    job+=("${ddpm[@]}" --model.target.init_args.references 64 --model.sampler.steps 2
          --trainer.accelerator cpu --trainer.limit_val_batches 1)
    segments=(--segments 2 --steps 1)
    targets=(DSM "STF(all)")
    short=(--trainer.max_steps 4 --trainer.val_check_interval 4)
    waits=(-m "not gpu")
    ratios=(--device cpu)
fi

say() { echo "$*" | tee -a "$out/parts.new"; }

part() {  # part NAME SECONDS COMMAND...: into a file, never through a pipe
    local name=$1 seconds=$((slower * $2)) start=$SECONDS status
    shift 2
    if [ -e "$out/$name.done" ]; then
        say "$name: done in $(cat "$out/$name.done") s, in an earlier call"
    elif ((SECONDS + seconds > limit)); then
        say "$name: not run, as it may take $seconds s of the $((limit - SECONDS)) s left"
    else
        timeout -k 20 "$seconds" "$@" > "$out/$name.log" 2>&1
        status=$?
        [ $status = 0 ] && echo $((SECONDS - start)) > "$out/$name.done"
        say "$name: exit status $status, $((SECONDS - start)) s"
    fi
}

after_fit() {  # the same for a part that needs the checkpoint of the fit
    if [ "$last" ]; then part "$@"; else say "$1: not run, as the fit has left no checkpoint"; fi
}

checkpoint() { ls -t runs/cifar10/version_*/checkpoints/last.ckpt 2> /dev/null | head -1; }

[ "$TOY" ] || nvidia-smi -L > "$out/card.txt" 2>&1
rm -f "$out/parts.new"
part waits 40 python -m pytest -n 0 -q "${waits[@]}" "$here/tests/training/test_fused_optimizers.py"
part kernel 40 python -m pytest -n 0 -q "${waits[@]}" "$here/tests/posterior/test_tensor_cores.py"
part posterior 60 python "$here/examples/scale/scale_on_gpu.py" "${ratios[@]}"
part steps 110 $steps "$here/configs/cifar10.yaml" \
    "${segments[@]}" "${ddpm[@]}" --targets "${targets[@]}"
part steps_edm 70 $steps "$here/configs/cifar10_edm.yaml" "${segments[@]}" "${edm[@]}"
part fit 130 $vr fit "${job[@]}" "${short[@]}" $([ "$(checkpoint)" ] && echo --ckpt_path last)
last=$(checkpoint)
after_fit predict 30 $vr predict "${job[@]}" --ckpt_path "$last" --num_samples 64
after_fit export 30 $vr export "${job[@]}" --ckpt_path "$last" --output exported
after_fit audit 70 $vr audit "${job[@]}" --ckpt_path "$last" --budget $budget
part ddp 30 env -C ddp $vr fit "${job[@]}" --trainer.strategy ddp --trainer.max_steps 20 \
    --trainer.devices 1
find runs \( -name "*.csv" -o -name "*.png" -o -name "*.md" \) -exec cp --parents -t "$out" {} + 2> /dev/null
# last, as to compile takes long
part steps_compiled 150 $steps "$here/configs/cifar10.yaml" \
    "${segments[@]}" "${ddpm[@]}" --model.compile_network true
mv "$out/parts.new" "$out/parts.txt"
exit 0
