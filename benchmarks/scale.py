"""What packing, loading and serving of published pairs takes: computed from recorded configs and rates measured here.

python -m benchmarks scale            # the table, from the rates measured last
python -m benchmarks scale --measure  # first measures the rates of this machine and records them

Rates, in results/scale.csv: reading and writing a file past the system's cache, in bytes a second; and packing with
one thread, in weights for each second of the processor's time, with the error that `dami.pack` records. The rest is
computed, from the models' shapes in `python/dami/data/pairs.json`:

    pack     reads both ends and writes the pair at the rates of this disk, and packs on one core like this machine's
    load     reads the pair at the rate of this disk, with nothing in the system's cache
    fits on  the smallest GPU of which the weights take at most 85 %, or how many of the largest
    token    the bytes of all weights that one token reads, with every expert that it is routed to, and the least time
             that they take on that GPU, from its maker's bandwidth
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from dami.layers.kinds import LerpEmbedding, LerpExperts, kinds_of, readers
from dami.loading.packing import error_of
from dami.loading.preview import fitting, stored_bytes
from dami.loading.published import PublishedPair, pairs, recorded_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.gpus import GPUS
from benchmarks.machine import commit, processor
from benchmarks.record import RESULTS, latest, load, store, text_table
from dami_kernels import LerpWeight

SHOWN = ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-235B-A22B-Instruct-2507")
FORMATS = ("pair", "int8", "int4", "w8d4")
READ, WRITE, DISK = "read", "write", "disk"
BANDWIDTH = {gpu.name: gpu.memory for gpu in GPUS} | {  # bytes a second, of their makers' data sheets
    "RTX 4090": 1.008e12,
    "RTX 5090": 1.792e12,
    "L40S": 0.864e12,
    "A100 80 GB": 2.039e12,
}
FILE, CHUNK = 1 << 30, 1 << 24  # bytes
WEIGHT = (4096, 4096)


@dataclass(frozen=True)
class Need:
    """What a pair needs in a format: all of it computed.

    Attributes:
        pack, load: seconds.
        nbytes: of the weights.
        per_token: bytes of the weights that a token reads.
        gpus: those that hold the weights, as `fitting` names them.
        token: the least seconds of a token on these.
    """

    format: str
    pack: float
    load: float
    nbytes: int
    per_token: int
    gpus: str
    token: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure and record the rates of this machine first")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: that of /tmp")
    parser.add_argument("--bytes", type=int, default=FILE, help="size of the file that is read and written")
    parser.add_argument("--size", type=int, default=WEIGHT[0], help="rows and columns of the weight that is packed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if options.measure:
        store(measured(options.folder, options.bytes, options.size), options.results / "scale.csv")
    if not (found := rates(options.results)):
        raise SystemExit("no rates are recorded: measure them, --measure")
    for pair in shown():
        print(f"\n{pair.instruct} and {pair.thinking.partition('/')[2]}")
        print(text_table(table([pair], found)))


def measured(folder: Path | None, nbytes: int, size: int) -> list[dict[str, object]]:
    """Returns the rates of this machine and its disk, the best of three each."""
    common = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": processor(),
    }
    runs = [disk(folder, nbytes) for _ in range(3)]
    found = {(DISK, READ): max(run[0] for run in runs), (DISK, WRITE): max(run[1] for run in runs)}
    found |= {("pack", format): max(packing(format, size) for _ in range(3)) for format in FORMATS}
    return [common | {"what": what, "of": of, "per_second": f"{rate:.4g}"} for (what, of), rate in found.items()]


def disk(folder: Path | None, nbytes: int) -> tuple[float, float]:
    """Returns the bytes a second of reading a file that is not in the system's cache, and of writing it."""
    block = os.urandom(CHUNK)
    with TemporaryDirectory(dir=folder) as where:
        path = Path(where) / "file"
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(nbytes // CHUNK):
                file.write(block)
            os.fsync(file.fileno())
            written = time.perf_counter() - start
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass
        read = time.perf_counter() - start
    return nbytes / read, nbytes / written


def packing(format: str, size: int) -> float:
    """Returns how many weights are packed in a second of one core, with their error, as `dami.pack` does it."""
    base = (0.02 * torch.randn(size, size)).bfloat16()
    target = base + (0.0005 * torch.randn(size, size)).bfloat16()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    weight = LerpWeight.pack(base, target, format)
    error_of(weight, target)
    seconds = time.process_time() - start
    torch.set_num_threads(threads)
    return base.numel() / seconds


def rates(results: Path = RESULTS) -> dict[tuple[str, ...], float]:
    """Returns the rates measured last, by what and of what."""
    rows = latest(load(results / "scale.csv"), "what", "of")
    return {key: float(row["per_second"]) for key, row in rows.items()}


def shown() -> list[PublishedPair]:
    """Returns the pairs of the table."""
    return [pair for name in SHOWN for pair in pairs() if pair.instruct == name]


def skeleton(pair: PublishedPair) -> PreTrainedModel:
    """Returns the model of a pair without its weights, from its recorded config."""
    config = dict(recorded_config(pair.instruct) or {})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def needs(pair: PublishedPair, found: dict[tuple[str, ...], float]) -> list[Need]:
    """Computes what a pair needs in each format, at these rates."""
    model = skeleton(pair)
    dtype = torch.bfloat16
    read_by = readers(kinds_of(model, on_meta=True))
    text = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    head = model.get_output_embeddings().weight
    parameters = sum(tensor.numel() for _, tensor in tensors.values())
    result = []
    for format in FORMATS:
        nbytes = per_token = 0
        for name, tensor in tensors.values():
            kind = read_by[id(tensor)]
            own = stored_bytes(format, kind, name, tensor, dtype)
            nbytes += own
            if issubclass(kind, LerpExperts):
                per_token += own * chosen // len(tensor)
            elif kind is not LerpEmbedding or tensor is head:  # of an embedding, one row
                per_token += own
        read, write = found[DISK, READ], found[DISK, WRITE]
        pack = 2 * parameters * dtype.itemsize / read + parameters / found["pack", format] + nbytes / write
        gpus = fitting(nbytes)[0]
        number, _, name = gpus.rpartition(" × ")
        token = per_token / (int(number or 1) * BANDWIDTH[name])
        result.append(Need(format, pack, nbytes / read, nbytes, per_token, gpus, token))
    return result


def table(some: Sequence[PublishedPair], found: dict[tuple[str, ...], float]) -> list[list[str]]:
    """Returns the lines of a table of what pairs need, its head first."""
    lines = [["pair", "format", "weights, GB", "pack", "load", "fits on", "read per token, GB", "least ms per token"]]
    for pair in some:
        name = pair.instruct.partition("/")[2].replace("-Instruct", "")
        for need in needs(pair, found):
            numbers = f"{need.nbytes / 1e9:.1f}", lasting(need.pack), lasting(need.load), need.gpus
            lines.append([name, need.format, *numbers, f"{need.per_token / 1e9:.1f}", f"{1e3 * need.token:.2g}"])
    return lines


def lasting(seconds: float) -> str:
    """Returns a duration in a unit that suits it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
