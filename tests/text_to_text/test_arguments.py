"""What generation is told by the flags, and by the checkpoint where they say nothing."""

import pytest
from transformers import GenerationConfig

from text_to_text.arguments import WritingTrainingArguments, tell


def told(folder, checkpoint=None, **flags) -> GenerationConfig:
    """What a checkpoint says of its own, and then the flags; targets have 20 tokens at most."""
    generation = GenerationConfig(**(checkpoint or {"max_new_tokens": 5, "min_new_tokens": 2, "num_beams": 3}))
    tell(generation, WritingTrainingArguments(str(folder), use_cpu=True, **flags).generation_fields(), 20)
    return generation


@pytest.mark.parametrize(
    ("checkpoint", "flags", "lengths"),
    [
        ({"max_new_tokens": 5}, {}, (None, 5)),
        ({"max_new_tokens": 5}, {"generation_max_length": 12}, (12, None)),
        ({"max_length": 142}, {}, (142, None)),
        ({"max_length": 142}, {"generation_max_length": 12}, (12, None)),
        ({"num_beams": 3}, {}, (20, None)),
    ],
)
def test_the_longest_text_is_the_flags_or_the_checkpoints_or_as_long_as_targets(checkpoint, flags, lengths, tmp_path):
    found = told(tmp_path, checkpoint, **flags)
    assert (found.max_length, found.max_new_tokens) == lengths


def test_a_least_number_of_new_tokens_stays_unless_a_least_length_is_given(tmp_path):
    assert told(tmp_path).min_new_tokens == 2
    found = told(tmp_path, generation_min_length=4)
    assert (found.min_length, found.min_new_tokens) == (4, None)


def test_a_checkpoints_least_length_has_to_fit_what_the_flags_say(tmp_path):
    with pytest.raises(ValueError, match="56 tokens or more and 12 at most"):
        told(tmp_path, {"min_length": 56, "max_length": 142}, generation_max_length=12)


def test_what_a_checkpoint_says_of_several_beams_does_not_hinder_one(tmp_path):
    beams = {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}
    found = told(tmp_path, beams, generation_num_beams=1)
    assert (found.num_beams, found.early_stopping, found.length_penalty) == (1, None, None)
    assert told(tmp_path, beams, generation_num_beams=2).early_stopping is True
