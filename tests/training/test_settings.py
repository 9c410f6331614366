"""Settings: three layers, one result; errors have the value and the remedy."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from readme import blocks

from gptj.data.batches import BatchOrder
from gptj.data.batches import share as share_of_rank
from gptj.training.deepspeed_config import deepspeed_config, learning_rate_share
from gptj.training.settings import (
    OptimizerSettings,
    Settings,
    SettingsError,
    changed,
    extended,
    read_settings,
)
from gptj.training.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 7\noptimizer: {learning_rate: 1.0e-3, weight_decay: 0.5}\n")
    settings = read_settings([str(file), "optimizer.learning_rate=1e-4", "model.config.n_layer=3"])
    assert settings.steps == 7
    assert settings.optimizer.learning_rate == 1e-4
    assert settings.optimizer.weight_decay == 0.5
    assert settings.optimizer.beta1 == 0.9
    assert settings.model.config == {"n_layer": 3}


def test_settings_survive_yaml_and_pickling_as_unset_fields(tmp_path: Path) -> None:
    """The workers get what was set, and so know what was left at its default."""
    settings = read_settings(["task=classification", "data.label_names=[bad, good]", "epochs=2"])
    assert Settings(**settings.model_dump(exclude_unset=True)) == settings
    file = tmp_path / "again.yaml"
    file.write_text(re.sub(".*(epochs|: '').*\n", "", yaml.safe_dump(Settings().model_dump())))
    with pytest.raises(SettingsError, match="has no effect"):
        read_settings([str(file)])  # it sets everything, also what causal-lm does not use


def test_settings_are_shown_without_the_defaults(tmp_path: Path) -> None:
    words = [
        *("storage=s3://bucket", "task=classification", "data.label_names=[bad, good]", "epochs=2"),
        *("batch_size=16", "workers.count=[1, 2]"),
    ]
    assert read_settings(words).to_yaml().splitlines() == [
        "run: finetune",
        "task: classification",
        "storage: s3://bucket",
        "epochs: 2.0",
        "data:",
        "  label_names: [bad, good]",
        "workers:",
        "  count: [1, 2]",
    ]
    file = tmp_path / "shown.yaml"
    file.write_text(read_settings(words).to_yaml())
    assert read_settings([str(file)]) == read_settings(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["zzz=1"], "zzz: unknown setting; there are run, storage"),
        (["epoch=3"], r"epoch: unknown setting; did you mean epochs\?"),
        (["learning_rate=1e-4"], r"unknown setting; did you mean optimizer.learning_rate\?"),
        (["lerning_rate=1"], r"unknown setting; did you mean optimizer.learning_rate\?"),
        (["model.learning_rate=1"], r"unknown setting; did you mean optimizer.learning_rate\?"),
        (["optimizer.epochs=1"], r"unknown setting; did you mean epochs\?"),
        (["optimizer.rate=1"], "optimizer.rate: unknown setting; .*learning_rate"),
        (["steps=many"], "steps: .* got 'many'"),
        (["steps=0"], "steps: .* got 0"),
        (["task=translation"], "task: .*'causal-lm', 'classification' .* got 'translation'"),
        (["run=a/b"], "run: .* got 'a/b'"),
        (["run=.."], "run: .* got '..'"),
        (["batch_size=8", "workers.count=9"], "batch_size=8 leaves some of 9 workers without"),
        (["workers.count=[8,2]"], r"count=\[8, 2\]: the minimum comes first"),
        (["steps=5", "epochs=2"], "steps=5 and epochs=2.0: give one"),
        (["deepspeed.offload_parameters=true"], "offload_parameters needs stage=3, got stage=2"),
        (["deepspeed.stage=0", "deepspeed.offload_optimizer=true"], "needs stage=1 or more"),
        (["model.config.n_embd=10"], "model: model.config: n_embd must be a multiple of n_head"),
        (["data.stride=4"], "data.stride has no effect with task=causal-lm"),
        (["data.label_names=[a]"], "data.label_names has no effect"),
        (["model.checkpoint=m", "model.preset=tiny"], "model.preset has no effect on a checkpoint"),
        (["model.checkpoint=m", "tokenizer.vocab_size=999"], "tokenizer.vocab_size has no effect"),
        (["model.revision=main"], "model.revision has no effect without model.checkpoint"),
        (["tokenizer.address=t", "tokenizer.vocab_size=999"], "on a tokenizer that exists"),
        (["optimizer.schedule=constant", "optimizer.final_share=0"], "final_share has no effect"),
        (
            ["task=question-answering", "data.stride=64", "data.sequence_length=64"],
            "data.stride=64 must be below data.sequence_length=64",
        ),
        (["steps=1", "nonsense"], "'nonsense' is not key=value"),
        (["missing.yaml"], "there is no settings file missing.yaml"),
        (["run.name=x", "run=y", "run.name=x"], "run: .*|run.name: run is a value"),
        (["data={"], "the value is not valid YAML"),
        (["steps=" + "9" * 5000], "the value is not valid YAML: .*4300"),
        pytest.param(
            ["model.config=" + "[" * 1000], "the value is not valid YAML", id="deep nesting"
        ),
        (["model.config={n_layer: 1, n_layer: 2}"], "the key 'n_layer' is repeated"),
        (["model.config.n_layers=4"], "unknown field 'n_layers'; did you mean n_layer?"),
        (["model.checkpoint=m", "model.config.n_layers=4"], "did you mean n_layer?"),
        (["model.config.zzz=4"], "unknown field 'zzz'; there are activation_function, .*n_l"),
        (
            ["model.config.num_labels=3"],
            "num_labels cannot be set here; use data.label_nam",
        ),
        (["model.config.dtype=bfloat16"], "dtype cannot be set here; use deepspeed.precision"),
        (["model.config={n_layer: 1, num_hidden_layers: 2}"], "num_hidden_layers=2 contradicts n_"),
        (["steps=6", "optimizer.warmup_steps=1000"], "warmup_steps=1000 is more than .* 6 steps"),
        (
            ["data.columns.txt=review"],
            "data.columns.txt: task=causal-lm has no such column; .* text",
        ),
        (["data.columns.label=stars"], "data.columns.label: task=causal-lm has no such column"),
        (["data.delimiter=;;"], "data.delimiter: must be one character .* got ';;'"),
        (["task=classification", "data.label_names=abc"], "data.label_names: .*got 'abc'"),
        (["epochs=null", "steps=null", "epochs=0"], "epochs: .* got 0"),
        (
            ["model.gradient_checkpointing=full"],
            r"model\.gradient_checkpointing: must be true, false or selective, got 'full'",
        ),
        (
            ["adapter={}", "model.checkpoint=m", "model.gradient_checkpointing=selective"],
            "adapter and model.gradient_checkpointing=selective: .* set it to true or false",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_settings_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(words)


def test_steps_replace_a_files_epochs_and_vice_versa(tmp_path: Path) -> None:
    def read(content: str, *words: str) -> Settings:
        (tmp_path / "s.yaml").write_text(content)
        return read_settings([str(tmp_path / "s.yaml"), *words])

    assert read("epochs: 3", "steps=10").total_steps(1000) == 10
    assert read("steps: 10", "epochs=2").total_steps(160) == 20
    assert read("epochs: null\nsteps: 10").total_steps(1000) == 10
    assert read("steps: 10", "epochs=null").total_steps(1000) == 10
    assert read("epochs: 2", "steps=null").total_steps(160) == 20
    assert read("epochs: null").total_steps(160) == 10
    with pytest.raises(SettingsError, match=r"steps=10 and epochs=3.0: give one"):
        read("epochs: 3\nsteps: 10")
    with pytest.raises(SettingsError, match="give one"):
        read("epochs: 3", "steps=10", "epochs=2")
    assert "epochs" not in read("epochs: 3", "steps=10").model_fields_set


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("rows", [1, 5, 15, 16, 17, 40, 56, 72, 1000])
def test_an_epoch_leaves_no_row_out(rows: int, batch: int) -> None:
    """However often the run resumes, with other numbers of workers: here after each step."""
    for epochs in (1, 2, 3):
        settings = read_settings([f"epochs={epochs}", f"batch_size={batch}"])
        order = BatchOrder(rows, batch, settings.seed)
        seen: Counter[int] = Counter()
        for step in range(settings.total_steps(rows)):
            workers = 1 + step % min(batch, 4)
            for rank in range(workers):
                for part in share_of_rank(order.indices(step), rank, workers, micro_batch=2):
                    seen.update(part)
        assert len(seen) == rows
        assert min(seen.values()) >= epochs
        assert seen.total() < epochs * rows + batch
    for tenths in range(1, 31):  # 0.1 * 30 is 3.0000000000000004 in floating point
        some = read_settings([f"epochs={tenths / 10}", f"batch_size={batch}"])
        assert some.total_steps(rows) == max(1, -(-tenths * rows // (10 * batch)))


def test_a_warm_up_longer_than_the_run_is_refused_once_the_data_is_known() -> None:
    settings = read_settings(["batch_size=16", "optimizer.warmup_steps=7"])
    assert settings.total_steps(7 * 16) == 7
    with pytest.raises(SettingsError, match="warmup_steps=7 is more than the run's 6 steps"):
        settings.total_steps(6 * 16)


def test_a_duplicate_key_in_a_file_is_refused(tmp_path: Path) -> None:
    for content, key in (
        ("steps: 1\nseed: 1\nsteps: 2\n", "steps"),
        ("data:\n  train: a\n  train: b\n", "train"),
        ("task: classification\ndata: {label_names: {1: a, '1': b}}\n", "1"),
    ):
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(
            SettingsError, match=f"s.yaml is not valid YAML: .*the key '{key}' is repeated"
        ):
            read_settings([str(tmp_path / "s.yaml")])
    (tmp_path / "s.yaml").write_text("data: &d {train: a}\nmodel: {config: {n_layer: 1}}\n")
    assert read_settings([str(tmp_path / "s.yaml")]).data.train == "a"


def test_model_fields_accept_hugging_faces_aliases() -> None:
    settings = read_settings(["model.config.num_hidden_layers=3", "model.config.hidden_size=64"])
    assert settings.model.config == {"n_layer": 3, "n_embd": 64}


def test_label_names_are_a_list_or_a_mapping_of_data_values() -> None:
    def names(text: str) -> object:
        return read_settings(["task=classification", f"data.label_names={text}"]).data.label_names

    assert names("[1, 2, 3]") == ["1", "2", "3"]
    assert names("{1: World, 2: Sports}") == {"1": "World", "2": "Sports"}
    before = read_settings(["task=classification", "data.label_names={1: a, 2: b}"])
    after = read_settings(["task=classification", "data.label_names={2: a, 1: b}"])
    (difference,) = changed(before.model_dump(mode="json"), after.model_dump(mode="json"))
    assert difference.startswith("data.label_names was {'1': 'a', '2': 'b'} and is now")


# YAML takes all of these for something else than text.
UNQUOTED = (
    *("20261128_1042", "0012345", "0x1f", "1e-4", "12e4567", "1.0", "1.50", "2026-11-28", "nan"),
    *("no", "yes", "on", "off", "true", "False"),
)


@pytest.mark.parametrize("text", UNQUOTED)
def test_text_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    """On the command line and in a file, quoted or not, also in lists and mappings."""
    for written in (text, f"'{text}'"):
        words = ["task=classification", f"run={written}", "data.train=x"]
        words += [f"data.columns.text={written}", f"data.label_names=[{written}, other]"]
        words += [f"model.checkpoint={written}", f"model.revision={written}"]
        (tmp_path / "s.yaml").write_text(
            f"task: classification\nrun: {written}\n"
            f"data: {{train: x, columns: {{text: {written}}}, label_names: [{written}, other]}}\n"
            f"model: {{checkpoint: {written}, revision: {written}}}\n"
        )
        for given in (words, [str(tmp_path / "s.yaml")]):
            settings = read_settings(given)
            assert settings.run == settings.model.checkpoint == settings.model.revision == text
            assert settings.data.columns == {"text": text}
            assert settings.data.label_names == [text, "other"]
            (tmp_path / "again.yaml").write_text(settings.to_yaml())
            assert read_settings([str(tmp_path / "again.yaml")]) == settings
    mapped = read_settings(["task=classification", f"data.label_names={{{text}: {text}, 2: b}}"])
    assert mapped.data.label_names == {text: text, "2": "b"}


def test_what_is_not_text_is_read_as_yaml() -> None:
    words = ["seed=0x10", "steps=1_000", "batch_size=1e1", "model.config={n_layer: 0x3}"]
    words += ["optimizer={learning_rate: 1.0e-5, beta1: 0.5}", "deepspeed.stage=3"]
    words += ["deepspeed.offload_optimizer=yes", "workers.count=[1, 2]", "tracking.mlflow=null"]
    words += ["tracking.wandb=~", "adapter=null", "evaluate_every=null"]
    settings = read_settings(words)
    assert (settings.seed, settings.steps, settings.batch_size) == (16, 1000, 10)
    assert settings.model.config == {"n_layer": 3}
    assert (settings.optimizer.learning_rate, settings.optimizer.beta1) == (1e-5, 0.5)
    assert settings.deepspeed.offload_optimizer
    assert settings.workers.count == (1, 2)
    assert settings.tracking.mlflow is settings.tracking.wandb is settings.adapter is None


def test_null_is_a_label_as_a_word_only() -> None:
    named = read_settings(["task=classification", "data.label_names=[null, a]"])
    assert named.data.label_names == ["null", "a"]
    for nothing in ("[~, a]", "null", "{a: }"):
        with pytest.raises(
            SettingsError, match=r"data.label_names.*: Input should be .* got .*None"
        ):
            read_settings(["task=classification", f"data.label_names={nothing}"])
    with pytest.raises(SettingsError, match="run: Input should be a valid string, got None"):
        read_settings(["run=null"])


def test_aliases_and_merged_keys_are_read_where_they_are_used(tmp_path: Path) -> None:
    """A number under one key can be text under another."""
    (tmp_path / "s.yaml").write_text(
        "seed: &n 0x10\nrun: *n\ntask: classification\nsteps: 010\n"
        "data:\n  <<: {train: 007, sequence_length: 0x20}\n  label_names: &l [01, *n]\n"
    )
    settings = read_settings([str(tmp_path / "s.yaml")])
    assert (settings.seed, settings.run, settings.steps) == (16, "0x10", 8)
    assert (settings.data.train, settings.data.sequence_length) == ("007", 32)
    assert settings.data.label_names == ["01", "0x10"]
    (tmp_path / "s.yaml").write_text("on: 5\n")
    with pytest.raises(SettingsError, match="on: unknown setting"):
        read_settings([str(tmp_path / "s.yaml")])
    for recursive in ("data.label_names=&a [*a]", "run=&a {b: *a}"):
        with pytest.raises(SettingsError, match="Input should be a valid string"):
            read_settings(["task=classification", recursive])


@pytest.mark.parametrize(
    ("text", "delimiter"), [(";", ";"), ("|", "|"), (",", ","), ("\\t", "\t"), ("\t", "\t")]
)
def test_a_delimiter_can_be_given_literally(text: str, delimiter: str) -> None:
    assert read_settings([f"data.delimiter={text}"]).data.delimiter == delimiter


def test_a_file_without_settings_is_refused(tmp_path: Path) -> None:
    for content in ("- a\n- b\n", "just text", "a: [1,\n"):
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(SettingsError, match=r"s.yaml"):
            read_settings([str(tmp_path / "s.yaml")])


def test_every_settings_file_of_ours_is_valid() -> None:
    files = sorted((ROOT / "jobs" / "settings").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        read_settings([str(file)])


def test_the_readmes_settings_are_valid(tmp_path: Path) -> None:
    (block,) = blocks("Training", "yaml", "jobs/README.md")
    (tmp_path / "readme.yaml").write_text(block)
    assert read_settings([str(tmp_path / "readme.yaml")]).deepspeed.stage == 3


def test_relative_addresses_become_absolute_and_others_stay(tmp_path: Path) -> None:
    words = ["storage=out", "data.train=some/file.txt", "data.evaluation=s3://b/k"]
    settings = read_settings([*words, "model.checkpoint=EleutherAI/gpt-j-6B"]).resolved()
    assert Path(settings.storage).is_absolute()
    assert Path(settings.data.train).is_absolute()
    assert settings.data.evaluation == "s3://b/k"
    assert settings.model.checkpoint == "EleutherAI/gpt-j-6B"


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("mlruns", "{here}/mlruns"),
        ("./a/../mlruns", "{here}/mlruns"),
        ("~/mlruns", "{home}/mlruns"),
        ("/srv/mlruns", "/srv/mlruns"),
        ("file:mlruns", "file://{here}/mlruns"),
        ("file:./my%20runs", "file://{here}/my%20runs"),
        ("file:///srv/mlruns", "file:///srv/mlruns"),
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///db/mlflow.db?timeout=9", "sqlite:///{here}/db/mlflow.db?timeout=9"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        *((same, same) for same in ("http://mlflow:5000", "https://m", "databricks", "uc:me")),
        *((same, same) for same in ("databricks://me", "postgresql://h/mlflow")),
    ],
)
def test_the_trackers_relative_paths_become_absolute(
    uri: str, resolved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers run in another folder, and each would have a tracker's files of its own."""
    monkeypatch.chdir(tmp_path)
    found = read_settings([f"tracking.mlflow={uri}"]).resolved().tracking.mlflow
    assert found == resolved.format(here=tmp_path, home=Path.home())


def test_only_changes_of_the_result_keep_a_run_from_resuming() -> None:
    before = read_settings(["steps=5", "log_every=1"]).model_dump(mode="json")
    after = read_settings(["steps=4", "log_every=9", "workers.max_failures=0"])
    assert changed(before, after.model_dump(mode="json")) == ["steps was 5 and is now 4"]
    longer = read_settings(["steps=6", "log_every=9", "workers.max_failures=0"])
    assert changed(before, longer.model_dump(mode="json")) == []
    assert extended(before, longer.model_dump(mode="json")) == {"steps"}
    with pytest.raises(SettingsError, match="early_stopping has no effect without evaluate_every"):
        read_settings(["early_stopping=2"])
    with pytest.raises(SettingsError, match="export has no effect without data to measure with"):
        read_settings(["export=last", "data.train=/x"])


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_an_earlier_version_resumes(task: str) -> None:
    """Without the settings that are new, and with documents as they were packed then."""
    words = [f"task={task}", "steps=5"]
    before = read_settings(words).model_dump(mode="json")
    del before["data"]["packing"], before["tokenizer"]["chat_template"]
    del before["optimizer"]["skip_spikes"], before["optimizer"]["spike_window"]
    now = read_settings(words).model_dump(mode="json")
    if task == "causal-lm":
        message = "data.packing was 'concatenate' and is now 'best_fit'"
        assert changed(before, now) == [message]
        now = read_settings([*words, "data.packing=concatenate"]).model_dump(mode="json")
    assert changed(before, now) == []
    now = read_settings([*words, "optimizer.skip_spikes=5"]).model_dump(mode="json")
    assert "optimizer.skip_spikes was None and is now 5.0" in changed(before, now)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        # total 10, warm-up 2: step 0 and 1 rise, then from 1 down to final_share
        ("linear", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.6, 10: 0.2}),
        ("cosine", {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.6, 10: 0.2, 4: 0.2 + 0.8 * 0.85355339}),
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule: str, shares: dict[int, float]) -> None:
    optimizer = OptimizerSettings.model_validate(
        {"schedule": schedule, "warmup_steps": 2, "final_share": 0.2}
    )
    for step, share in shares.items():
        assert learning_rate_share(optimizer, step, 10) == pytest.approx(share)


def test_a_constant_learning_rate_stays() -> None:
    optimizer = OptimizerSettings(schedule="constant", warmup_steps=1)
    assert [learning_rate_share(optimizer, s, 10) for s in (0, 1, 9)] == [0.5, 1.0, 1.0]


def test_every_deepspeed_setting_reaches_its_config() -> None:
    words = [
        "deepspeed.stage=3",
        "deepspeed.precision=bf16",
        "deepspeed.offload_optimizer=true",
        "deepspeed.offload_parameters=true",
        "batch_size=24",
        "micro_batch_size=3",
        "workers.count=4",
        "optimizer.gradient_clipping=0.5",
        "optimizer.beta2=0.95",
    ]
    config = deepspeed_config(read_settings(words), "cuda", 4)
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["optimizer"]["params"]["betas"] == [0.9, 0.95]
    pytorchs = {"torch_adam": True, "fused": True}
    assert not pytorchs.keys() & config["optimizer"]["params"].keys()
    on_cpu = deepspeed_config(read_settings(words), "cpu", 4)
    assert pytorchs.items() <= on_cpu["optimizer"]["params"].items()
