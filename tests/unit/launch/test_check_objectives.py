"""What objectives, signals and teachers need of other settings, and of the prompts."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from changed_settings import changed
from room import check_room
from tiny_models import make_checkpoint

from s2w.config.compose import compose
from s2w.config.schema import Config
from s2w.errors import ConfigError
from s2w.launch.check import check, check_prompts
from s2w.models.modes import render
from s2w.records import Prompt


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


@pytest.fixture(scope="module")
def base(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The least that a run needs."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    sides = [f"teacher.model={checkpoint}", f"student.model={checkpoint}", f"run.dir={directory}"]
    return compose([*sides, "data.tasks=[chain_sum]", "cluster.device=cpu"])


TWICE = "loop.samples_per_prompt=2"
PREFIX, STABLE, MIXTURE = "loss.objective=prefix", "loss.objective=stable", "loss.divergence=kl_mixture"


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            ["loss.objective=gpro"],
            "loss.objective=gpro: there is no such objective: did you mean grpo? known are diverge",
        ),
        (
            ["off_policy.loss=divergance"],
            "off_policy.loss=divergance: there is no such objective: did you mean diverge",
        ),
        (["loss.objective=cross_entropy"], "that is an objective of the off-policy phase; write divergence or grpo or"),
        (["off_policy.loss=prefix"], "that is an objective of the on-policy phase; write cross_entropy or divergence"),
        (
            [PREFIX, "loss.options.gama=1"],
            "unknown setting loss.options.gama of loss.objective=prefix and loss.divergence=forward_kl: did you mean g",
        ),
        (
            [MIXTURE, "loss.options.gamma=1"],
            "unknown setting loss.options.gamma of loss.objective=divergence and loss.divergence=kl_mixture: their "
            "settings are forward_weight",
        ),
        (["loss.options.gamma=1"], "and loss.divergence=forward_kl: their settings are none"),
        (
            [MIXTURE, "loss.options.forward_weight=2"],
            "loss.divergence=kl_mixture: kl_mixture needs 0 <= forward_weight",
        ),
        ([MIXTURE, "loss.options.forward_weight=0.9"], None),
        ([PREFIX, "loss.options.gamma=much"], "loss.options.gamma: Value 'much'"),
        ([PREFIX, "loss.options.gamma=-1"], "loss.options.gamma=-1.0: must be >= 0"),
        ([PREFIX, "loss.options.part_nats=0"], "loss.options.part_nats=0.0: must be > 0, or null"),
        (
            [PREFIX, "loss.options.length_quantile=0.9"],
            "loss.options.length_quantile=0.9 follows the point where teacher and student part: write "
            "loss.options.part_nats too",
        ),
        ([PREFIX, "loss.options={length_quantile: 0.9, part_nats: 20}"], None),
        ([STABLE, "loss.options.loop_tokens=0"], "loss.options.loop_tokens=0: must be >= 1"),
        (["loss.objective=kdrl", TWICE], "loss.objective=kdrl with reward.weight=0 is distillation alone"),
        (["loss.objective=kdrl", TWICE, "reward.weight=0.5"], None),
        (
            ["reward.weight=0.5"],
            "loss.objective=divergence uses no reward, but reward.weight=0.5: write loss.objective=",
        ),
        (
            ["reference={replicas: 1}"],
            "loss.objective=divergence uses no reference model, but `reference` is set: remove",
        ),
        ([STABLE, "reference={replicas: 1}"], "loss.objective=stable uses no reference model, but `reference` is set"),
        ([STABLE, "reference={replicas: 1}", "loss.options.reference_weight=0.1"], None),
        (
            ["loss.objective=grpo", TWICE, "signal.bias_every=1"],
            "with loss.objective=grpo no signal reaches the learner",
        ),
        (["loss.objective=negative"], None),
    ],
)
def test_what_objectives_need(base: Config, extra: list[str], sentence: str | None) -> None:
    config = changed(base, *extra)
    if sentence is None:
        check(config)
        return
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "setting"),
    [
        ("rollout.temperature=0.7", "rollout.temperature=1.0"),
        ("rollout.top_p=0.9", "rollout.top_p=1"),
        ("rollout.top_k=20", "rollout.top_k=-1"),
        ("loop.off_policy_fraction=0.5", "loop.off_policy_fraction=0"),
    ],
)
@pytest.mark.parametrize(
    "objective", [["loss.objective=grpo"], ["loss.objective=kdrl", "reward.weight=0.5"], ["loss.objective=prefix"]]
)
def test_sampled_log_probs_need_the_sampling_distribution(
    base: Config, objective: list[str], extra: str, setting: str
) -> None:
    fine = changed(base, *objective, "loop.samples_per_prompt=4")
    check(fine)
    with pytest.raises(ConfigError) as caught:
        check(changed(fine, extra))
    assert objective[0] in str(caught.value) and setting in str(caught.value)


def test_grpo_needs_answers(base: Config) -> None:
    config = changed(base, "loss.objective=grpo", "loop.samples_per_prompt=4")
    prompt = Prompt("file/train/3", (), np.zeros(1, np.int32), "think", 0)
    models = check(config)
    assert check_prompts(config, models, [replace(prompt, task="chain_sum")]) == {}
    with pytest.raises(ConfigError, match="'file/train/3' has no verifier: its row has neither `task` nor `answer`"):
        check_prompts(config, models, [replace(prompt, task="chain_sum"), prompt])
    config = changed(config, "data.verifier=null", "data.tasks=[]", "data.path=x")
    with pytest.raises(ConfigError, match=r"'f', line 4 has an `answer` and no `task`: write data.verifier=math_ver"):
        check_prompts(config, models, [replace(prompt, place="'f', line 4", answer="1")])


@pytest.mark.parametrize("way", ["divergence", "log_probs"])
@pytest.mark.parametrize("setting", ["context='{question} {answer}'", "system_prompt='You know.'"])
def test_a_preflight_is_about_the_students_own_prompts(base: Config, checkpoint: str, way: str, setting: str) -> None:
    name, _, value = setting.partition("=")
    check(changed(base, f"teacher.{setting}"))
    with pytest.raises(ConfigError, match=rf"run\.preflight={way} compares .*, but teacher reads other ones"):
        check(changed(base, f"teacher.{setting}", f"run.preflight={way}"))
    another = f"teachers.knowing={{model: {checkpoint}, {name}: {value}}}"
    with pytest.raises(ConfigError, match=rf"run\.preflight={way} compares .*, but teachers\.knowing reads other ones"):
        check(changed(base, another, f"run.preflight={way}"))


def test_a_context_needs_what_it_asks_for(base: Config) -> None:
    """And says how much longer than the student's prompts the teacher's are."""
    config = changed(base, "teacher.context='{question} ({answer})'")
    models = check(config)
    tokenizer, messages = models.student.tokenizer, ({"role": "user", "content": "1 + 1?"},)
    ids = np.asarray(tokenizer(render(tokenizer, messages, "no_think"))["input_ids"])
    prompt = Prompt("file/train/3", messages, ids, "no_think", 0, answer="2")
    assert check_prompts(config, models, [prompt]) == {"teacher": len(tokenizer(" (2)")["input_ids"])}
    with pytest.raises(ConfigError, match=r"teacher\.context has \{answer\}, and prompt 'file/train/3' has no answer"):
        check_prompts(config, models, [prompt, replace(prompt, answer=None)])


def test_a_reference_is_counted_and_laid_out(base: Config) -> None:
    stable = changed(base, STABLE, "loss.options.reference_weight=0.1")
    check(changed(stable, "reference={replicas: 2}"))
    with pytest.raises(ConfigError, match=r"reference\.tensor_parallel=3 does not divide the 4 attention heads"):
        check(changed(stable, "reference={tensor_parallel: 3}"))
    with pytest.raises(ConfigError, match=r"unknown setting reference\.replica: did you mean replicas"):
        check(changed(stable, "reference={replica: 2}"))
    config = changed(stable, "reference={replicas: 2, tensor_parallel: 2}")
    check_room(config, "cuda", cpus=8, gpus=7)
    with pytest.raises(ConfigError, match=r"asks for 7 GPUs \(teacher 1, reference 4, rollout 1, learner 1\)"):
        check_room(config, "cuda", cpus=8, gpus=6)


SAMPLED = ["signal.kind=sampled", "loss.divergence=reverse_kl"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([*SAMPLED, "rollout.top_p=0.9"], "write rollout.top_p=1, rollout.top_k=-1 and a rollout.temperature above 0"),
        ([*SAMPLED, "rollout.top_k=20"], "write rollout.top_p=1, rollout.top_k=-1 and a rollout.temperature above 0"),
        ([*SAMPLED, "rollout.temperature=0"], "tokens that are never sampled bias it"),
        ([*SAMPLED, "rollout.temperature=0.7"], None),
        ([*SAMPLED, "rollout.temperature=0.7", "loss.discount=1"], "write rollout.temperature=1.0"),
        ([*SAMPLED, "rollout.temperature=0.7", "loss.importance_limit=2"], "write rollout.temperature=1.0"),
        ([*SAMPLED, "rollout.temperature=0.7", "loss={temperature: 0.7, discount: 1}"], None),
        (["signal.kind=ids", "rollout.top_k=20"], "signal.kind=ids needs signal.top_k=64 candidates"),
        (["signal.kind=ids", "rollout.top_p=0.95"], "signal.kind=ids needs signal.top_k=64 candidates"),
        (["signal.kind=ids", "rollout.top_k=64"], None),
        (["rollout.top_k=20", "rollout.top_p=0.95"], None),
    ],
)
def test_signals_need_what_they_are_about_sampled(base: Config, settings: list[str], sentence: str | None) -> None:
    config = changed(base, *settings)
    if sentence is None:
        check(config)
    else:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            check(config)


@pytest.mark.parametrize(("temperature", "top_p", "unbiased"), [(1.0, 1.0, True), (0.6, 1.0, True), (1.0, 0.9, False)])
def test_importance_weights_correct_a_temperature_but_no_nucleus(
    temperature: float, top_p: float, unbiased: bool
) -> None:
    """What the checks above rest on: the mean of rho (log q - log p), exact over all tokens that can be drawn."""
    draw = np.random.default_rng(0)
    logits, teacher = draw.normal(0, 2, 50), draw.normal(0, 2, 50)
    log_q = logits - np.logaddexp.reduce(logits)
    log_p = teacher - np.logaddexp.reduce(teacher)
    sampling = np.exp(logits / temperature - np.logaddexp.reduce(logits / temperature))
    order = np.argsort(-sampling)
    sampling[order[np.cumsum(sampling[order]) - sampling[order] >= top_p]] = 0
    sampling /= sampling.sum()
    there = sampling > 0
    rho = np.exp(log_q[there]) / sampling[there]
    estimate = (sampling[there] * rho * (log_q - log_p)[there]).sum()
    exact = (np.exp(log_q) * (log_q - log_p)).sum()
    assert (abs(estimate - exact) < 1e-9) == unbiased
