"""Loading a pair of checkpoints: both are checked before any weight is read, the second is read tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dami import adapters
from dami.dial import patch_of
from dami.layers import LerpConv1D, LerpExperts, LerpLinear
from dami.model import Origin, attach
from dami.patching import (
    TIES,
    Header,
    config_mismatches,
    first_names,
    headers_of,
    interpolate,
    patch_model,
    tensor_mismatches,
)
from dami.sources import FOLDER, SETTINGS, check_end, check_packed, local
from dami.sources import example_pair as example_pair
from dami_kernels import formats

FILES = ["model*.safetensors", adapters.WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]
FILES.append(f"{FOLDER}/*")
LEGACY_FILES = ["pytorch_model*.bin"]
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
PARALLEL = ("distributed_config", "tp_plan", "tp_size", "device_mesh")
LOADING = {  # options of `from_pretrained` that mean the same for a pair; it also takes any setting of the config
    *("attn_implementation", "experts_implementation", "max_memory", "offload_folder", "offload_buffers"),
    *("low_cpu_mem_usage", "use_safetensors", "weights_only", "disable_mmap", "generation_config"),
    *("use_kernels", "allow_all_kernels", "kernel_config", *PARALLEL),
}

logger = logging.get_logger(__name__)


def load_pair(
    instruct: str | Path,
    thinking: str | Path | None = None,
    format: str | None = None,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str = "auto",
    chat_template: Literal["instruct", "thinking"] = "instruct",
    invariant: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Loads two checkpoints of one architecture as one patched model, with the instruct end's tokenizer.

    The instruct end is loaded as usual; the thinking end is read tensor by tensor, each going straight to the device
    and dtype of its base, so that no third copy exists at any time. Everything that does not match is reported at once,
    from the configs, the tokenizers and the headers of the weight files, before any weight is read.

    One argument is a packed pair, as `dami.pack` and `dami.save_pair` write it: what is stored is loaded as it is.

    An estimator and presets that `dami train-estimator` has put into the folder `intensity` of the packed pair, or of
    the thinking end, are attached.

    Args:
        instruct: directory, GGUF file or hub name of the λ=0 end; or directory or hub name of a packed pair.
        thinking: likewise of the λ=1 end; or a LoRA adapter on the λ=0 end, as PEFT saves it, which `format="lowrank"`
            keeps as it is. None if `instruct` is a packed pair.
        format: how embeddings and linear weights are stored, a name of `dami_kernels.formats.names()`. `"pair"` if
            None; a packed pair has its own.
        device_map: as in transformers' `from_pretrained`. The CPU if None. Only a packed pair can be offloaded.
        dtype: as there; "auto" is the dtype of the checkpoints, which then must agree.
        chat_template: the end whose chat template the tokenizer uses unless told otherwise. Where they differ, it knows
            both by their names: `tokenizer.apply_chat_template(…, chat_template="thinking")`.
        invariant: as in `patch_model`.
        trust_remote_code: as in `from_pretrained`.
        options: `revision` (one for both ends, or a pair), `token`, `cache_dir`, `force_download` and
            `local_files_only` for whatever is downloaded; and arguments of `from_pretrained` such as
            `attn_implementation`, settings of the config included.

    Returns:
        (model, tokenizer): the model as `dami.patch_model` returns it, in evaluation mode; the tokenizer is None if the
        instruct end comes without one.

    Raises:
        TypeError: an option is unknown, or cannot be right for a pair.
        ValueError: the ends do not match, a shard is missing, a file is corrupt, or a tensor that differs cannot be
            interpolated; the message names them all.
        OSError: there is no such directory, file or hub name.
    """
    if chat_template not in ("instruct", "thinking"):
        raise ValueError(f"chat_template must be 'instruct' or 'thinking', got {chat_template!r}")
    formats.get(format or "pair")
    downloads = downloads_of({name: options.pop(name) for name in DOWNLOAD if name in options}, thinking is not None)
    if thinking is not None and (split := set(PARALLEL) & options.keys()):
        raise ValueError(f"{sorted(split)} need a packed pair, which dami.pack makes of two checkpoints")
    first = Checkpoint.find(instruct, trust_remote_code, downloads[0])
    _check_options(options, first)
    loaded = {"device_map": device_map, "dtype": dtype, **options}
    if thinking is None:
        return _load_packed(first, format, chat_template, invariant, **loaded)
    ends = first, Checkpoint.find(thinking, trust_remote_code, downloads[1])
    if ends[1].is_adapter:
        model, tokenizers = _load_adapted(*ends, format or "pair", invariant, **loaded)
    else:
        match = Match.of(*ends, dtypes=dtype == "auto")
        model, tokenizers = ends[0].model(**loaded), match.tokenizers
        if match.stored[1].complete:
            tensors = ends[1].tensors(match.stored[1].names)
            interpolate(model, tensors, format or "pair", invariant=invariant, owned=True)
        else:
            logger.warning(f"{thinking} is not stored as the model is: loading it as a second model on the CPU first")
            patch_model(model, ends[1].model(dtype=model.dtype, **options), format or "pair", invariant=invariant)
    tokenizer = with_both_templates(tokenizers, chat_template)
    patch_of(model).origin = Origin([end.parent() for end in ends], tokenizer=tokenizer)
    return _with_estimator(model, ends[1]), tokenizer


def downloads_of(options: Mapping[str, Any], two: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the downloads of the instruct end and of the thinking end; TypeError if they are others."""
    if unknown := options.keys() - set(DOWNLOAD):
        raise TypeError(f"options must be of {list(DOWNLOAD)}, got {sorted(unknown)}")
    revision = options.get("revision")
    revisions = revision if isinstance(revision, (tuple, list)) else (revision, revision)
    if len(revisions) != 2 or not (two or revisions is not revision):
        raise TypeError(f"revision must be one, or a pair for a pair of checkpoints, got {revision!r}")
    if revision is None:
        return dict(options), dict(options)
    return {**options, "revision": revisions[0]}, {**options, "revision": revisions[1]}


def _check_options(options: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuses options that `from_pretrained` would drop, or that cannot be right for two ends."""
    unknown = [name for name in options if name not in LOADING]
    if unknown:
        settings = checkpoint.config().to_dict().keys() - {"quantization_config"}
        unknown = [name for name in unknown if name not in settings]
    if unknown:
        raise TypeError(
            f"options must be settings of the config, or of {sorted({*DOWNLOAD, *LOADING})}, got {unknown}; "
            "what load_pair cannot find by itself, such as a subfolder, download first and name its directory"
        )


def _with_estimator(model: Any, where: Checkpoint) -> Any:
    """The model with the estimator and presets that lie beside its weights, if any do."""
    directory = where.directory / FOLDER
    return attach(model, directory) if (directory / SETTINGS).exists() else model


def _load_packed(
    pair: Checkpoint, format: str | None, chat_template: str, invariant: bool, **options: Any
) -> tuple[Any, Any]:
    """`load_pair` where both ends are packed in one directory."""
    check_packed(pair.path, format)
    model, tokenizer = pair.model(**options), pair.tokenizer()
    if tokenizer is not None and isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template
        templates["default"] = templates.get(chat_template, templates["default"])
    patch_of(model).running.invariant = invariant
    for module in model.modules():
        if isinstance(module, (LerpLinear, LerpConv1D, LerpExperts)) and invariant:
            module.lerp.settings["invariant"] = True
    patch_of(model).origin.tokenizer = tokenizer
    return _with_estimator(model, pair), tokenizer


def _load_adapted(
    instruct: Checkpoint, thinking: Checkpoint, format: str, invariant: bool, **options: Any
) -> tuple[Any, tuple[Any, Any]]:
    """The model and both tokenizers where the λ=1 end is a LoRA adapter on the λ=0 end."""
    adapter = adapters.Adapter.read(thinking.directory)
    mismatches = adapter.mismatches(instruct.skeleton())
    if mismatches:
        raise ValueError("\n  ".join([f"{instruct.directory} and {thinking.directory} do not match:", *mismatches]))
    model, tokenizers = instruct.model(**options), (instruct.tokenizer(), thinking.tokenizer())
    interpolate(model, adapter.tensors(model), format, invariant=invariant, owned=True)
    return model, tokenizers


def with_both_templates(tokenizers: tuple[Any, Any], default: str) -> Any:
    """The instruct end's tokenizer, with both ends' chat templates by name where they differ; None if there is none."""
    tokenizer, other = tokenizers
    if tokenizer is not None and other is not None and tokenizer.chat_template != other.chat_template:
        templates = {"instruct": tokenizer.chat_template, "thinking": other.chat_template}
        templates = {name: template for name, template in templates.items() if template}
        tokenizer.chat_template = {"default": templates.get(default, next(iter(templates.values()))), **templates}
    return tokenizer


@dataclass(frozen=True)
class Match:
    """Two checkpoints that go together.

    Attributes:
        ends: the instruct end and the thinking end.
        skeleton: the instruct end's model without its weights.
        tokenizers: of both, None for an end without one.
        stored: what each stores.
    """

    ends: tuple[Checkpoint, Checkpoint]
    skeleton: PreTrainedModel
    tokenizers: tuple[Any, Any]
    stored: tuple[Stored, Stored]

    @classmethod
    def of(cls, instruct: Checkpoint, thinking: Checkpoint, dtypes: bool = True) -> Match:
        """Compares configs, tokenizers and the headers of the weight files; `dtypes`: whether they have to agree.

        Raises:
            ValueError: they do not match, which names everything, or files are damaged.
        """
        ends = instruct, thinking
        for end in ends:
            check_end(end.path)
        configs = [end.config() for end in ends]
        tokenizers = instruct.tokenizer(), thinking.tokenizer()
        skeleton = instruct.skeleton()
        headers = [end.headers() for end in ends]
        stored = Stored.of(skeleton, headers[0]), Stored.of(skeleton, headers[1])

        own_heads = [end.has_own_head(skeleton) for end in ends]
        mismatches = config_mismatches(configs[0], configs[1]) + vocabulary_mismatches(*tokenizers)
        if configs[0].model_type == configs[1].model_type and headers[1]:
            known = [{**end.headers, **end.strangers} for end in stored]
            if not headers[0]:  # not in safetensors: its shapes are the model's
                shapes = headers_of(skeleton)
                known[0] = {name: shapes[name] for name in first_names(skeleton).values()}
            mismatches += tensor_mismatches(known[0], known[1], dtypes=dtypes and bool(headers[0]))
            if stored[1].complete:
                both = stored[0].strangers.keys() & stored[1].strangers.keys()
                mismatches += [f"{name}: in both ends, but not in the model" for name in sorted(both)]
        if any(own_heads) and any(getattr(config, TIES, False) for config in configs):
            # One end's head is tied to its embedding, and the other's is not, whatever the configs say.
            apart = {f"config.{TIES}", *(skeleton._tied_weights_keys or {})}
            mismatches = [line for line in mismatches if line.partition(":")[0] not in apart]
            stored = replace(stored[0], complete=False), replace(stored[1], complete=False)
        if mismatches:
            names = f"{instruct.directory} and {thinking.directory}"
            raise ValueError("\n  ".join([f"{names} do not match:", *mismatches]))
        return cls(ends, skeleton, tokenizers, stored)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        directory: where its files are.
        name: what others know it by: its name on the hub, or that of its directory or file.
        gguf: name of its GGUF file, None for any other.
        trust_remote_code: whether its own modelling code may run.
        download: options of what is downloaded, `DOWNLOAD`.
    """

    directory: Path
    name: str
    gguf: str | None = None
    trust_remote_code: bool = False
    download: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def find(
        cls, source: str | Path, trust_remote_code: bool = False, download: Mapping[str, Any] | None = None
    ) -> Checkpoint:
        """The checkpoint in a directory, a GGUF file or a hub repository, which is downloaded if need be."""
        path, download = local(source), download or {}
        if path is not None and path.is_file():
            return cls(path.parent, path.name, path.name, trust_remote_code, download)
        if path is not None:
            return cls(path, path.resolve().name, None, trust_remote_code, download)
        directory = Path(snapshot_download(str(source), allow_patterns=FILES, **download))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(str(source), allow_patterns=LEGACY_FILES, **download))
        return cls(directory, str(source), None, trust_remote_code, download)

    @property
    def path(self) -> Path:
        """Its directory, or its GGUF file."""
        return self.directory / self.gguf if self.gguf else self.directory

    @property
    def _where(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        # for code that the config names in another repository, of which the revision is not
        download = {name: value for name, value in self.download.items() if name != "revision"}
        return {"trust_remote_code": self.trust_remote_code, **gguf, **download}

    @property
    def is_adapter(self) -> bool:
        """Whether it is no model of its own, but a LoRA adapter."""
        return (self.directory / adapters.CONFIG).exists()

    def config(self) -> PreTrainedConfig:
        if self.is_adapter:
            raise ValueError(
                f"instruct must be a whole checkpoint, got the adapter {self.directory}: name the checkpoint that it "
                "was trained on, and the adapter as the thinking end"
            )
        return AutoConfig.from_pretrained(self.directory, **self._where)

    def parent(self) -> dict[str, str | None]:
        """Its name, and the licence that its model card states."""
        card = self.directory / "README.md"
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.exists() else None
        return {"name": self.name, "license": data and (data.get("license_name") or data.get("license"))}

    def skeleton(self) -> PreTrainedModel:
        """Its model without the weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config(), trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> Any:
        """Its tokenizer, or None if it comes without one."""
        if self.gguf is None and not any(self.directory.glob("*token*")):
            return None
        return AutoTokenizer.from_pretrained(self.directory, **self._where)

    def model(self, **options: Any) -> PreTrainedModel:
        """The checkpoint as transformers loads it; ValueError if that would leave a parameter at random."""
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.directory, output_loading_info=True, **self._where, **options
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{self.directory} lacks {len(info['missing_keys'])} tensors: {sorted(info['missing_keys'])}"
            )
        return model.eval()

    def has_own_head(self, skeleton: PreTrainedModel) -> bool:
        """Whether no tie holds: not by its config, nor where both weights are stored and differ, as in transformers."""
        if not getattr(self.config(), TIES, False):
            return True
        files = {name: file for file in self.files() for name in headers_in(file)}
        prefix = f"{skeleton.base_model_prefix}."
        for tied in (skeleton._tied_weights_keys or {}).items():
            both = [next((n for n in (name, name.removeprefix(prefix)) if n in files), None) for name in tied]
            if all(both):
                tensors = []
                for name in filter(None, both):
                    with safe_open(files[name], framework="pt") as file:
                        tensors.append(file.get_tensor(name))
                if not torch.equal(*tensors):
                    return True
        return False

    def files(self) -> dict[Path, list[str] | None]:
        """Its safetensors files, each with the names its index promises, None where there is no index."""
        index = self.directory / "model.safetensors.index.json"
        if not index.exists():
            single = self.directory / "model.safetensors"
            return {single: None} if single.exists() and self.gguf is None else {}
        files: dict[Path, list[str] | None] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(self.directory / file, []).append(name)  # type: ignore[union-attr]
        return files

    def headers(self) -> dict[str, Header]:
        """Shape and dtype of every stored tensor by name, from the files' headers only; {} if it is not in safetensors.

        Raises:
            ValueError: files are missing or corrupt, or lack what the index promises; all are named.
        """
        headers: dict[str, Header] = {}
        faults = []
        for file, promised in self.files().items():
            if not file.exists():
                faults.append(f"{file} is missing, the index names it")
                continue
            try:
                found = headers_in(file)
            except (SafetensorError, OSError) as error:
                faults.append(f"{file} is corrupt: {error}")
                continue
            headers |= found
            if absent := set(promised or ()) - found.keys():
                faults.append(f"{file} lacks {sorted(absent)}, which the index promises")
        if faults:
            raise ValueError("\n  ".join([f"the checkpoint {self.directory} is damaged:", *faults]))
        return headers

    def tensors(self, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors on the CPU, views of their files, one at a time, each under its name in the model."""
        with logging.tqdm(total=len(names), desc=f"Reading {self.directory.name}") as bar:
            for file in self.files():
                with safe_open(file, framework="pt") as tensors:
                    for name in names.keys() & set(tensors.keys()):
                        yield names[name], tensors.get_tensor(name)
                        bar.update()


DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def headers_in(file: Path) -> dict[str, Header]:
    """Shape and dtype of every tensor in a safetensors file by name, read from its header only."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: (list(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }


def vocabulary_mismatches(instruct: Any, thinking: Any) -> list[str]:
    """One line if two tokenizers give tokens different ids; an end without a tokenizer matches any."""
    if instruct is None or thinking is None:
        return []
    ends = [tokenizer.get_vocab() for tokenizer in (instruct, thinking)]
    differ = sorted(token for token in ends[0].keys() | ends[1].keys() if ends[0].get(token) != ends[1].get(token))
    if not differ:
        return []
    return [f"tokenizer: {len(differ)} tokens have another id or are in one vocabulary only, such as {differ[:5]}"]


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's stored tensors are in the model.

    Attributes:
        names: the model's name of each tensor, by the stored name; of tied ones only one, under the first's name.
        headers: shape and dtype by the model's name.
        strangers: shape and dtype of what the model does not know, by the stored name.
        complete: whether every tensor of the model is there.
    """

    names: dict[str, str]
    headers: dict[str, Header]
    strangers: dict[str, Header]
    complete: bool

    @classmethod
    def of(cls, skeleton: PreTrainedModel, headers: Mapping[str, Header]) -> Stored:
        """Finds each stored tensor in the model, with or without the prefix of the base model."""
        firsts = first_names(skeleton)
        prefix = f"{skeleton.base_model_prefix}."
        ignored = re.compile("|".join(skeleton._keys_to_ignore_on_load_unexpected or ["(?!)"]))
        found: dict[str, str] = {}  # stored name by the model's
        strangers = {}
        for name, header in headers.items():
            known = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in firsts), None)
            if known is not None and (known == firsts[known] or firsts[known] not in found):
                found[firsts[known]] = name  # of tied ones the first, as transformers takes it
            elif known is None and not ignored.search(name):
                strangers[name] = header
        return cls(
            names={name: known for known, name in found.items()},
            headers={known: headers[name] for known, name in found.items()},
            strangers=strangers,
            complete=found.keys() == set(firsts.values()),
        )
