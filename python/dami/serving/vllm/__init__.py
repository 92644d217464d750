"""vLLM plugin: pairs on `vllm serve`, each request at its own λ.

`register` is the entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes. It teaches
vLLM the quantisation method "dami", by which a packed pair's config names it, and hooks λ into its requests and steps.
"""

from __future__ import annotations

import warnings


def register() -> None:
    """Makes pairs known to vLLM; models that are not pairs are left as they were. May be called again.

    Where vLLM is not as the plugin needs it, a pair is refused when it is to be served, and nothing else is touched:
    vLLM calls this for every model, and what it raised would keep all of them from starting. Where the plugin itself
    cannot be imported, there is a warning, and vLLM knows no pairs.
    """
    try:
        from dami.serving.vllm import support  # which imports nothing of vLLM unguarded
    except Exception as error:
        warnings.warn(
            f"vLLM goes on without dami's plugin, which could not be imported: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    if not support.FAULTS:
        try:
            _install()
        except Exception as error:
            support.FAULTS.append(f"raises {type(error).__name__}: {error}")
    if support.FAULTS:
        support.refuse_pairs()


def _install() -> None:
    from dami.serving.vllm import loader, requests, runners
    from dami.serving.vllm.quantization import PairQuantization

    loader.install()
    requests.install()
    runners.install()
    PairQuantization.register()
