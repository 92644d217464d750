"""vLLM plugin: pairs on `vllm serve`, each request at its own λ.

`register` is the entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes. It teaches
vLLM the quantisation method "dami", by which a packed pair's config names it, and hooks λ into its requests and steps.
"""

from __future__ import annotations


def register() -> None:
    """Makes pairs known to vLLM; models that are not pairs are left as they were. May be called again."""
    from dami.serving.vllm import loader, requests, runners, support
    from dami.serving.vllm.quantization import PairQuantization

    PairQuantization.register()
    if support.FAULTS:
        return  # said when a pair is to be served: vLLM's own models are none of our business
    loader.install()
    requests.install()
    runners.install()
