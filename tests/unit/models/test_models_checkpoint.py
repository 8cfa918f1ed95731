"""References to models: what is read from a directory, and one sentence for what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_checkpoint, make_tokenizer

from s2w.errors import ConfigError
from s2w.models.checkpoint import read_checkpoint, resolve_path
from s2w.models.tokenizers import compare_tokenizers

EOS = 508


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", seed=0)


def test_reads_facts_without_weights(tied: Path, tmp_path: Path) -> None:
    for file in tied.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.path == tmp_path
    assert (checkpoint.vocab_size, checkpoint.max_model_len) == (512, 4096)
    assert checkpoint.eos_token_ids == (EOS,)
    assert checkpoint.tokenizer.convert_ids_to_tokens(EOS) == "<|im_end|>"


def test_generation_config_names_every_end(tied: Path, tmp_path: Path) -> None:
    for file in tied.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [508, 506]}))
    assert read_checkpoint(str(tmp_path)).eos_token_ids == (508, 506)
    (tmp_path / "generation_config.json").unlink()
    assert read_checkpoint(str(tmp_path)).eos_token_ids == (508,)


def test_missing_directory_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No checkpoint directory at .*nowhere.*config\.json, or a hub id"):
        resolve_path(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="No checkpoint directory at"):
        resolve_path("")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_path(str(tmp_path))


@pytest.mark.parametrize("reference", ["no-such-owner-s2w/nothing", "not a hub id!"])
def test_hub_id_that_cannot_be_had(reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # An endpoint where nothing listens: the same as a machine without network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="Hugging Face hub") as error:
        resolve_path(reference, "v1")
    assert "\n" not in str(error.value)
    assert repr(reference) in str(error.value)
    assert "'v1'" in str(error.value)


def test_same_tokenizer(tied: Path, tmp_path: Path) -> None:
    padded = make_checkpoint(tmp_path / "padded", "untied", seed=1, vocab_size=640)
    teacher, student = read_checkpoint(str(tied)), read_checkpoint(str(padded))
    assert compare_tokenizers(teacher, teacher).notes == ()
    shared = compare_tokenizers(teacher, student)
    assert shared.vocab_size == 512
    assert len(shared.notes) == 1
    assert "teacher 512 rows, student 640" in shared.notes[0]


def test_other_end_of_response_is_reported(tied: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tied", seed=0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 506}))
    notes = compare_tokenizers(read_checkpoint(str(tied)), read_checkpoint(str(tmp_path))).notes
    assert len(notes) == 1
    # The chat template ends a turn in its own way, whatever the file says.
    assert "<|im_end|> for the teacher and at <|im_end|> or <|endoftext|> for the student" in notes[0]


def test_the_end_of_a_turn_ends_a_response(tied: Path, tmp_path: Path) -> None:
    """A base model states the end of a document alone."""
    make_checkpoint(tmp_path, "tied", seed=0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 506}))
    assert read_checkpoint(str(tmp_path)).eos_token_ids == (508, 506)
    for template in (
        "{{ messages[0].content }}",  # nothing after an assistant's message
        "{% for message in messages %}{{ message.content }} {% endfor %}",
        "{% for message in messages %}{{ message.content }}</think>{% endfor %}",  # no special token
        "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x",
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        assert read_checkpoint(str(tmp_path)).eos_token_ids == (506,)


def test_first_differing_token_is_named(tied: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tied", seed=0)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(tokenizer))
    a, b = make_tokenizer().get_vocab()["A"], make_tokenizer().get_vocab()["B"]
    with pytest.raises(ConfigError, match=f"2 tokens differ, the first 'A': id {a} in .*, id {b} in "):
        compare_tokenizers(read_checkpoint(str(tied)), read_checkpoint(str(tmp_path)))


def test_token_that_one_side_lacks(tied: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tied", seed=0, vocab_size=513)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'<extra>': missing in .*, id 512 in "):
        compare_tokenizers(read_checkpoint(str(tied)), read_checkpoint(str(tmp_path)))


def test_head_smaller_than_its_vocabulary(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tied", seed=0, vocab_size=511)
    small = read_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="512 tokens, more than the 511 rows"):
        compare_tokenizers(small, small)
