"""Reads a checkpoint on disk: its config, and the headers and tensors of its files."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig, HfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from dami.loading import adapters
from dami.patching.compare import Header
from dami.patching.ties import TIES
from dami.sources import QUANT_METHOD, TWO_ENDS, local, quantization_in, read_object
from dami.upstream import tie_weights, ties_of

FILES = ["model*.safetensors", adapters.WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]


LEGACY_FILES = ["pytorch_model*.bin", adapters.LEGACY]

FP8 = "fp8"  # quant_method of checkpoints whose weights are FP8 with a scale for each block
DEQUANTIZABLE = (FP8, "mxfp4", "compressed-tensors")  # methods that transformers can undo while it loads
SCALE, UNUSED_SCALES = "_scale_inv", ("activation_scale", "input_scale")  # what an FP8 weight is stored with


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        directory: where its files are.
        name: its name on the hub, or the name of its directory or file.
        gguf: name of its GGUF file, None for any other checkpoint.
        trust_remote_code: whether its own modelling code may run.
        download: download options, those named in `sources.DOWNLOAD`.
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
        """Finds the checkpoint in a directory, a GGUF file or a hub repository, and downloads it if necessary.

        Args:
            source: where it is.
            trust_remote_code: whether its own modelling code may run.
            download: download options, and the `subfolder` of the directory or repository that it is in.
        """
        download = dict(download or {})
        subfolder = download.pop("subfolder", None) or ""
        path = local(source, subfolder)
        if path is not None and path.is_file():
            return cls(path.parent, path.name, path.name, trust_remote_code, download)
        if path is not None:
            return cls(path, path.resolve().name, None, trust_remote_code, download)
        name = f"{source}/{subfolder}".rstrip("/")
        for files in (FILES, LEGACY_FILES):
            patterns = [f"{subfolder}/{pattern}".lstrip("/") for pattern in files]
            directory = Path(snapshot_download(str(source), allow_patterns=patterns, **download), subfolder)
            if any(directory.glob("*.safetensors")):
                break
        if subfolder and not directory.is_dir():
            raise OSError(f"there is no checkpoint {name}")
        return cls(directory, name, None, trust_remote_code, download)

    @classmethod
    def at(cls, source: str | Path, options: Mapping[str, Any]) -> Checkpoint:
        """Finds a checkpoint as `find` does, with the options that `sources.per_end` returns for it."""
        download = {name: value for name, value in options.items() if name != "trust_remote_code"}
        return cls.find(source, bool(options.get("trust_remote_code")), download)

    @property
    def path(self) -> Path:
        """Its directory, or its GGUF file."""
        return self.directory / self.gguf if self.gguf else self.directory

    @property
    def _where(self) -> dict[str, Any]:
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        # The config may refer to code in another repository, to which the revision does not apply.
        download = {name: value for name, value in self.download.items() if name != "revision"}
        return {"trust_remote_code": self.trust_remote_code, **gguf, **download}

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA adapter rather than a whole model."""
        return (self.directory / adapters.CONFIG).exists()

    def config(self) -> PreTrainedConfig:
        """Returns a copy of its config, which is read once: a GGUF file takes seconds."""
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        if self.is_adapter:
            raise ValueError(
                f"instruct must be a whole checkpoint, got the adapter {self.directory}: name the checkpoint that it "
                "was trained on, and the adapter as the thinking end"
            )
        try:
            return AutoConfig.from_pretrained(self.directory, **self._where)
        except (OSError, ImportError):
            raise
        except Exception as error:  # a validator of transformers raises a class of its own
            raise ValueError(f"the config of {self.path} cannot be loaded: {error}") from error

    def parent(self) -> dict[str, str | None]:
        """Returns its name and the licence stated in its model card."""
        card = self.directory / "README.md"
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.exists() else None
        return {"name": self.name, "license": data and (data.get("license_name") or data.get("license"))}

    def skeleton(self, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """Returns its model without the weights, made from its own config or from another."""
        config = config or self.config()
        with torch.device("meta"):
            skeleton = _auto_class(config).from_config(config, trust_remote_code=self.trust_remote_code)
        tie_weights(skeleton)
        return skeleton

    def generation(self) -> GenerationConfig:
        """Returns how it generates unless told otherwise."""
        file = self.directory / "generation_config.json"
        if not file.exists():
            return GenerationConfig.from_model_config(self.config())
        try:
            return GenerationConfig.from_pretrained(self.directory)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be loaded: {error}") from error

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How its weights are quantised, as its config says; None if they are not, in a GGUF file or a pair."""
        if self.gguf is not None or self.is_adapter:
            return None
        quantization = quantization_in(self.directory / "config.json")
        ours = (QUANT_METHOD, TWO_ENDS)
        return None if not quantization or quantization.get("quant_method") in ours else quantization

    def dequantizing(self) -> Any:
        """Returns transformers' settings for loading it dequantised.

        Raises ValueError, TypeError or ImportError if transformers cannot do that, or not here.
        """
        return AutoQuantizationConfig.from_dict({**(self.quantization or {}), "dequantize": True})

    def dequantizer(self) -> tuple[HfQuantizer, str] | None:
        """Returns what undoes its quantisation in transformers, and the dtype that its weights have then.

        None if `read` does, nothing does, or it is not quantised.
        """
        method = (self.quantization or {}).get("quant_method")
        if method == FP8 or method not in DEQUANTIZABLE:
            return None
        try:
            quantizer = AutoHfQuantizer.from_config(self.dequantizing(), pre_quantized=True)
            quantizer.validate_environment(device_map=None)
        except (ImportError, ValueError, TypeError):  # `policies.quantisation` tells it
            return None
        return quantizer, self.dtype

    @property
    def dtype(self) -> str:
        """The name of the dtype that its config says that its weights have when they are not quantised."""
        return str(getattr(self.config(), "dtype", None) or torch.bfloat16).removeprefix("torch.")

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Returns its tokenizer, or None if it has none. Raises ValueError if it cannot be loaded."""
        if self.gguf is None and not any(self.directory.glob("*token*")):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.directory, **self._where)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"the tokenizer of {self.path} cannot be loaded: {error}") from error

    def model(self, **options: Any) -> PreTrainedModel:
        """Loads the checkpoint with transformers, dequantised if it is quantised.

        Raises ValueError if that would leave a parameter randomly initialised.
        """
        if self.quantization is not None:
            options["quantization_config"] = self.dequantizing()
        if self.gguf and hasattr(transformers, "GgufConfig"):  # newer versions may keep the file's blocks
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with warnings.catch_warnings():  # that the checkpoint is quantised already
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            loaded: Any = _auto_class(options.get("config") or self.config()).from_pretrained(
                self.directory, output_loading_info=True, **self._where, **options
            )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"{self.directory} lacks {len(info['missing_keys'])} tensors: {sorted(info['missing_keys'])}"
            )
        return model.eval()

    def has_own_head(self, skeleton: PreTrainedModel) -> bool:
        """Returns whether its head is untied: by its config or, as in transformers, by stored weights that differ."""
        if not getattr(self.config(), TIES, False):
            return True
        stored, prefix = self.stored, f"{skeleton.base_model_prefix}."
        for tied in ties_of(skeleton).items():
            both = [next((n for n in (name, name.removeprefix(prefix)) if n in stored), None) for name in tied]
            if both[0] and both[1] and not torch.equal(self.read(both[0]), self.read(both[1])):
                return True
        return False

    @cached_property
    def index(self) -> dict[str, str] | None:
        """The file that each tensor is in, by name; None without an index. Raises ValueError if it is damaged."""
        file = self.directory / SAFE_WEIGHTS_INDEX_NAME
        if not file.exists():
            return None
        places = read_object(file).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{file} must have a weight_map, which names the file of each tensor, got {places!r:.80}")
        return places

    def files(self) -> dict[Path, list[str] | None]:
        """Returns its safetensors files, each with the tensor names its index lists, or None without an index.

        Raises ValueError if the index is damaged.
        """
        if self.index is None:
            single = self.directory / SAFE_WEIGHTS_NAME
            return {single: None} if single.exists() and self.gguf is None else {}
        files: dict[Path, list[str] | None] = {}
        for name, file in self.index.items():
            files.setdefault(self.directory / file, []).append(name)  # type: ignore[union-attr]
        return files

    @cached_property
    def stored(self) -> dict[str, Header]:
        """Shape and dtype of every tensor in its files by name; {} if they are not in safetensors.

        Raises:
            ValueError: files are missing or corrupt, or lack tensors that the index lists; all are named.
        """
        headers: dict[str, Header] = {}
        faults = []
        for file, promised in self.files().items():
            if not file.exists():
                faults.append(f"{file} is missing, the index names it")
                continue
            try:
                found = headers_in(file)
            except ValueError as error:
                faults.append(str(error))
                continue
            except OSError as error:
                faults.append(f"{file} cannot be read: {error}")
                continue
            headers |= found
            if absent := set(promised or ()) - found.keys():
                faults.append(f"{file} lacks {sorted(absent)}, which the index promises")
        if faults:
            raise ValueError("\n  ".join([f"the checkpoint {self.directory} is damaged:", *faults]))
        return headers

    def has_weights(self) -> bool:
        """Whether there is a file that transformers reads weights from."""
        return self.gguf is not None or bool(self.files()) or any(self.directory.glob(LEGACY_FILES[0]))

    def check(self) -> None:
        """Raises what `stored` raises if its files are damaged."""
        _ = self.stored

    def headers(self) -> dict[str, Header]:
        """Returns shape and dtype of every tensor that `read` gives, by stored name, from file headers only.

        An FP8 weight has the dtype that its config names, and its scales are left out. {} if the checkpoint is not in
        safetensors, or in a quantisation that nothing undoes tensor by tensor.

        Raises:
            ValueError: as in `stored`.
        """
        stored = self.stored
        if self.quantization is None:
            return stored
        if self.quantization.get("quant_method") != FP8:
            return {} if self.dequantizer() is None else stored
        return {
            name: (shape, self.dtype if name + SCALE in stored else kept)
            for name, (shape, kept) in stored.items()
            if not name.endswith((SCALE, *UNUSED_SCALES))
        }

    @cached_property
    def _places(self) -> dict[str, Path]:
        return {name: file for file in self.files() for name in headers_in(file)}

    def identity(self) -> list[object]:
        """Returns what changes if its weights do: here, names, sizes and times of its files."""
        files = [file.stat() for file in self.files()]
        return [str(self.path), [[file.st_size, file.st_mtime_ns] for file in files]]

    def place(self, name: str) -> Path:
        """Returns the file that a stored tensor is in."""
        return self._places[name]

    def stored_rows(self, name: str, rows: slice) -> Tensor:
        """Returns some rows of a tensor as it is stored, as a view of its file on the CPU."""
        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name) if rows == slice(None) else file.get_slice(name)[rows]

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Returns a stored tensor, or some of its rows, on the CPU.

        A plain tensor is a view of its file. An FP8 weight comes as float32, the product of codes and scales, which
        rounded to a model's dtype has the bits that transformers gives it.
        """
        tensor = self.stored_rows(name, rows)
        if self.quantization is None or name + SCALE not in self._places:
            return tensor
        scale = self.stored_rows(name + SCALE, slice(None))
        scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
        if scale.numel() > 1:
            shape, _ = self.stored[name]
            blocks = self.quantization.get("weight_block_size") or (1, 1)
            scale = _each(scale, shape[-2], blocks[0], -2)[rows]
            scale = _each(scale, shape[-1], blocks[1], -1)
        return tensor.float() * scale


def _auto_class(config: PreTrainedConfig) -> Any:
    """Returns the class of transformers that makes a config's model: a causal one, or else one of images and text."""
    kind = type(config)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _each(scale: Tensor, size: int, block: int, dim: int) -> Tensor:
    """Repeats the scales of blocks along a dimension of the weight; `block` counts where it fits their number."""
    number = scale.shape[dim]
    return scale.repeat_interleave(block if -(-size // block) == number else size // number, dim).narrow(dim, 0, size)


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
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
}


def headers_in(file: Path) -> dict[str, Header]:
    """Returns shape and dtype of every tensor in a safetensors file by name, from the file's header only.

    Raises:
        ValueError: the file is corrupt.
        OSError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: (list(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt: {error}") from error
