#!/bin/bash
# Stage 2 in the form of LLaVA's scripts/v1_5/finetune.sh. Appended arguments go to train.py.
# BASE: folder of the small file set; STAGE1: stage 1's output; OUT: output folder; LLAVA: the installed llava package.

python "$LLAVA/train/train.py" \
    --model_name_or_path "$BASE/vicuna-small" \
    --version v1 \
    --data_path "$BASE/v1.json" \
    --image_folder "$BASE/images" \
    --vision_tower "$BASE/clip-vit-small-56" \
    --pretrain_mm_mlp_adapter "$STAGE1/mm_projector.bin" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 False \
    --use_cpu True \
    --output_dir "$OUT" \
    --num_train_epochs 1 \
    --max_steps ${STEPS:-192} \
    --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps 1 \
    --evaluation_strategy "no" \
    --save_strategy "steps" \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing False \
    --dataloader_num_workers 0 \
    --lazy_preprocess True \
    --report_to none "$@"
