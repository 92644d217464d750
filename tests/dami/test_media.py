"""Images in a batch at several λ: those of each sequence are computed at its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dami
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.dami.architectures import LAM, distance, merged, perturbed

IMAGE, VIDEO, TEXT = 90, 91, {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
IMAGES = (1, 0, 2, 1)  # of each sequence
TOKENS = 4  # of an image


def qwen3_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "patch_size": 4}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, **HEADS, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**TEXT, **HEADS, "query_pre_attn_scalar": 8, "sliding_window": 8},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=TOKENS,
        image_token_id=IMAGE,
        boi_token_id=92,
        eoi_token_id=93,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **TEXT, **HEADS},
        vision_config={**vision, "num_attention_heads": 4, "head_dim": 8, "image_size": 32, "patch_size": 4},
        image_token_id=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


FAMILIES = {"qwen3_vl": qwen3_vl, "gemma3": gemma3, "mistral3": mistral3}


def ends(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(1)
    return perturbed(FAMILIES[family]().eval())


def prompts(images: tuple[int, ...] = IMAGES, length: int = 14) -> Tensor:
    """Random tokens, with places for the images of each sequence, and a word between two images."""
    ids = torch.randint(4, 80, (len(images), length))
    for row, number in enumerate(images):
        for first in range(2, 2 + (TOKENS + 1) * number, TOKENS + 1):
            ids[row, first : first + TOKENS] = IMAGE
    return ids


def inputs(family: str, images: tuple[int, ...] = IMAGES) -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids, number = prompts(images), sum(images)
    if family == "qwen3_vl":
        patches = torch.randn(number * 4 * TOKENS, 3 * 2 * 4 * 4)
        grid = torch.tensor([[1, 4, 4]] * number)
        kinds = (ids == IMAGE).int()
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if family == "gemma3":
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(number, 3, 16, 16),
            "token_type_ids": (ids == IMAGE).long(),
        }
    sizes = torch.tensor([[16, 16]] * number)
    return {"input_ids": ids, "pixel_values": torch.randn(number, 3, 16, 16), "image_sizes": sizes}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_images_follow_the_lam_of_their_sequence(family: str) -> None:
    plain, batch = ends(family), inputs(family)
    expected = [merged(*plain, lam)(**batch).logits[row] for row, lam in enumerate(LAM)]
    other = merged(*plain, LAM[1])(**batch).logits
    model = dami.patch_model(*plain)
    found = model(**batch, intensity=list(LAM)).logits
    for row, lam in enumerate(LAM):
        assert distance(found[row], expected[row]) < 1e-4, lam
    assert distance(other[2], expected[2]) > 1e-3
    assert distance(model(**batch, intensity=LAM[1]).logits, other) < 1e-4
    assert not any("get_image_features" in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_answers_about_images(family: str) -> None:
    plain, batch = ends(family), inputs(family)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = [merged(*plain, lam).generate(**batch, **options).logits for lam in LAM]
    found = dami.patch_model(*plain).generate(**batch, intensity=list(LAM), **options).logits
    for row, lam in enumerate(LAM):
        for step in range(3):
            assert distance(found[step][row], expected[row][step][row]) < 1e-4, (lam, step)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_images_are_read_at_the_lam_of_the_prompts() -> None:
    plain, batch = ends("gemma3"), inputs("gemma3")
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = [merged(*plain, lam)(**batch).logits[row, -1] for row, lam in enumerate(LAM)]
    model = dami.patch_model(*plain)
    found = model.generate(**batch, intensity=0.8, prompt_intensity=list(LAM), prompt_tail=0, **options).logits[0]
    for row in range(len(LAM)):
        assert distance(found[row], expected[row]) < 1e-4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_images_of_several_sizes() -> None:
    """An image of eight tokens and one of four; two of four in a sequence of their own."""
    plain = ends("mistral3")
    model = dami.patch_model(*ends("mistral3"))
    ids = torch.randint(4, 80, (2, 14))
    ids[0, 1:9], ids[1, 1:9] = IMAGE, IMAGE
    batch = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 32, 16)}
    batch["image_sizes"] = torch.tensor([[32, 16], [16, 16], [16, 16]])
    lams = [0.0, 1.2]
    expected = [merged(*plain, lam)(**batch).logits[row] for row, lam in enumerate(lams)]
    found = model(**batch, intensity=lams).logits
    for row in range(2):
        assert distance(found[row], expected[row]) < 1e-4


@pytest.mark.filterwarnings("ignore:.*could not be checked")
def test_images_that_nothing_tells_apart() -> None:
    model = dami.patch_model(*ends("gemma3"))
    batch = inputs("gemma3")
    batch["input_ids"][0, 5] = 3  # a place too few
    with pytest.raises(ValueError, match=r"the 4 images of a batch at several .* got \[3, 0, 8, 4\] tokens"):
        model(**batch, intensity=list(LAM))
    with pytest.raises(ValueError, match="audio_values takes one intensity for the batch"):
        model(**inputs("gemma3"), audio_values=torch.ones(4), intensity=list(LAM))


def test_a_pair_with_a_vision_tower_is_packed_and_loaded(tmp_path: Path) -> None:
    """transformers has no causal class for Qwen3-VL: its model is one of images and text."""
    plain = ends("qwen3_vl")
    for model, name in zip(plain, ("a", "b"), strict=True):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    packed = dami.pack(tmp_path / "a", tmp_path / "b", tmp_path / "packed", "pair")
    assert (packed / "preprocessor_config.json").exists()
    batch = inputs("qwen3_vl")
    expected = dami.patch_model(*plain)(**batch, intensity=0.37).logits
    for sources in ((packed,), (tmp_path / "a", tmp_path / "b")):
        model, _ = dami.load_pair(*sources)
        assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
        assert torch.equal(model(**batch, intensity=0.37).logits, expected)
