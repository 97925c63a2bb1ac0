from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vlmdefend.models import load_model
from vlmdefend.models.clip.contiguous import BatchFirstAttention, FirstTokenPool, use_contiguous_attention

pytestmark = pytest.mark.numerics


def plain(folder: Path) -> Any:
    return open_clip.create_model(f"local-dir:{folder}").eval()


def gradient(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    pixels = images.clone().requires_grad_(True)
    features = model.encode_image(pixels, normalize=False)
    return features.detach(), torch.autograd.grad(features.square().sum(), pixels)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_features_gradients_and_texts_equal_plain_open_clips(
    folders: dict[str, Path], images: Tensor, kind: str
) -> None:
    reference, model = plain(folders[kind]), load_model(f"local-dir:{folders[kind]}", device="cpu").clip
    for ours, theirs in zip(gradient(model, images), gradient(reference, images), strict=True):
        assert relative(ours, theirs) < 2e-6
    texts = open_clip.get_tokenizer(f"local-dir:{folders[kind]}")(["a photo of a cat.", "a dog"])
    with torch.no_grad():
        assert relative(model.encode_text(texts), reference.encode_text(texts)) < 1e-6


def test_the_attention_is_exchanged_and_names_stay(folders: dict[str, Path]) -> None:
    for kind, replaced, count in (("vit", BatchFirstAttention, 4), ("rn", FirstTokenPool, 1)):
        model = load_model(f"local-dir:{folders[kind]}", device="cpu").clip
        assert list(model.state_dict()) == list(plain(folders[kind]).state_dict())
        assert sum(type(m) is replaced for m in model.modules()) == count


def test_a_forward_without_gradients_gives_the_same_bits_as_one_with(folders: dict[str, Path], images: Tensor) -> None:
    for kind in ("vit", "rn"):
        model = load_model(f"local-dir:{folders[kind]}", device="cpu").clip
        with torch.no_grad():
            without = model.encode_image(images)
        assert torch.equal(without, gradient(model, images)[0])


def test_frozen_weights_are_multiplied_by_mm_not_bmm(folders: dict[str, Path], images: Tensor) -> None:
    def products(model: Any) -> int:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            gradient(model, images)
        return sum(event.count for event in profiler.key_averages() if event.key == "aten::bmm")

    frozen = plain(folders["vit"]).requires_grad_(False)
    assert products(frozen) > 0
    assert products(load_model(f"local-dir:{folders['vit']}", device="cpu").clip) == 0


def test_frozen_weights_keep_fewer_activations(folders: dict[str, Path], images: Tensor) -> None:
    def kept(model: Any) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encode_image(images.clone().requires_grad_(True))
        return sum(seen.values())

    model = load_model(f"local-dir:{folders['vit']}", device="cpu").clip
    assert kept(model) < 0.8 * kept(plain(folders["vit"]))


def test_other_uses_of_the_module_are_the_parents() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    ours = copy.deepcopy(theirs)
    use_contiguous_attention(ours)
    assert type(ours) is BatchFirstAttention
    x, other = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    causal = torch.ones(5, 5).triu(1).bool()
    for arguments, options in (
        ((x, x, x), {}),
        ((x, other, other), {"need_weights": False}),
        ((x, x, x), {"need_weights": False, "attn_mask": causal}),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.zeros(5, 5).masked_fill(causal, -torch.inf)}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])}),
        ((x[0], x[0], x[0]), {"need_weights": False}),
    ):
        outputs, expected = ours(*arguments, **options), theirs(*arguments, **options)
        torch.testing.assert_close(outputs[0], expected[0])
        assert (outputs[1] is None) == (expected[1] is None)
