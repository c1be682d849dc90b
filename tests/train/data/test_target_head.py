"""What a target does to its head's logits reaches every label, whichever family asks."""

from typing import Any

import pytest
import torch

from specx.train.data.batch import Batch
from specx.train.data.target_head import HeadTransform, head_transform
from specx.train.families.eagle1.objective import feature_loss
from specx.train.loss.target_distribution import Vocabulary, labels

from ..conftest import anchored, make_eagle1_spec, make_spec, new_draft


@pytest.fixture
def spec() -> Any:
    return make_spec()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, HeadTransform()),
        ({"logit_scale": 0.0625}, HeadTransform(scale=0.0625)),
        ({"logits_scaling": 8.0}, HeadTransform(scale=0.125)),
        ({"final_logit_softcapping": 30.0}, HeadTransform(softcap=30.0)),
        ({"final_logit_softcapping": None, "logit_scale": None}, HeadTransform()),
    ],
)
def test_the_transform_is_read_from_the_target_s_config(config: dict[str, Any], expected: HeadTransform) -> None:
    assert head_transform(config) == expected


def test_logits_are_scaled_and_then_capped() -> None:
    logits = torch.tensor([-100.0, 0.0, 1.0, 100.0])
    found = HeadTransform(scale=2.0, softcap=10.0)(logits)
    torch.testing.assert_close(found, 10 * (2 * logits / 10).tanh())
    assert HeadTransform()(logits) is logits


def test_labels_are_of_the_transformed_logits(batch: Batch, vocabulary: Vocabulary) -> None:
    transform = HeadTransform(scale=0.5, softcap=3.0)
    changed = Vocabulary(vocabulary.d2t, vocabulary.t2d, vocabulary.target_head, transform)
    tokens = torch.arange(10)
    plain, found = (labels(batch, tokens, each, torch.float32).logits for each in (vocabulary, changed))
    torch.testing.assert_close(found, transform(plain))


def test_a_draft_that_has_the_target_s_head_is_transformed_too(batch: Batch, embed_tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    draft: Any = new_draft(make_eagle1_spec())
    head = torch.randn(50, 32)
    ids = {"d2t": torch.zeros(50, dtype=torch.int64), "t2d": torch.ones(50, dtype=torch.bool), "target_head": head}
    assert batch.last_hidden is not None
    embedded, last = draft.embed(batch.input_ids, embed_tokens), batch.last_hidden.float()

    def loss(vocabulary: Vocabulary) -> float:
        (counts,) = feature_loss(draft, embedded, last, anchored(batch, 1), vocabulary, logit_loss_weight=1.0)
        return float(counts.loss.detach())

    scaled = Vocabulary(**ids, head_transform=HeadTransform(scale=0.5))
    halved = Vocabulary(**ids | {"target_head": head / 2})
    assert loss(scaled) == pytest.approx(loss(halved), rel=1e-5)
    assert loss(scaled) != pytest.approx(loss(Vocabulary(**ids)), rel=1e-2)
