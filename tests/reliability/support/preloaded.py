"""What a stage imports, imported once: processes forked from here start in milliseconds."""

import importlib
import os

# Polars gives memory back when it is freed, so that what a process has is what it uses; read when polars is loaded.
os.environ["_RJEM_MALLOC_CONF"] = "retain:false,narenas:1,dirty_decay_ms:0,muzzy_decay_ms:0"

import dvc.repo  # noqa: F401
import dvclive  # noqa: F401
import torch
import torch._dynamo
import torch.utils.flop_counter

STAGES = (
    "check_params",
    "digest_corpus",
    "tokenise",
    "train_autoencoder",
    "encode_corpus",
    "train_calm",
    "match_compute",
    "train_transformer",
    "evaluate_calm",
    "evaluate_transformer",
    "evaluate_brierlm",
    "correlate_brierlm",
    "measure_diversity",
    "benchmark_flops",
    "model_cards",
    "report",
)
for stage in STAGES:
    importlib.import_module(f"stages.{stage}")
torch.set_num_threads(1)
