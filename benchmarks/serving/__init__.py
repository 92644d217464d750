"""How `dami serve` does under load, on this machine: python -m benchmarks.serving.PART --help.

    throughput   sequences at many λ in one process, at one λ, and in one process per λ
    streams      a thousand streams at once, each answer against the same question asked alone
    faults       cancellation storms, clients that leave, clients that do not read
    prefixes     prompts read once for all λ, and λ chosen while they are read; without HTTP and clients
    soak         ten thousand requests, some abandoned, wrong or giant; then overload and SIGTERM
    control      a fixed λ against one that follows the load
    steps        where the time of a step goes; without HTTP and clients

The clients are locust's (`pip install '.[load,serve]'`). Servers listen on the loopback interface.
"""
