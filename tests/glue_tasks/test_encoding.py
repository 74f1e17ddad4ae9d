import pytest
from transformers import AutoTokenizer, BertConfig

from glue_tasks.encoding import check_labels, encode, label_fields
from glue_tasks.loading import load_task
from glue_tasks.tasks import TASKS


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.mark.parametrize("long", [0, 1])
def test_the_longer_sentence_of_a_pair_is_truncated(long, write_glue, tokenizer):
    data = write_glue("RTE", test=0)
    pair = ["of dev", "of dev"]
    pair[long] = "row row row row row row row"
    for name in ("train", "dev"):
        text = "\t".join(["index\tsentence1\tsentence2\tlabel\n0", *pair, "entailment\n"])
        (data / "RTE" / f"{name}.tsv").write_text(text)
    row = encode(load_task(TASKS["rte"], data), tokenizer, BertConfig(), max_length=8)["train"][0]
    pair[long] = "row row row"
    assert tokenizer.decode(row["input_ids"]) == f"[CLS] {pair[0]} [SEP] {pair[1]} [SEP]"
    first = 2 + len(pair[0].split())
    assert row["token_type_ids"] == [0] * first + [1] * (8 - first)


def test_rows_are_padded_only_if_asked_for(write_glue, tokenizer):
    raw = load_task(TASKS["sst2"], write_glue("SST-2"))
    lengths = {len(ids) for ids in encode(raw, tokenizer, BertConfig(), max_length=32)["train"]["input_ids"]}
    padded = encode(raw, tokenizer, BertConfig(), max_length=32, pad_to_max_length=True)["train"]
    assert max(lengths) < 32
    assert {len(ids) for ids in padded["input_ids"]} == {32}
    assert sum(padded[0]["attention_mask"]) in lengths


def test_a_limit_takes_the_first_rows_of_its_split(write_glue, tokenizer):
    raw = load_task(TASKS["sst2"], write_glue("SST-2"))
    limits = {"train": 5, "validation": 100, "test": None}
    splits = encode(raw, tokenizer, BertConfig(), max_length=32, sample_limit=limits.get)
    assert {name: split.num_rows for name, split in splits.items()} == {"train": 5, "validation": 6, "test": 4}
    assert splits["train"]["label"][:] == raw["train"]["label"][:5]
    assert set(splits["test"].column_names) == {"input_ids", "token_type_ids", "attention_mask"}


def test_first_rows_that_all_have_one_label_are_refused(write_glue, tokenizer):
    raw = load_task(TASKS["sst2"], write_glue("SST-2"))
    raw["train"] = raw["train"].sort("label")
    assert len(set(raw["train"]["label"])) == 2 and raw["train"]["label"][0] == raw["train"]["label"][1]
    with pytest.raises(ValueError, match="The first 2 training rows all have the same label"):
        encode(raw, tokenizer, BertConfig(), max_length=32, sample_limit=lambda name: 2)


def test_inputs_longer_than_the_model_takes_are_refused(write_glue, tokenizer):
    raw = load_task(TASKS["sst2"], write_glue("SST-2"))
    with pytest.raises(ValueError, match="max_seq_length is 33, but the model takes at most 32"):
        encode(raw, tokenizer, BertConfig(max_position_embeddings=32), max_length=33)


@pytest.mark.parametrize(("folder", "task", "least"), [("SST-2", "sst2", 3), ("RTE", "rte", 5)])
def test_rows_without_room_for_text_are_refused(folder, task, least, write_glue, tokenizer):
    raw = load_task(TASKS[task], write_glue(folder))
    with pytest.raises(ValueError, match=f"max_seq_length {least - 1} leaves no room for text .* give {least} or more"):
        encode(raw, tokenizer, BertConfig(), max_length=least - 1)
    rows = encode(raw, tokenizer, BertConfig(), max_length=least)["train"]["input_ids"]
    assert {len(ids) for ids in rows} == {least}


def test_ids_outside_the_vocabulary_are_refused(write_glue, tokenizer):
    raw = load_task(TASKS["sst2"], write_glue("SST-2"))
    splits = encode(raw, tokenizer, BertConfig(), max_length=32)
    largest = max(max(ids) for split in splits.values() for ids in split["input_ids"])
    encode(raw, tokenizer, BertConfig(vocab_size=largest + 1), max_length=32)
    with pytest.raises(ValueError, match=f"token id {largest}, but the model has only {largest} embeddings"):
        encode(raw, tokenizer, BertConfig(vocab_size=largest), max_length=32)


def test_the_configuration_names_the_classes():
    rte = BertConfig(**label_fields(TASKS["rte"]))
    assert (rte.num_labels, rte.id2label) == (2, {0: "entailment", 1: "not_entailment"})
    assert rte.label2id == {"entailment": 0, "not_entailment": 1}
    stsb = BertConfig(**label_fields(TASKS["stsb"]))
    assert (stsb.num_labels, stsb.problem_type) == (1, "regression")


def _classifier(**fields) -> BertConfig:
    return BertConfig(architectures=["BertForSequenceClassification"], **fields)


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("rte", BertConfig(architectures=["BertForMaskedLM"], num_labels=7)),
        ("rte", _classifier(num_labels=2)),
        ("rte", _classifier(**label_fields(TASKS["qnli"]))),
        ("mnli", _classifier(num_labels=3)),
        ("stsb", _classifier(num_labels=1)),
        ("rte", _classifier(id2label={0: "ENTAILMENT", 1: "NOT_ENTAILMENT"})),
    ],
    ids=["no-classifier", "unnamed", "same-names", "three-unnamed", "regression", "capitals"],
)
def test_labels_that_agree_are_accepted(task, config):
    check_labels(TASKS[task], config)


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("rte", _classifier(num_labels=3)),
        ("rte", _classifier(id2label={0: "not_entailment", 1: "entailment"})),
        ("rte", _classifier(**label_fields(TASKS["cola"]))),
        ("stsb", _classifier(num_labels=2)),
        ("cola", _classifier(**label_fields(TASKS["stsb"]))),
    ],
    ids=["number", "order", "names", "class-for-score", "score-for-class"],
)
def test_labels_that_conflict_are_refused(task, config):
    with pytest.raises(ValueError, match=f"classifies .* but {task} asks for"):
        check_labels(TASKS[task], config)


def test_a_classifier_of_other_labels_is_taken_where_its_answers_can_be_theirs():
    number, order = _classifier(num_labels=3), _classifier(id2label={0: "not_entailment", 1: "entailment"})
    capitals = _classifier(id2label={0: "NOT_ENTAILMENT", 1: "ENTAILMENT"})
    names = _classifier(**label_fields(TASKS["cola"]))
    for config in (number, names):
        check_labels(TASKS["rte"], config, refits=True)
    check_labels(TASKS["rte"], names, trains=False, refits=True)
    # A new one would answer at random, and one in another order would be misread.
    for config, trains in ((number, False), (order, True), (order, False), (capitals, False)):
        with pytest.raises(ValueError, match="classifies .* but rte asks for") as error:
            check_labels(TASKS["rte"], config, trains, refits=True)
        assert "--ignore_mismatched_sizes" not in str(error.value)


def test_which_class_an_unnamed_one_is_taken_for_is_said_where_nothing_is_trained(caplog):
    check_labels(TASKS["mnli"], _classifier(num_labels=3))
    assert not caplog.messages
    check_labels(TASKS["mnli"], _classifier(num_labels=3), trains=False)
    assert "taken for entailment, neutral, contradiction, in this order" in caplog.text


def test_what_is_no_classifier_is_trained_before_it_is_evaluated():
    check_labels(TASKS["rte"], BertConfig(architectures=["BertForMaskedLM"]))
    with pytest.raises(ValueError, match="is no classifier yet, so its scores of rte would be those of random weights"):
        check_labels(TASKS["rte"], BertConfig(architectures=["BertForMaskedLM"]), trains=False)
