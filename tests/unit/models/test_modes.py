"""/think and /no_think: what prompts ask for and how responses are read."""

from __future__ import annotations

import pytest
from tiny_models import make_tokenizer

from s2w.errors import ConfigError
from s2w.models.modes import (
    EMPTY_THINK_BLOCK,
    adheres,
    has_thinking_switch,
    opens_thinking,
    render,
    soft_switch,
    split_thinking,
    supported_modes,
)
from s2w.records import Mode

USER = [{"role": "user", "content": "2+2?"}]
# A template that has no thinking, as SmolLM2's, and one that always thinks, as Qwen3-Thinking-2507's.
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ALWAYS = PLAIN + "<think>\n"


def test_hard_switch() -> None:
    tokenizer = make_tokenizer()
    assert has_thinking_switch(tokenizer)
    assert supported_modes(tokenizer) == ("think", "no_think")
    thinking, direct = render(tokenizer, USER, "think"), render(tokenizer, USER, "no_think")
    assert thinking == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert direct == thinking + EMPTY_THINK_BLOCK


@pytest.mark.parametrize(("template", "mode", "other"), [(PLAIN, "no_think", "think"), (ALWAYS, "think", "no_think")])
def test_template_with_one_mode(template: str, mode: Mode, other: Mode) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert not has_thinking_switch(tokenizer)
    assert opens_thinking(tokenizer) == (mode == "think")
    assert supported_modes(tokenizer) == (mode,)
    assert render(tokenizer, USER, mode).startswith("<|im_start|>user\n2+2?")
    with pytest.raises(ConfigError, match=f"cannot ask for mode '{other}', only for '{mode}'"):
        render(tokenizer, USER, other)


def test_render_refuses_what_the_template_cannot_do() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigError, match="may not set enable_thinking"):
        render(tokenizer, USER, "think", {"enable_thinking": False})
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x"
    with pytest.raises(ConfigError, match=r"rejects the messages: one turn only$"):
        render(tokenizer, USER * 2, "no_think")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        render(tokenizer, USER, "no_think")


def test_chat_template_kwargs_reach_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN + "{{ tone }}"
    assert render(tokenizer, USER, "no_think", {"tone": "kind"}).endswith("assistant\nkind")


@pytest.mark.parametrize(
    ("turns", "mode"),
    [
        (["user: hello"], None),
        (["user: hello /no_think"], "no_think"),
        (["user: /think hello"], "think"),
        (["user: a /think", "assistant: b", "user: c /no_think"], "no_think"),
        (["user: a /no_think", "assistant: b", "user: c"], "no_think"),
        (["system: /no_think", "user: a /think"], "think"),
        (["user: first /no_think then /think"], "think"),
        (["user: a", "assistant: /no_think", "user: b"], None),
        (["user: see /usr/think/x and </think> and /thinking"], None),
        (["user: Why? /no_think."], "no_think"),
    ],
)
def test_soft_switch(turns: list[str], mode: Mode | None) -> None:
    messages = [{"role": role, "content": content} for role, _, content in (turn.partition(": ") for turn in turns)]
    assert soft_switch(messages) == mode


@pytest.mark.parametrize(
    ("text", "mode", "opened", "thinking", "answer", "closed", "adherent"),
    [
        ("<think>\nadd\n</think>\n\n4", "think", False, "add", "4", True, True),
        ("add\n</think>\n\n4", "think", True, "add", "4", True, True),
        ("add\n</think>\n\n4", "think", False, "add", "4", True, True),
        ("<think>\nadd", "think", False, "add", "", False, False),
        ("add", "think", True, "add", "", False, False),
        ("4", "think", False, "", "4", True, False),
        (EMPTY_THINK_BLOCK + "4", "think", False, "", "4", True, False),
        ("4", "no_think", False, "", "4", True, True),
        (EMPTY_THINK_BLOCK + "4", "no_think", False, "", "4", True, True),
        ("<think>\nadd\n</think>\n\n4", "no_think", False, "add", "4", True, False),
        ("so <think>\nadd", "no_think", False, "add", "so", False, False),
        ("tags like </think> are text", "no_think", False, "", "tags like </think> are text", True, True),
        ("<think>a</think>b</think>c", "think", False, "a", "b</think>c", True, True),
        ("", "no_think", False, "", "", True, True),
    ],
)
def test_split_and_adherence(
    text: str, mode: Mode, opened: bool, thinking: str, answer: str, closed: bool, adherent: bool
) -> None:
    response = split_thinking(text, mode, opened=opened)
    assert (response.thinking, response.answer, response.closed) == (thinking, answer, closed)
    assert response.thought == bool(thinking)
    assert adheres(response, mode) == adherent
