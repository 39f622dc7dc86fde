#!/bin/bash
# Stage 1 in the form of LLaVA's scripts/v1_5/pretrain.sh: projector only. Appended arguments go to train.py.
# BASE: folder of the small file set; OUT: output folder; LLAVA: folder of the installed llava package.

python "$LLAVA/train/train.py" \
    --model_name_or_path "$BASE/vicuna-small" \
    --version plain \
    --data_path "$BASE/plain.json" \
    --image_folder "$BASE/images" \
    --vision_tower "$BASE/clip-vit-small-56" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --pretrain_mm_mlp_adapter "$BASE/mm_projector.bin" \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 False \
    --use_cpu True \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --max_steps ${STEPS:-32} \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing False \
    --dataloader_num_workers 0 \
    --lazy_preprocess True \
    --report_to none "$@"
