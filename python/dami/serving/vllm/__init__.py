"""vLLM plugin: serves pairs with `vllm serve`, each request at its own λ.

`register` is an entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes. It adds the
quantisation method "dami", which the config of a packed pair names, and hooks λ into vLLM's requests and steps.
"""

from __future__ import annotations

import warnings


def register() -> None:
    """Registers pairs with vLLM. Models that are not pairs are unaffected. You may call this again.

    It doesn't raise, because vLLM calls it for every model, and an exception would keep any of them from starting. If
    the installed vLLM doesn't fit the plugin, only serving a pair fails. If the plugin itself cannot be imported, you
    get a warning, and vLLM doesn't know pairs.
    """
    try:
        from dami.serving.vllm import support  # imports nothing from vLLM unguarded
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
    from dami.serving.vllm import (
        cache_keys,
        choosing,
        last_turns,
        loader,
        polling,
        reporting,
        requests,
        runners,
        server,
        states,
        turning,
    )
    from dami.serving.vllm.quantization import PairQuantization

    loader.install()
    requests.install()
    choosing.install()
    server.install()
    last_turns.install()
    reporting.install()
    cache_keys.install()
    runners.install()
    states.install()
    turning.install()
    polling.install()
    PairQuantization.register()
