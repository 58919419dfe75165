"""Which key or value a user may have meant by a name that does not exist."""

import difflib
from collections.abc import Collection, Sequence

# What other programs call a key.
_SYNONYMS = {
    "name": "run_name exp_name experiment",
    "output_dir": "out out_dir output save_dir log_dir run_dir",
    "seed": "random_seed manual_seed",
    "model.classes": "num_classes n_classes nclasses",
    "model.crop": "crop_size image_size img_size imgsz input_size resolution",
    "data.path": "data dataset data_dir data_path root",
    "data.workers": "num_workers",
    "data.prefetch": "prefetch_factor",
    "layout.kind": "strategy distributed parallel ddp zero fsdp",
    "layout.ranks": "gpus num_gpus n_gpus ngpus devices nproc nproc_per_node world_size",
    "layout.device": "cuda cpu",
    "optimizer.kind": "opt",
    "optimizer.weight_decay": "wd decay l2",
    "schedule.kind": "scheduler lr_scheduler",
    "schedule.rate": "lr learning_rate base_lr",
    "schedule.factor": "gamma lr_gamma",
    "schedule.at_epochs": "milestones lr_steps",
    "schedule.warmup_epochs": "warmup",
    "train.batch": "batch batch_size batchsize bs global_batch_size",
    "train.epochs": "num_epochs max_epochs n_epochs",
    "train.execution": "compile torch_compile cuda_graph cuda_graphs",
    "train.precision": "fp16 bf16 fp32 amp half mixed_precision dtype",
    "train.micro_batches": "grad_accum accumulation_steps gradient_accumulation_steps",
    "train.init_from": "pretrained weights ckpt finetune finetune_from",
    "evaluate.batch": "eval_batch eval_batch_size val_batch_size test_batch_size",
    "evaluate.every_epochs": "eval_every val_every eval_interval",
    "evaluate.views": "tta ten_crop",
    "checkpoint.every_steps": "save_every save_interval save_freq",
    "log.every_steps": "log_every log_interval print_freq",
    "cluster.memory_gb": "mem memory mem_gb",  # read by launch
    "cluster.tasks_per_node": "ntasks_per_node ntasks",
    "cluster.time_min": "time timeout_min time_limit",
}
_KEY_OF = {word: key for key, words in _SYNONYMS.items() for word in words.split()}
_VALUE_OF = {"gpu": "cuda"}  # what a value is also called


def nearest(word: str, known: Sequence[str]) -> str:
    """Return "; did you mean …?" with the known word most like this one, or an empty string."""
    word = _VALUE_OF.get(word, word)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def nearest_key(name: str, known: Collection[str]) -> str:
    """Return the known key that `name` most likely stands for, or an empty string."""
    word = name.rpartition(".")[2].lower().replace("-", "_")
    if _KEY_OF.get(word) in known:
        return _KEY_OF[word]
    last = [key for key in known if key.rpartition(".")[2] == word]
    if len(last) == 1:  # the right word in the wrong section
        return last[0]
    sections = {key.rpartition(".")[0] for key in known} - {"", name.rpartition(".")[0]}
    near = difflib.get_close_matches(name, [*known, *sections], n=1)
    return near[0] if near else ""
