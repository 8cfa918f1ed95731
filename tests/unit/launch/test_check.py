"""Bad settings are refused with a sentence that names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from room import check_room
from tiny_models import make_checkpoint

from s2w import cli
from s2w.config.compose import compose, to_yaml
from s2w.data.prompts import build_prompts
from s2w.errors import ConfigError
from s2w.launch.check import check, check_gradients
from s2w.launch.phases import last_checkpoint
from s2w.models.modes import EMPTY_THINK_BLOCK
from s2w.records import Mode


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("models") / "tied", "tied", 0))


@pytest.fixture
def overrides(checkpoint: str, tmp_path: Path) -> list[str]:
    """The least that a run needs."""
    return [
        f"teacher.model={checkpoint}", f"student.model={checkpoint}", "data.tasks=[chain_sum]",
        f"run.dir={tmp_path / 'run'}", "cluster.device=cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("rollout.engine=2", "unknown setting rollout.engine: did you mean rollout.engines?"),
        ("+foo=1", "unknown setting foo"),
        ("loop.steps=many", "loop.steps: Value 'many'"),
        ("learner.schedule=linear", "learner.schedule=linear: must be one of constant, cosine"),
        ("experiment=nope", "there is no experiment=nope: the choices are"),
        ("learner.zero_stage=5", "learner.zero_stage=5: must be between 0 and 3"),
        ("rollout.engines=0", "rollout.engines=0: must be >= 1"),
        ("learner.learning_rate=-1", "learner.learning_rate=-1.0: must be > 0"),
        ("teacher.dtype=int8", "teacher.dtype=int8: must be one of"),
        ("teacher.model=/no/such/model", "No checkpoint directory at '/no/such/model'"),
        ("signal={kind: topk, top_k: 600}", "signal.top_k=600 is larger than the vocabulary of 512 tokens"),
        ("loss.divergence=forward_lk", "forward_kl"),
        ("rollout.engine_args={max_num_seq: 1}", "rollout.engine_args: vLLM's AsyncEngineArgs has no 'max_num_seq'"),
        ("signal={kind: topk, dtype: float8}", "says how hidden states travel, and signal.kind=topk sends none"),
        ("signal={kind: topk, bias_every: 2}", "signal.bias_every=2 compares with the whole distribution"),
        ("signal.bias_every=-1", "signal.bias_every=-1: must be >= 0"),
        ("run.preflight=yes", "run.preflight=yes: must be one of none, divergence, log_probs"),
        ("loss.discount=0.9", "signal.kind=hidden has a distribution at each token: write signal.kind=sampled"),
        ("loss.discount=1.5", "loss.discount=1.5: must be between 0 and 1"),
        ("loss.importance_limit=0", "loss.importance_limit=0.0: must be > 0, or null"),
        ("signal.kind=sampled", "signal.kind=sampled does not support loss.divergence=forward_kl"),
        ("rollout.max_tokens=5000", "is more than the teacher's context of 4096 tokens"),
        ("student.init=pruned", "set student.keep_layers to the number of layers to keep"),
        ("run={deterministic: true}", None),
        ("teacher.tensor_parallel=3", "teacher.tensor_parallel=3 does not divide the 4 attention heads"),
        ("run.resume=true", "contains no run"),
        ("loop.steps=0", "loop.steps=0 and off_policy.steps=0: there is nothing to do"),
        ("data.think_ratio=1.5", "data.think_ratio=1.5: must be between 0 and 1, or null"),
        ("data.think_ratio_end=0.5", "data.think_ratio_end=0.5 needs data.think_ratio"),
        ("data={modes: [think], think_ratio: 0.5}", "data.modes has only think"),
        (
            "loss.objective=cross_entropy",
            "loss.objective=cross_entropy: that is an objective of the off-policy phase; write divergence or grpo",
        ),
        (
            "off_policy={loss: grpo}",
            "off_policy.loss=grpo: that is an objective of the on-policy phase; write cross_entropy or divergence",
        ),
        ("loss.objective=grpo", "loss.objective=grpo compares the responses to a prompt with each other"),
        ("reward.weight=-1", "reward.weight=-1.0: must be >= 0"),
        ("reward.clip_low=1.5", "reward.clip_low=1.5: must be > 0 and < 1"),
        ("loop.unreliable_weight=2", "loop.unreliable_weight=2.0: must be between 0 and 1"),
        ("rollout.thinking_budget=2000", "leave no room for an answer in rollout.max_tokens=1024"),
        ("teachers.math={modes: [think]}", "teachers.math has no model"),
        ("teachers.math={model: /no/such/model}", "No checkpoint directory at '/no/such/model'"),
        ("teachers.math={model: m, replica: 2}", "unknown setting teachers.math.replica: did you mean replicas?"),
        ("teachers.math={model: m, replicas: two}", "teachers.math.replicas: Value 'two'"),
        ("teachers.math={model: m, modes: [fast]}", "teachers.math.modes has 'fast'; a mode is think or no_think"),
        ("teachers.math={model: m, modes: think}", "teachers.math.modes=think: write a list, as [think]"),
        ("teachers.math={model: m, tasks: [gcd]}", "names 'gcd', which is not in data.tasks (chain_sum)"),
        ("teachers.teacher={model: m}", "`teacher` is the name of the section with that name"),
    ],
)
def test_bad_input(overrides: list[str], extra: str, sentence: str | None) -> None:
    if sentence is None:
        check(compose([*overrides, extra]))
        with pytest.raises(ConfigError, match=r"loop\.max_staleness=0"):
            check(compose([*overrides, extra, "loop.max_staleness=1"]))
        return
    with pytest.raises(ConfigError) as caught:
        check(compose([*overrides, extra]))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thinking_switch_is_added_where_asked(overrides: list[str], tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "tied", 0)
    template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (plain / "chat_template.jinja").write_text(template)
    config = compose([*overrides, f"student.model={plain}", "data.modes=[think,no_think]"])
    modes: list[Mode] = ["think", "no_think"]
    with pytest.raises(ConfigError, match=r"no thinking switch; write student\.thinking_switch=true"):
        build_prompts(config.data, check(config).student.tokenizer, 0, modes)
    config = replace(config, student=replace(config.student, thinking_switch=True))
    tokenizer = check(config).student.tokenizer
    train, _ = build_prompts(config.data, tokenizer, 0, modes)
    for prompt in train[:4]:
        text = str(tokenizer.decode(prompt.token_ids))
        assert text == prompt.messages[0]["content"] + ">" + (EMPTY_THINK_BLOCK if prompt.mode == "no_think" else "")


def test_the_command_exits_with_2_and_one_sentence(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *overrides, "learner.zero_stage=5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "s2w: learner.zero_stage=5: must be between 0 and 3\n"
    assert cli.main(["trian"]) == 2
    assert "unknown command trian" in capsys.readouterr().err


def test_run_directory_belongs_to_one_configuration(overrides: list[str]) -> None:
    config = compose(overrides)
    directory = Path(config.run.dir)
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(ConfigError, match=r"already holds this run: add run\.resume=true"):
        check(config)
    again = replace(config, run=replace(config.run, resume=True), loop=replace(config.loop, steps=200))
    check(again)
    check(replace(again, run=replace(config.run, resume="auto")))
    other = replace(again, learner=replace(config.learner, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"belongs to a run with learner\.learning_rate=1e-05, not 0\.5"):
        check(other)
    # Of a version without a section; what is in it may change.
    stored = to_yaml(config)
    (directory / "config.yaml").write_text(stored[: stored.index("plan:\n")] + stored[stored.index("run:\n") :])
    check(again)


def test_resume_auto_starts_a_run_where_there_is_none(overrides: list[str]) -> None:
    config = compose([*overrides, "run.resume=auto"])
    check(config)
    with pytest.raises(ConfigError, match=r"run\.resume=atuo: must be one of false, true, auto"):
        check(compose([*overrides, "run.resume=atuo"]))
    # What is there decides where it starts.
    checkpoints = Path(config.run.dir) / "checkpoints"
    assert last_checkpoint(config, checkpoints) is None
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").symlink_to("step_000003")
    assert last_checkpoint(config, checkpoints) == checkpoints / "step_000003"
    assert last_checkpoint(compose(overrides), checkpoints) is None


def test_resources_are_counted(overrides: list[str]) -> None:
    config = compose([*overrides, "rollout.engines=5"])
    check_room(config, "cpu", cpus=4)
    with pytest.raises(ConfigError, match=r"asks for 3\.5 CPUs \(.*\) and the cluster has 2"):
        check_room(config, "cpu", cpus=2)
    config = compose([*overrides, "rollout.engines=4", "teacher.tensor_parallel=2", "learner.ranks=2"])
    check_room(config, "cuda", cpus=8, gpus=8)
    with pytest.raises(ConfigError, match=r"asks for 8 GPUs .* and the cluster has 7"):
        check_room(config, "cuda", cpus=8, gpus=7)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("teacher.gpus=0.5 teacher.tensor_parallel=2", r"teacher\.gpus=0\.5 and 2 workers .* write teacher\.gpus=1"),
        ("learner.gpus=0.5 learner.ranks=2", r"NCCL refuses two ranks on one GPU: write learner\.gpus=1"),
        ("learner.gpus=0.5", r"learner\.gpus=0\.5 and rollout\.gpus=1: either both"),
        ("rollout.gpus=0.5", r"learner\.gpus=1 and rollout\.gpus=0\.5: either both"),
        (
            "rollout.gpus=0.3 rollout.engines=2 learner.gpus=0.5",
            "must be on one GPU: write shares whose sum is at most 1",
        ),
        ("teacher.gpus=0", r"teacher\.gpus=0\.0: must be > 0 and <= 1"),
    ],
)
def test_shares_of_a_gpu_must_go_together(overrides: list[str], settings: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(compose([*overrides, *settings.split()]))


def test_shares_of_a_gpu_are_counted(overrides: list[str]) -> None:
    config = compose([*overrides, "teacher.gpus=0.3", "rollout.gpus=0.25", "learner.gpus=0.45"])
    check(config)
    check_room(config, "cuda", cpus=8, gpus=1)
    with pytest.raises(ConfigError, match=r"asks for 1\.1 GPUs \(teacher 0\.4, rollout 0\.25, learner 0\.45\)"):
        check_room(
            compose([*overrides, "teacher.gpus=0.4", "rollout.gpus=0.25", "learner.gpus=0.45"]),
            "cuda",
            cpus=8,
            gpus=1,
        )


def test_all_teachers_are_counted(overrides: list[str], checkpoint: str) -> None:
    more = f"teachers.math={{model: {checkpoint}, modes: [think], replicas: 3, tensor_parallel: 2}}"
    config = compose([*overrides, more])
    check(config)
    check_room(config, "cuda", cpus=8, gpus=9)
    with pytest.raises(ConfigError, match=r"asks for 9 GPUs \(teacher 1, math 6, rollout 1, learner 1\) and .* has 8"):
        check_room(config, "cuda", cpus=8, gpus=8)


def test_an_engine_takes_gpus_for_each_of_its_stages(overrides: list[str]) -> None:
    config = compose([*overrides, "teacher.pipeline_parallel=2", "rollout.pipeline_parallel=3", "off_policy.steps=1"])
    check_room(config, "cuda", cpus=8, gpus=6)
    with pytest.raises(ConfigError, match=r"asks for 6 GPUs \(teacher 2, rollout 3, learner 1\)"):
        check_room(config, "cuda", cpus=8, gpus=5)
    # The teacher's own generation, alone on the cluster, takes as many as its scoring.
    with pytest.raises(ConfigError, match=r"asks for 4 GPUs \(generator 4\)"):
        check_room(
            compose([*overrides, "teacher.pipeline_parallel=2", "off_policy.steps=1", "off_policy.engines=2"]),
            "cuda",
            cpus=8,
            gpus=3,
        )


def test_tokenizers_that_differ_are_refused(overrides: list[str], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "tied", 0)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|reserved|>", "<|changed|>"))
    with pytest.raises(ConfigError, match=r"must share a tokenizer.*<\|reserved\|>|<\|changed\|>"):
        check(compose([*overrides, f"student.model={other}"]))


def test_padded_vocabularies_are_accepted_and_said(overrides: list[str], tmp_path: Path) -> None:
    padded = make_checkpoint(tmp_path / "padded", "tied", 0, vocab_size=576)
    models = check(compose([*overrides, f"teacher.model={padded}"]))
    assert models.vocabulary.vocab_size == 512
    [note] = models.vocabulary.notes
    assert "576" in note and "512" in note


def test_stage_0_in_bfloat16_is_refused_once_the_device_is_known(overrides: list[str]) -> None:
    required = [*overrides, "learner.zero_stage=0"]
    config = compose(required)
    with pytest.raises(ConfigError, match=r"accumulate gradients in bfloat16: write learner\.zero_stage=1"):
        check_gradients(config, "cuda")
    check_gradients(compose([*required, "learner.dtype=float32"]), "cuda")
