"""What generation is told by the flags."""

import pytest
from transformers import GenerationConfig

from text_to_text.arguments import WritingTrainingArguments


def told(folder, **flags) -> GenerationConfig:
    """A checkpoint's own numbers of new tokens, and then the flags."""
    generation = GenerationConfig(max_new_tokens=5, min_new_tokens=2, num_beams=3)
    generation.update(**WritingTrainingArguments(str(folder), use_cpu=True, **flags).generation_fields(20))
    return generation


@pytest.mark.parametrize(("flags", "longest"), [({}, 20), ({"generation_max_length": 12}, 12)])
def test_a_checkpoints_number_of_new_tokens_gives_way_to_a_length(flags, longest, tmp_path):
    found = told(tmp_path, **flags)
    assert (found.max_length, found.max_new_tokens, found.num_beams) == (longest, None, 3)


def test_a_least_number_of_new_tokens_stays_unless_a_least_length_is_given(tmp_path):
    assert told(tmp_path).min_new_tokens == 2
    found = told(tmp_path, generation_min_length=9)
    assert (found.min_length, found.min_new_tokens) == (9, None)
