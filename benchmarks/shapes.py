"""The layers of the models that are timed, as (N, K): output and input features."""

from __future__ import annotations

LAYERS = {
    "Qwen3-4B": {
        "qkv": (6144, 2560),
        "o": (2560, 4096),
        "gate_up": (19456, 2560),
        "down": (2560, 9728),
        "lm_head": (151936, 2560),
    },
    "Qwen3-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (24576, 4096),
        "down": (4096, 12288),
        "lm_head": (151936, 4096),
    },
    "Llama-3.1-8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "lm_head": (128256, 4096),
    },
    "Qwen3-30B-A3B": {  # its experts: EXPERTS
        "qkv": (5120, 2048),
        "o": (2048, 4096),
        "lm_head": (151936, 2048),
    },
    "square": {"3072": (3072, 3072)},
    "tiny": {"64": (64, 64)},  # on a GPU, its eager time is the host's
}

# Qwen3-30B-A3B: experts per layer, experts per token, and the products of each.
EXPERTS, EXPERTS_PER_TOKEN = 128, 8
EXPERT_LAYERS = {"gate_up": (1536, 2048), "down": (2048, 768)}

HEAD_ROWS = 256  # limit for lm_head, which takes one row per sequence
