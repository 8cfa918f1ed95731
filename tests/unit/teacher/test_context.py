"""What a teacher with privileged context reads in place of the student's prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tokenizer

from s2w.config.schema import TeacherConfig
from s2w.errors import ConfigError
from s2w.models.modes import render
from s2w.records import Mode, Prompt, Rollout, VersionSpan
from s2w.teacher.context import Context

TOKENIZER = make_tokenizer()
HINT = "{question}\nThe answer is {answer}; {{say}} how."


def prompt(
    *messages: tuple[str, str], mode: Mode = "think", answer: str | None = "4", metadata: dict[str, Any] | None = None
) -> Prompt:
    """As the student sees it."""
    told = tuple({"role": role, "content": content} for role, content in messages)
    ids = np.asarray(TOKENIZER(render(TOKENIZER, told, mode))["input_ids"], np.int32)
    return Prompt("sum/train/3", told, ids, mode, 7, "sum", answer, metadata or {})


ASKED = prompt(("system", "Add."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"))


def context(template: str | None = None, system: str | None = None, **kwargs: Any) -> Context:
    return Context("teachers.t", TeacherConfig(context=template, system_prompt=system), TOKENIZER, kwargs)


def seen(made: Context, of: Prompt) -> str:
    return str(TOKENIZER.decode(made.prompt(of).token_ids))


@pytest.mark.parametrize("mode", ["think", "no_think"])
def test_the_last_question_is_asked_with_the_answer(mode: Mode) -> None:
    """In the mode of the prompt, behind the turns before it."""
    asked = replace(ASKED, mode=mode)
    text = seen(context(HINT), asked)
    told = [dict(message) for message in asked.messages]
    told[-1]["content"] = "2+2?\nThe answer is 4; {say} how."
    assert text == render(TOKENIZER, told, mode)
    # The record is the student's but for its tokens.
    made = context(HINT).prompt(asked)
    assert replace(made, token_ids=asked.token_ids) == asked and made.token_ids.dtype == np.int32


def test_a_rollout_is_the_same_response_behind_it() -> None:
    ids, spans = np.arange(5, dtype=np.int32), (VersionSpan(0, 5, 0),)
    rollout = Rollout(ASKED, 0, ids, np.zeros(5, np.float32), spans, "stop", 0, 0.0, 1.0)
    made = context(HINT).rollout(rollout)
    assert made.token_ids is ids and made.prompt.uid == ASKED.uid
    assert len(made.prompt.token_ids) > len(ASKED.token_ids)


def test_the_system_message_is_replaced_or_put_first() -> None:
    told = render(TOKENIZER, [{"role": "system", "content": "Be right."}, *ASKED.messages[1:]], "think")
    assert seen(context(system="Be right."), ASKED) == told
    bare = replace(ASKED, messages=ASKED.messages[1:])
    assert seen(context(system="Be right."), bare) == told
    assert "Be right." in seen(context(HINT, "Be right."), ASKED) and "answer is 4" in seen(
        context(HINT, "Be right."), ASKED
    )


def test_texts_of_the_metadata_can_be_asked_for() -> None:
    hinted = replace(ASKED, metadata={"hint": "count", "entry": {"a": 1}})
    assert "2+2? Hint: count" in seen(context("{question} Hint: {hint}"), hinted)
    with pytest.raises(ConfigError, match=r"teachers\.t\.context has \{entry\}, .* has no such field"):
        context("{entry}").prompt(hinted)


@pytest.mark.parametrize(
    ("template", "asked", "sentence"),
    [
        (HINT, replace(ASKED, answer=None), "has {answer}, and prompt 'sum/train/3' has no answer"),
        ("{anwser}", ASKED, "has {anwser}, and prompt 'sum/train/3' has no such field: did you mean answer?"),
        ("{question} {answer}", replace(ASKED, answer=None, metadata={"answer": ""}), ""),
    ],
)
def test_what_a_prompt_does_not_have_is_refused(template: str, asked: Prompt, sentence: str) -> None:
    made = context(template)
    if not sentence:
        # Whatever the row says of it, an empty text is one.
        assert seen(made, asked).endswith("2+2? <|im_end|>\n<|im_start|>assistant\n")
        return
    with pytest.raises(ConfigError) as caught:
        made.prompt(asked)
    assert str(caught.value) == f"teachers.t.context {sentence}"


def test_one_question_with_two_answers_is_read_with_each() -> None:
    made = context(HINT)
    assert "answer is 4" in seen(made, ASKED) and "answer is 5" in seen(made, replace(ASKED, answer="5"))
    with pytest.raises(ConfigError, match="has no answer"):
        made.prompt(replace(ASKED, answer=None))


def test_chat_template_kwargs_reach_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template += "{{ tone }}"
    made = Context("teacher", TeacherConfig(system_prompt="Be right."), tokenizer, {"tone": "kind"})
    assert str(tokenizer.decode(made.prompt(ASKED).token_ids)).endswith("kind")


def test_longest_is_what_it_adds_at_most() -> None:
    made = context("{question}{answer}")
    plain = replace(
        ASKED, mode="no_think", token_ids=context("{question}").prompt(replace(ASKED, mode="no_think")).token_ids
    )
    short, long = replace(plain, answer="4"), replace(plain, answer="4 and not 5")
    added = [len(made.prompt(one).token_ids) - len(one.token_ids) for one in (short, long)]
    assert 0 < added[0] < added[1] == made.longest([short, long]) == made.longest([long])
    assert made.longest([short]) == added[0]
    assert made.longest([]) == 0
    # A context may be shorter than what it takes the place of.
    assert context("{answer}").longest([prompt(("user", "two and two and two and two?"), mode="no_think")]) < 0
