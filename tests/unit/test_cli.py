"""The program `gptj` in this process, as far as it needs no cluster."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import readme
import yaml
from http_server import listening
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails
from ray.serve.schema import ServeDeploySchema
from ray.util.state.exception import ServerUnavailable
from rich.console import Console
from serving_models import SENTENCES, Models, make_models, mounted
from typer.testing import CliRunner

from deployments.embeddings import Arguments as EmbeddingsArguments
from gptj import GPTJConfig, GPTJForSequenceClassification, storage
from gptj.data.labels import read_labels
from gptj.data.rows import DataError
from gptj.data.sources import read_rows
from gptj.errors import CheckpointError
from gptj.serving.app import add_health, new_app
from gptj.storage.errors import AccessDeniedError
from gptj.storage.file_lock import FileLock
from gptj.storage.s3_client import client
from gptj.training.settings import SettingsError, read_settings
from gptj_cli import cluster, serving, status, training
from gptj_cli.app import _of_this_terminal, app, main
from gptj_cli.local import Local, Process, down, is_up
from gptj_cli.scores import rendered
from gptj_cli.serving import Options, configuration, curl, error_of, pages, services
from gptj_cli.training import check_not_running, run_of, task_of, words_of_run
from gptj_local.s3 import LocalS3


@pytest.fixture(scope="module")
def models() -> Models:
    return make_models()


@pytest.fixture(scope="module")
def addresses(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A folder for each of the three heads."""
    folder = tmp_path_factory.mktemp("models")
    training = {"settings": {"run": "first", "data": {}}, "steps": 3, "metrics": {"loss": 1.5}}
    for name in ("generation", "classification", "question_answering"):
        model = models.with_unused_ids() if name == "generation" else getattr(models, name)
        model.save_pretrained(folder / name, tokenizer=models.tokenizer, training=training)
    return {path.name: str(path) for path in folder.iterdir()}


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(*words: str, **options: Any) -> Any:
    return CliRunner().invoke(app, list(words), **options)


@pytest.mark.slow
def test_every_command_has_help() -> None:
    commands = re.findall(r"^  (\w+)  ", run("--help").stdout, re.MULTILINE)
    known = "up down train curves evaluate predict serve status verify models".split()
    assert {*known} == {*commands}
    inner = re.findall(r"^  (\w+)  ", run("models", "--help").stdout, re.MULTILINE)
    assert {"ls", "show", "verify", "cp", "rm"} == {*inner}
    for words in (*([name] for name in commands), *(["models", name] for name in inner)):
        result = run(*words, "--help")
        assert result.exit_code == 0 and "--help" in result.stdout, words


@pytest.mark.slow
def test_every_job_has_help() -> None:
    """In one process, since they import the same libraries."""
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    programs = [path for path in sorted(jobs.glob("*.py")) if "__main__" in path.read_text()]
    assert len(programs) > 5
    script = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    try:\n"
        "        runpy.run_path(path, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, path\n"
        "    else:\n"
        "        raise AssertionError(path)\n"
    )
    command = [sys.executable, "-c", script, *map(str, programs)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for path in programs:
        assert path.name in result.stdout, path


def test_jobs_can_be_run_as_the_documents_write_them() -> None:
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    programs = [path for path in jobs.glob("*.py") if path.read_text().startswith("#!")]
    assert len(programs) > 5
    assert [path.name for path in programs if not os.access(path, os.X_OK)] == []


@pytest.mark.parametrize(
    ("header", "words", "task"),
    [
        ("text,label", [], "classification"),
        ("text;label;id", [], "classification"),
        ("id,text", [], "causal-lm"),
        ("question,context,answers,text,label", [], "question-answering"),
        ("review,label", ["data.columns.text=review"], "classification"),
        ("review,stars", ["data.columns.text=review"], "causal-lm"),
    ],
)
def test_the_columns_determine_the_task(
    tmp_path: Path, header: str, words: list[str], task: str
) -> None:
    row = re.sub(r"\w+", "x", header)
    assert task_of(written(tmp_path / "rows.csv", header, row), words) == task


def test_columns_that_match_no_task_are_listed(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.csv", "review,stars", "good,5")
    message = r"no task takes the columns 'review', 'stars' .*data.columns.text=NAME"
    with pytest.raises(DataError, match=message) as raised:
        task_of(file, [])
    assert "'question'" not in str(raised.value)  # which is not what is missing
    with pytest.raises(DataError, match=r"no column 'reviews' \(for text\).*'review', 'stars'"):
        task_of(file, ["data.columns.text=reviews", "data.columns.label=stars"])
    with pytest.raises(DataError, match="no task has all of texts; there are answers, "):
        task_of(file, ["data.columns.texts=review"])
    with pytest.raises(storage.NotFoundError, match="none-such"):
        task_of(str(tmp_path / "none-such.csv"), [])


def test_a_language_model_of_one_of_several_columns_says_how_to_get_a_classifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert task_of(written(tmp_path / "rows.csv", "text,stars", "good,5"), []) == "causal-lm"
    said = capsys.readouterr().err
    assert "this trains a language model; the columns are 'text', 'stars'. For a class" in said
    assert "data.columns.label=NAME" in said
    assert task_of(written(tmp_path / "texts.csv", "text", "good"), []) == "causal-lm"
    assert task_of(written(tmp_path / "pairs.csv", "prompt,completion", "a,b"), []) == "causal-lm"
    assert capsys.readouterr().err == ""


def test_the_command_for_ag_news_in_the_documents_reads_its_files(tmp_path: Path) -> None:
    rows = "\n".join(f'"{label}","Title, {label}","Said ""{label}""\\\\here"' for label in "4213")
    file = tmp_path / "train.csv"
    file.write_text(f"{rows}\n")
    document = (Path(__file__).resolve().parents[2] / "jobs" / "README.md").read_text()
    (command,) = re.findall(r"^gptj train --data train.csv .*\\\n.*", document, re.MULTILINE)
    _, _, _, _, *given = shlex.split(command.replace("\\\n", " "))
    said = words_of_run(
        given,
        data=str(file),
        evaluation=None,
        task=None,
        model=None,
        run=None,
        storage_address=str(tmp_path / "runs"),
    )
    settings = read_settings(said)
    assert settings.task == "classification"
    found = list(read_rows(str(file), ("text", "text_pair", "label"), settings.data.columns))
    assert found[0].values == {"text": "Title, 4", "text_pair": 'Said "4"\\\\here', "label": "4"}
    labels = read_labels(found, names=settings.data.label_names)
    assert [labels.labels.names[target] for target in labels.targets] == [
        "Sci/Tech",
        "Sports",
        "World",
        "Business",
    ]


def test_without_credentials_another_terminal_is_told_what_to_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    refused = AccessDeniedError("s3://gptj/: there are no credentials")
    assert _of_this_terminal(refused) == ""
    (tmp_path / ".gptj").mkdir()
    (tmp_path / ".gptj" / "env").touch()
    assert "source .gptj/env" in _of_this_terminal(refused)
    assert _of_this_terminal(ValueError("another")) == ""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    assert _of_this_terminal(refused) == ""


def words_for(data: str, *words: str, **options: Any) -> list[str]:
    given: dict[str, Any] = dict.fromkeys(("evaluation", "task", "model", "run"))
    return words_of_run(words, **{**given, "data": data, "storage_address": "s3://b", **options})


@pytest.mark.parametrize("task", [None, "classification"])
def test_the_first_labels_are_checked_before_a_job_starts(
    addresses: dict[str, str], tmp_path: Path, task: Any
) -> None:
    news = written(tmp_path / "news.csv", "text,label", *(f"news,{n}" for n in (3, 4, 2)))
    listed = "data.label_names=[World, Sports, Business, Sci/Tech]"
    with pytest.raises(DataError, match=r"row 2.*remedy: .*data.label_names={1: World, 2: Sports"):
        words_for(news, listed, task=task)
    mapped = "data.label_names={1: World, 2: Sports, 3: Business, 4: Sci/Tech}"
    assert mapped in words_for(news, mapped, task=task)
    with pytest.raises(DataError, match=r"news.csv, row 2"):
        words_for(news, mapped.replace("4:", "5:"), task=task)
    assert "data.bad_rows=skip" in words_for(news, listed, "data.bad_rows=skip", task=task)
    assert words_for(news, listed, "data.problem_type=regression", task=task)
    # A classifier's own labels: negative, neutral, positive.
    trained = addresses["classification"]
    with pytest.raises(DataError, match=r"'3' is not .*remedy: .*{1: negative, 2: neutral, 3: pos"):
        words_for(news, model=trained, task=task)
    with pytest.raises(SettingsError, match="has 3 labels"):
        words_for(news, mapped, model=trained, task=task)
    reviews = written(tmp_path / "reviews.csv", "text,label", "fine,positive", "bad,negative")
    assert words_for(reviews, model=trained, task=task)
    with pytest.raises(DataError, match=r"news.csv, row 1"):
        words_for(reviews, model=trained, task=task, evaluation=news)


def test_first_class_numbers_pass_if_the_models_training_wrote_none(
    models: Models, tmp_path: Path
) -> None:
    names = {"negative": 0, "neutral": 1, "positive": 2}
    reviews = written(tmp_path / "reviews.csv", "text,label", "bad,0", "fine,2")
    for extra in ({"neg": 0, "pos": 2}, {"1": 0, "2": 1, "3": 2}):
        training = {"labels": {"written": {**names, **extra}, "multi_hot": False}}
        address = str(tmp_path / min(extra))
        models.classification.save_pretrained(
            address, tokenizer=models.tokenizer, training=training
        )
        if "neg" in extra:
            assert words_for(reviews, model=address, task="classification")
        else:
            with pytest.raises(DataError, match=r"row 1, .*'0' is not one of the labels"):
                words_for(reviews, model=address, task="classification")


def test_first_values_are_checked_as_what_the_model_predicts(
    models: Models, tmp_path: Path
) -> None:
    """One that predicts a value; `n/a` would be a name if it were not known to."""
    fields = models.classification.config.to_dict() | {"problem_type": "regression"}
    one = {"id2label": {0: "stars"}, "label2id": {"stars": 0}}
    config = GPTJConfig.from_dict({**fields, **one})
    address = str(tmp_path / "model")
    GPTJForSequenceClassification(config).save_pretrained(address, tokenizer=models.tokenizer)
    rows = written(tmp_path / "stars.csv", "text,label", "fine,4.5", "lost,n/a")
    with pytest.raises(DataError, match=r"stars.csv, row 2.*must be a finite number, got 'n/a'"):
        words_for(rows, model=address, task="classification")
    assert words_for(written(tmp_path / "more.csv", "text,label", "fine,4"), model=address)


@pytest.mark.parametrize("name", ["*.csv", "@r.csv", "[a].csv", "!x.csv", "%x.csv", "#1 😀.csv"])
def test_names_that_yaml_reads_otherwise_are_quoted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / ("a.csv" if name == "*.csv" else name), "text,label", "good,yes")
    assert read_settings(words_for(name)).data.train == str(tmp_path / name)


def test_how_rows_are_read_is_a_setting_before_the_task_is_known(tmp_path: Path) -> None:
    """Read like all settings, on the command line or in a file."""
    tabs = written(tmp_path / "tabs.csv", "body\tlabel", "good\tyes")
    words = ["data.delimiter=\\t", 'data.columns.text="body"']
    assert "task=classification" in words_for(tabs, *words)
    file = written(tmp_path / "run.yaml", 'data: {columns: {text: body}, delimiter: "\\t"}')
    assert "task=classification" in words_for(tabs, file)
    with pytest.raises(SettingsError, match=r"data.delimiter: must be one character .* got 'ab'"):
        words_for(tabs, "data.delimiter=ab")


def test_the_first_answers_are_checked_before_a_job_starts(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": "She did.", "answers": [{"text": "She"}]}
    with pytest.raises(DataError, match=r"row 1, column 'answers'"):
        words_for(written(tmp_path / "squad.jsonl", json.dumps(row)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--epochs", "3"], "--epochs; settings are key=value: epochs=3"),
        (["train", "--learning-rate=1e-4"], "key=value: optimizer.learning_rate=1e-4"),
        (["train", "--epochs", "--detach"], "key=value: epochs=…"),
        (["train", "--detatch"], "--detatch; did you mean --detach"),
        (["evaluate", "MODEL", "DATA", "--limit", "3"], "key=value: limit=3"),
        (["evaluate", "--limit=3", "MODEL", "DATA"], "key=value: limit=3"),
        (["predict", "MODEL", "DATA", "--delimiter", ";"], "key=value: delimiter=;"),
    ],
)
def test_settings_as_options_are_refused_with_their_form(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(words)


def test_a_run_that_a_job_trains_is_not_submitted_again() -> None:
    def job(status: str, folder: str) -> JobDetails:
        return JobDetails(
            type="SUBMISSION",
            submission_id=f"raysubmit_{status}",
            status=status,
            entrypoint="python -m jobs.finetune",
            metadata={"gptj_run_folder": folder},
        )

    old = [
        job("SUCCEEDED", "s3://b/run"),
        job("FAILED", "s3://b/run"),
        job("STOPPED", "s3://b/run"),
    ]
    check_not_running([*old, job("RUNNING", "s3://b/other")], "s3://b/run")
    for state in ("PENDING", "RUNNING"):
        with pytest.raises(ValueError, match=f"ray job logs --follow raysubmit_{state}"):
            check_not_running([*old, job(state, "s3://b/run")], "s3://b/run")


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        ("raysubmit_1", "job raysubmit_1 is already .*; or stop it: ray job stop raysubmit_1"),
        (None, "the process 42 on 10.0.0.1, job 03000000, is already .*, or stop that process"),
    ],
)
def test_a_run_that_gptj_train_has_not_submitted_is_not_submitted_again(
    submission: str | None, message: str
) -> None:
    def job(status: str) -> JobDetails:
        return JobDetails(
            type="SUBMISSION" if submission else "DRIVER",
            submission_id=submission,
            job_id="03000000",
            status=status,
            entrypoint="python jobs/finetune.py run=run",
            driver_info={"id": "03000000", "node_ip_address": "10.0.0.1", "pid": "42"},
        )

    check_not_running([job("RUNNING")], "s3://b/run", {"04000000"})
    check_not_running([job("SUCCEEDED")], "s3://b/run", {"03000000"})
    with pytest.raises(ValueError, match=message):
        check_not_running([job("RUNNING")], "s3://b/run", {"03000000"})


def test_columns_of_a_given_task_are_checked_before_a_job_starts(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.csv", "review,stars", "good,5")
    with pytest.raises(DataError, match=r"no column 'text' and no column 'label'.*'review'"):
        words_of_run(
            [],
            data=file,
            evaluation=None,
            task="classification",
            model=None,
            run=None,
            storage_address=str(tmp_path / "runs"),
        )


@pytest.mark.parametrize("task", [None, "classification"])
def test_a_bad_first_row_is_skipped_if_bad_rows_are(tmp_path: Path, task: Any) -> None:
    file = written(tmp_path / "rows.jsonl", "no JSON", '{"text": "good", "label": "yes"}')
    given: dict[str, Any] = {
        "data": file, "evaluation": None, "task": task, "model": None, "run": None,
        "storage_address": str(tmp_path / "runs"),
    }  # fmt: skip
    assert "task=classification" in words_of_run(["data.bad_rows=skip"], **given)
    with pytest.raises(DataError, match="row 1: must be a JSON object"):
        words_of_run([], **given)


@pytest.mark.parametrize(
    ("address", "run_name"),
    [
        ("/data/reviews.csv", "reviews"),
        ("s3://bucket/My reviews (2024).jsonl.gz", "My-reviews-2024"),
        ("s3://bucket/folder/", "folder"),
        ("data/*.parquet", "finetune"),
    ],
)
def test_a_run_is_named_after_its_data(address: str, run_name: str) -> None:
    assert run_of(address) == run_name


def test_a_job_gets_absolute_paths_and_the_users_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job starts in another folder; a # in a name is not a YAML comment."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a #1.csv", "text,label", "good,yes")
    written(tmp_path / "settings.yaml", "run: mine", "epochs: 2")
    written(tmp_path / "chat.jinja", "{{ messages }}")
    relative = ["tokenizer.chat_template=chat.jinja", "tracking.mlflow=mlruns"]
    words = words_of_run(
        ["settings.yaml", "steps=7", "optimizer.learning_rate=1e-4", *relative],
        data="a #1.csv",
        evaluation=None,
        task=None,
        model=None,
        run=None,
        storage_address="outputs",
    )
    assert words[0] == str(tmp_path / "settings.yaml")
    assert {"steps=7", "optimizer.learning_rate=1e-4", "task=classification"} < {*words}
    assert f'data.train="{tmp_path}/a #1.csv"' in words
    assert f"storage={tmp_path}/outputs" in words
    assert f"tokenizer.chat_template={tmp_path}/chat.jinja" in words
    assert f"tracking.mlflow={tmp_path}/mlruns" in words
    assert not any(word.startswith("run=") for word in words), "the file names it"
    with pytest.raises(SettingsError, match="unknown setting"):
        words_of_run(
            ["nonsense=1"],
            data=None, evaluation=None, task=None, model=None, run=None, storage_address="outputs",
        )  # fmt: skip


def test_without_a_cluster_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="with gptj up"):
        main(["train", "--folder", str(tmp_path)])
    (tmp_path / "env").touch()
    with pytest.raises(SystemExit, match=f"remedy: source {tmp_path}/env"):
        main(["train", "--folder", str(tmp_path)])


@pytest.mark.parametrize("exports", [True, False])
@pytest.mark.parametrize("command", [["status"], ["train", "--data", "rows.csv"], ["serve", "m"]])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Failed to connect to Ray at address: http://x:1."), "Failed to connect"),
        (ServerUnavailable("Failed to make request to http://x:1/api. Check…"), "does not answer"),
        (AuthenticationError("Invalid authentication token"), "missing or wrong: Invalid"),
    ],
)
def test_variables_of_a_cluster_that_is_gone_have_a_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
    command: list[str],
    exports: bool,
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://x:1")
    written(tmp_path / "rows.csv", "text,label", "good,1", "bad,0")
    monkeypatch.setattr(status, "ServeSubmissionClient", refuse)
    monkeypatch.setattr(training, "JobSubmissionClient", refuse)
    monkeypatch.setattr(serving, "services", lambda *_: [])
    monkeypatch.setattr(serving, "list_nodes", lambda **_: refuse())
    remedy = r"remedy: correct RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN"
    if exports:
        (tmp_path / ".gptj").mkdir()
        (tmp_path / ".gptj" / "env").touch()
        remedy = r"remedy: source \.gptj/env, after gptj up"
    with pytest.raises(SystemExit, match=f"^error: .*{message}.*; {remedy}"):
        main(command)


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("ours")

    monkeypatch.setattr(serving, "services", fail)
    with pytest.raises(LookupError, match="ours"):
        main(["serve", "model"])


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_swapped_arguments_are_not_looked_for_on_the_hub(
    addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rev.csv", "text,label", "good,positive")
    model = addresses["classification"]
    with pytest.raises(SystemExit, match=f"rev.csv is a file, .*remedy: .*{command} {model} rev"):
        main([command, "rev.csv", model])
    for words in (["serve", "rev.csv"], ["models", "show", "rev.csv"]):
        with pytest.raises(SystemExit, match=r"rev.csv' is not an existing folder but a file"):
            main(words)


def test_the_storage_of_gptj_up_is_named_where_nothing_is_in_the_default_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTJ_STORAGE", raising=False)
    with pytest.raises(SystemExit, match=r"nothing is at outputs$"):
        main(["models", "ls"])
    (tmp_path / ".gptj").mkdir()
    (tmp_path / ".gptj" / "env").touch()
    with pytest.raises(SystemExit, match=r"nothing is at outputs; .*source \.gptj/env$"):
        main(["models", "ls"])
    with pytest.raises(SystemExit, match=r"nothing is at elsewhere$"):
        main(["models", "ls", "elsewhere"])


def test_an_evaluation_is_shown_as_tables() -> None:
    scores = {"precision": 0.5, "recall": 1.0, "f1": 0.667, "support": 2}
    result = {
        "checkpoint": "s3://a/model",
        "accuracy": 0.66666,
        "classes": {"bad": scores, "good [sic]": scores},
        "labels": ["bad", "good [sic]"],
        "confusion_matrix": [[2, 0], [1, 11]],
    }
    output = io.StringIO()
    console = Console(file=output, width=100, color_system=None)
    console.print(rendered(result))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["accuracy", "0.6667"] in lines
    assert ["good", "[sic]", "0.500", "1.000", "0.667", "2"] in lines
    assert ["good", "[sic]", "1", "11"] in lines
    console.print(rendered({**result, "labels": ["a"] * 13}))
    assert "a confusion matrix of 13 labels is in the output of --json" in output.getvalue()


def test_predictions_of_each_head_row_by_row(
    addresses: dict[str, str], models: Models, tmp_path: Path
) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["text", "question", "context"])
        writer.writerows([sentence, "Who wrote the book?", sentence] for sentence in SENTENCES)
    rows = str(tmp_path / "rows.csv")

    def results(head: str, *words: str) -> list[dict[str, Any]]:
        main_words = ["predict", addresses[head], rows, "--dtype", "float32", *words]
        result = run(*main_words)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    classified = results("classification")
    assert [each["row"] for each in classified] == [1, 2, 3]
    assert [each["text"] for each in classified] == SENTENCES
    ids = models.tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    probabilities = models.classification(ids).logits.softmax(-1)[0].tolist()
    found = {label["label"]: label["score"] for label in classified[0]["labels"]}
    assert found == pytest.approx(
        dict(zip(("negative", "neutral", "positive"), probabilities, strict=True)), abs=1e-5
    )
    answers = results("question_answering")
    for answer, sentence in zip(answers, SENTENCES, strict=True):
        assert sentence[answer["start"] : answer["end"]] == answer["answer"]
    continued = results("generation", "--max-tokens", "4")
    new = models.generation.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
    assert continued[0]["completion"] == models.tokenizer.decode(new.tolist())
    assert all(each["finish_reason"] in ("length", "stop") for each in continued)


def test_a_bad_row_does_not_affect_the_others(addresses: dict[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b" * 5000, "c")))
    output = tmp_path / "out.jsonl"
    with pytest.raises(SystemExit, match="1 of 3 rows failed"):
        main(["predict", addresses["classification"], str(rows), "--output", str(output)])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["error" in each for each in found] == [False, True, False]
    assert "context is 64" in found[1]["error"]


@pytest.mark.slow
def test_an_output_is_replaced_only_by_all_results(
    addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "linked.jsonl").symlink_to(rows)
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    output.write_text("before")
    model = addresses["classification"]

    def fails(message: str, *words: str) -> None:
        before = {path: path.read_text() for path in tmp_path.iterdir()}
        result = run("predict", *words)
        assert result.exit_code != 0
        assert message in f"{result.output} {result.exception}"
        assert {path: path.read_text() for path in tmp_path.iterdir()} == before

    fails("no-such-model", "/tmp/no-such-model", str(rows), "--output", str(output))
    fails("no file", model, str(tmp_path / "absent"), "--output", str(output))
    for data in (rows, tmp_path, tmp_path / "*.jsonl"):
        for name in ("rows.jsonl", "linked.jsonl"):
            same = ("--output", str(tmp_path / name))
            fails("which it would replace: choose another name", model, str(data), *same)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot JSON\n')
    absent = tmp_path / "absent"
    fails(
        f"--output {absent}/out.jsonl: the folder {absent} does not exist; remedy: mkdir",
        model,
        str(rows),
        "--output",
        str(absent / "out.jsonl"),
    )
    fails("is a folder; remedy: name a file", model, str(rows), "--output", str(tmp_path))
    output.chmod(0o600)
    rows.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in range(1, 9)))
    (tmp_path / "bad.jsonl").write_text(rows.read_text() + "not JSON\n")
    ending = ("--output", str(output), "--batch-size", "1")
    failed = run("predict", model, str(tmp_path / "bad.jsonl"), *ending)
    assert "bad.jsonl" in str(failed.exception)
    (unfinished,) = tmp_path.glob("out.jsonl.*.partial")
    assert f"{unfinished} has the results so far" in failed.output
    assert output.read_text() == "before"
    kept = unfinished.read_text().splitlines()
    assert run("predict", model, str(rows), *ending).exit_code == 0
    assert kept and kept == output.read_text().splitlines()[: len(kept)]
    assert output.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob("*.partial")) == [unfinished]  # kept beside a later run's results
    output.unlink()
    output.symlink_to(tmp_path / "real.jsonl")
    assert run("predict", model, str(rows), "--output", str(output)).exit_code == 0
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 8
    assert output.is_symlink()
    assert run("predict", model, str(rows), "--output", "/dev/null").exit_code == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM])
def test_results_reach_a_file_that_cannot_be_replaced(
    number: int, addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount, as of docker -v, or another user's file in /tmp. They take root: errors are made."""
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"text": "a"}\n')
    output.touch()
    before = output.stat().st_ino

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    words = ("predict", addresses["classification"], str(rows), "--output", str(output))
    assert run(*words).exit_code == 0
    assert len(output.read_text().splitlines()) == 1 and output.stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


def test_embeddings_are_served_beside_others_or_alone(
    addresses: dict[str, str], models: Models, tmp_path: Path
) -> None:
    language_model = addresses["generation"]
    found = services([language_model], [], language_model)
    routes = {
        each["route_prefix"]: each for each in configuration(found, Options())["applications"]
    }
    assert routes.keys() == {"/", "/v1/embeddings"}
    application = routes["/v1/embeddings"]
    assert application["import_path"] == "deployments.embeddings:build"
    assert application["args"]["model_name"] == "generation"
    assert application["deployments"][0]["name"] == "embeddings"
    EmbeddingsArguments.model_validate(application["args"])
    alone = str(tmp_path / "embedder")
    models.generation.transformer.save_pretrained(alone, tokenizer=models.tokenizer)
    (only,) = configuration(services([alone], []), Options())["applications"]
    assert only["route_prefix"] == "/v1/embeddings"
    assert curl("http://x", only).startswith("curl http://x/v1/embeddings -H")
    with pytest.raises(ValueError, match="embedder serves them already: omit one"):
        services([alone], [], language_model)


def test_the_checkpoints_determine_the_configuration(addresses: dict[str, str]) -> None:
    config = configuration(services([*addresses.values()], []), Options(port=8123, on_gpu=True))
    assert config["http_options"]["port"] == 8123
    routes = {each["route_prefix"]: each for each in config["applications"]}
    assert routes.keys() == {"/", "/classification", "/question-answering"}
    assert routes["/classification"]["args"]["checkpoint"] == addresses["classification"]
    assert routes["/"]["args"]["model_name"] == "generation"
    for application in config["applications"]:
        (deployment,) = application["deployments"]
        assert deployment["ray_actor_options"]["num_gpus"] == 1
    assert pages("http://x", routes["/"]) == {"API": "http://x/docs", "Playground": "http://x/"}
    assert pages("http://x", routes["/classification"]) == {"API": "http://x/classification/docs"}
    both = services([addresses["classification"]] * 2, ["one", "two"])
    several = configuration(both, Options(min_replicas=3))["applications"]
    assert [each["route_prefix"] for each in several] == [
        "/one/classification",
        "/two/classification",
    ]
    assert several[0]["deployments"][0]["autoscaling_config"]["max_replicas"] == 3


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [("0.0.0.0", None, True), ("0.0.0.0", "a-key", False), ("127.0.0.1", None, False)],
)
def test_a_service_that_everyone_can_use_has_a_warning(
    addresses: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    keys: str | None,
    warned: bool,
) -> None:
    """It is the services that tell: their keys are those of `gptj up`'s environment."""
    if keys is not None:
        monkeypatch.setenv("GPTJ_API_KEYS", keys)
    apps = {prefix: new_app(prefix) for prefix in ("/", "/classification")}
    for each in apps.values():
        add_health(each, lambda: True, "")
    monkeypatch.delenv("GPTJ_API_KEYS", raising=False)
    monkeypatch.setattr(cluster, "dashboard_address", lambda folder: "http://nowhere")
    monkeypatch.setattr(serving, "has_gpus", lambda dashboard: False)
    monkeypatch.setattr(serving, "deploy", lambda dashboard, config: [])
    with listening(mounted(apps)) as address:
        port = address.rpartition(":")[2]
        models = [addresses["generation"], addresses["classification"]]
        result = run("serve", *models, "--host", host, "--port", port)
    assert result.exit_code == 0, result.output
    warning = f"everyone who can reach port {port} of this machine can use generation, classif"
    assert (warning in result.stderr) == warned
    assert ("remedy: leave out --host" in result.stderr) == warned


def test_a_chat_template_is_served_with_the_language_models(
    addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jinja").write_text("{{ messages[0].content }}")
    Path("dolly").mkdir()
    found = services([*addresses.values()], [])
    for given, expected in (
        ("dolly", "dolly"),
        ("mine.jinja", str(tmp_path / "mine.jinja")),
        ("s3://bucket/mine.jinja", "s3://bucket/mine.jinja"),
    ):
        applications = configuration(found, Options(chat_template=given))["applications"]
        args = {each["name"]: each["args"] for each in applications}
        assert args["generation"]["chat_template"] == expected
        assert "chat_template" not in args["classification"]
    with pytest.raises(ValueError, match="for language models"):
        configuration(services([addresses["classification"]], []), Options(chat_template="dolly"))


def test_a_classifier_of_pairs_is_queried_with_a_pair(models: Models, tmp_path: Path) -> None:
    training = {"settings": {"data": {"columns": {"text": "_c1", "text_pair": "_c2"}}}}
    address = str(tmp_path / "pairs")
    models.classification.save_pretrained(address, tokenizer=models.tokenizer, training=training)
    (service,) = services([address], [])
    (application,) = configuration([service], Options())["applications"]
    assert '"text_pair": ' in curl("http://x", application, pairs=service.pairs)


def test_the_readmes_shortest_configuration_is_valid(addresses: dict[str, str]) -> None:
    """And `serve run` reads from it what `gptj serve` would write."""
    (block,) = readme.blocks("A model of your own", "yaml", "deployments/README.md")
    config = ServeDeploySchema.model_validate(yaml.safe_load(block))
    (short,) = config.model_dump(exclude_unset=True)["applications"]
    (ours,) = configuration(services([addresses["classification"]], []), Options())["applications"]
    for key in ("name", "route_prefix", "import_path"):
        assert short[key] == ours[key]
    assert short["args"].keys() <= ours["args"].keys()
    assert short["deployments"][0]["name"] == ours["deployments"][0]["name"]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--dtype", "float32"], "float32"),
        (
            "--dtype bfloat16 --name mine --port 8123 --host 0.0.0.0 --min-replicas 2 "
            "--chat-template dolly".split(),
            "bfloat16",
        ),
    ],
)
def test_the_printed_configuration_is_valid_with_any_options(
    addresses: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(cluster, "dashboard_address", lambda folder: "http://nowhere")
    monkeypatch.setattr(serving, "has_gpus", lambda dashboard: device == "cuda")
    address = addresses["generation"]
    for more in ([], ["--embeddings", address]):
        printed = run(
            *("serve", address, "--print", "--device", device, *words, *more),
            catch_exceptions=False,
        ).stdout
        config = ServeDeploySchema.model_validate(yaml.safe_load(printed))
        assert [(each.args or {})["dtype"] for each in config.applications] == (
            [expected] * len(config.applications)
        )
        assert len(config.applications) == 1 + bool(more)


@pytest.mark.parametrize("name", ["b b", "modèle", "{b}", "a/b", "..", "a\nb", "café-2", "a%20b"])
def test_names_that_cannot_be_routes_are_refused(
    addresses: dict[str, str], tmp_path: Path, name: str
) -> None:
    """Serve's controller fails on some of them, and then deploys nothing more."""
    address = addresses["classification"]
    one = configuration(services([address], [name]), Options())["applications"]
    assert one[0]["name"] == "classification"  # of a kind's only model it is in no route
    with pytest.raises(ValueError, match=r"(?s)would be served at /.*remedy: a --name for each"):
        configuration(services([address] * 2, ["one", name]), Options())
    two = configuration(services([address] * 2, ["one", "GPT-J_2.b"]), Options())
    assert two["applications"][1]["route_prefix"] == "/GPT-J_2.b/classification"
    folder = tmp_path / "modèle"
    shutil.copytree(address, folder)
    with pytest.raises(ValueError, match="would be served at /modèle"):
        configuration(services([address, str(folder)], []), Options())


@pytest.mark.parametrize("name", ["generation", "embeddings"])
def test_a_name_of_another_application_is_refused(addresses: dict[str, str], name: str) -> None:
    language_model, classifier = addresses["generation"], addresses["classification"]
    found = services([language_model, classifier, classifier], ["x", name, "y"], language_model)
    with pytest.raises(ValueError, match=f"the name '{name}' is also that of the only {name} ser"):
        configuration(found, Options())


def test_what_serve_compares_changes_with_the_content_and_with_nothing_else(
    addresses: dict[str, str], tmp_path: Path
) -> None:
    def compared() -> Any:
        (application,) = configuration(services([str(model)], []), options)["applications"]
        return application["runtime_env"], application["args"]

    options = Options()
    model = tmp_path / "model"
    shutil.copytree(addresses["generation"], model)
    finished = compared()
    assert compared() == finished
    shutil.rmtree(model)
    shutil.copytree(addresses["generation"], model)
    assert compared() == finished  # a copy of the same files
    (model / "manifest.json").unlink()
    without = compared()
    assert compared() == without != finished
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b"\n")
    assert compared() != without
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    options = Options(chat_template=str(template))
    first = compared()
    assert compared() == first
    template.write_text("{{ messages[1].content }}")
    assert compared() != first


def details_of(
    config: dict[str, Any], status: str, deployment: tuple[str, str] = ("HEALTHY", "")
) -> dict[str, Any]:
    """As Serve describes applications that are deployed with a configuration.

    Args:
        deployment: the status and message of each one's only deployment.
    """
    message = "Failed to update the deployments ['generation']." if status != "RUNNING" else ""
    return {
        "applications": {
            each["name"]: {
                "status": status,
                "message": message,
                "deployed_app_config": each,
                "deployments": {
                    each["deployments"][0]["name"]: {
                        "status": deployment[0],
                        "message": deployment[1],
                    }
                },
            }
            for each in config["applications"]
        }
    }


@pytest.mark.parametrize("status", ["DEPLOY_FAILED", "UNHEALTHY"])
def test_what_has_failed_is_started_again_and_what_runs_is_left_alone(
    addresses: dict[str, str], status: str
) -> None:
    config = configuration(services([addresses["generation"]], []), Options())
    nothing: dict[str, Any] = {"applications": {}}
    assert serving._attempted(config, nothing) == config
    assert serving._attempted(config, details_of(config, "RUNNING")) == config
    again = serving._attempted(config, details_of(config, status))
    assert again != config
    ServeDeploySchema.model_validate(again)
    assert serving._attempted(config, details_of(again, "RUNNING")) == again
    assert serving._attempted(config, details_of(again, status)) not in (again, config)


def test_a_failure_is_told_by_its_deployments(addresses: dict[str, str]) -> None:
    config = configuration(services([addresses["generation"]], []), Options())
    message = (
        "The deployment failed to start 3 times in a row. Error:\n"
        'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n'
        "gptj.errors.CheckpointError: model.safetensors was altered"
    )
    failed = details_of(config, "DEPLOY_FAILED", ("DEPLOY_FAILED", message))
    with pytest.raises(ValueError, match=r"^generation: model.safetensors was altered$"):
        serving._are_running(failed, config)
    with pytest.raises(ValueError, match="Failed to update the deployments"):
        serving._are_running(details_of(config, "DEPLOY_FAILED"), config)
    again = serving._attempted(config, failed)
    assert not serving._are_running(failed, again)  # not yet that one
    assert serving._are_running(details_of(again, "RUNNING"), again)


def test_checkpoints_that_cannot_be_served_are_refused_before_deploying(
    addresses: dict[str, str], s3: LocalS3
) -> None:
    for words in (["serve"], ["models", "show"], ["models", "verify"]):
        with pytest.raises(
            SystemExit,
            match=r"^error: nothing is at s3://gptj/none/model; remedy: gptj models ls s3://gptj$",
        ):
            main([*words, "s3://gptj/none/model"])
    with pytest.raises(FileNotFoundError, match="not an existing folder"):
        services(["./none-such"], [])
    with pytest.raises(ValueError, match=r"two models would be named 'classification'.*--name"):
        services([addresses["classification"]] * 2, [])


def test_the_last_error_of_a_traceback_is_shown() -> None:
    text = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    g()\n'
    assert error_of(f"{text}ValueError: the checkpoint\nis bad") == "the checkpoint\nis bad"
    assert error_of(f"{text}ray.exceptions.RayError: x: y") == "x: y"
    assert error_of("no traceback: at all") == "no traceback: at all"
    heading = "Deploying app 'classification' failed with exception:\n"  # Serve's
    assert error_of(f"{heading}the checkpoint is bad: s3://a") == "the checkpoint is bad: s3://a"
    assert error_of(f"{heading}{text}ValueError: bad") == "bad"


def test_model_folders_are_listed_shown_copied_verified_and_removed(
    addresses: dict[str, str], s3: LocalS3, tmp_path: Path
) -> None:
    source, copy = addresses["classification"], f"s3://{s3.bucket}/cli/copied/model"
    assert "good: " in run("models", "cp", source, copy).stdout
    with pytest.raises(storage.AlreadyExistsError):
        run("models", "cp", source, copy, catch_exceptions=False)
    assert copy in run("models", "ls", f"s3://{s3.bucket}/cli").stdout
    assert f"{copy}: good: " in run("verify", copy).stdout
    shown = json.loads(run("models", "show", copy, "--json").stdout)
    assert shown["head"] == "GPTJForSequenceClassification" and shown["steps"] == 3
    assert shown["labels"] == ["negative", "neutral", "positive"]
    assert "positive" in run("models", "show", copy).stdout

    with pytest.raises(ValueError, match=r"neither a model folder .* nor a run's"):
        run("models", "rm", f"s3://{s3.bucket}/cli", "--yes", catch_exceptions=False)
    assert run("models", "rm", copy, input="n\n").exit_code == 1
    assert storage.list_files(copy)
    assert run("models", "rm", copy, input="y\n").exit_code == 0
    assert not storage.list_files(copy)


def test_a_bucket_is_not_removed_even_if_it_is_a_model(
    addresses: dict[str, str], s3: LocalS3
) -> None:
    bucket, unrelated = "s3://whole", "s3://whole/unrelated/model"
    client().create_bucket(Bucket="whole")
    for address in (unrelated, bucket):
        storage.upload_folder(addresses["classification"], address)
    before = storage.list_files(bucket)
    for spelling in (bucket, f"{bucket}/"):
        with pytest.raises(ValueError, match=f"{bucket} is a whole bucket: not deleted; remedy"):
            run("models", "rm", spelling, "--yes", catch_exceptions=False)
    assert storage.list_files(bucket) == before
    assert run("models", "rm", unrelated, "--yes").exit_code == 0


def test_a_home_folder_is_not_removed_even_if_it_looks_like_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "me"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for folder in (home, home.parent):
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="is, or contains, your home folder: not deleted"):
            run("models", "rm", str(folder), "--yes", catch_exceptions=False)
    assert (home / "config.json").exists()


@pytest.mark.parametrize("yes", [True, False])
def test_models_inside_a_model_are_named_before_they_are_removed(
    addresses: dict[str, str], tmp_path: Path, yes: bool
) -> None:
    for name in ("all", "all/second/model", "all/first"):
        shutil.copytree(addresses["classification"], tmp_path / name)
    result = run("models", "rm", str(tmp_path / "all"), *(["--yes"] if yes else []), input="n\n")
    named, _, rest = result.stdout.partition("contains these models too:\n")
    assert "deleted" not in named
    assert rest.startswith("  first\n  second/model\n")
    assert (tmp_path / "all").exists() != yes


def test_a_run_that_failed_before_its_first_checkpoint_is_removed(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "wrong"
    for name in (
        *("lease/00000001.json", "attempts/00000001.json"),
        "data/train/unfinished/plan.json",
    ):
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text("{}")
    assert "no models are at or below" in run("models", "ls", str(run_folder)).stdout
    with pytest.raises(ValueError, match="neither a model folder"):
        run("models", "rm", str(tmp_path / "runs"), "--yes", catch_exceptions=False)
    (run_folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="neither a model folder"):
        run("models", "rm", str(run_folder), "--yes", catch_exceptions=False)
    (run_folder / "thesis.tex").unlink()
    assert "deleted" in run("models", "rm", str(run_folder), "--yes").stdout
    assert not run_folder.exists()


def test_removing_leaves_what_is_linked(tmp_path: Path) -> None:
    model, run_folder = tmp_path / "model", tmp_path / "run"
    for folder in (model, run_folder / "model"):
        folder.mkdir(parents=True)
        for name in ("config.json", "manifest.json"):
            (folder / name).write_text("{}")
    (run_folder / "history.jsonl").touch()
    (run_folder / "base").symlink_to(model)
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(ValueError, match=f"is a link to {model}: not deleted"):
        run("models", "rm", str(tmp_path / "link"), "--yes", catch_exceptions=False)
    assert "deleted" in run("models", "rm", str(run_folder), "--yes").stdout
    assert not run_folder.exists()
    assert {path.name for path in model.iterdir()} == {"config.json", "manifest.json"}


def test_an_adapter_is_shown_with_its_base(addresses: dict[str, str], tmp_path: Path) -> None:
    base = addresses["classification"]
    peft = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "fc_in"]}
    peft["base_model_name_or_path"] = base
    shutil.copy(Path(base) / "config.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft))
    lines = run("models", "show", str(tmp_path)).stdout.splitlines()
    assert ["base", base] in [line.split() for line in lines]
    assert ["target_modules", "q_proj,", "fc_in"] in [line.split() for line in lines]
    assert ["labels", "negative,", "neutral,", "positive"] in [line.split() for line in lines]
    assert json.loads(run("models", "show", str(tmp_path), "--json").stdout)["rank"] == 4
    assert "adapter" not in run("models", "show", base).stdout


@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt", "sub/a.txt"])
def test_copying_replaces_no_file_of_the_users(
    addresses: dict[str, str], s3: LocalS3, tmp_path: Path, where: str, name: str
) -> None:
    source = addresses["classification"]
    destination = str(tmp_path / "mine") if where == "local" else f"s3://gptj/mine/{name}"
    storage.write_bytes(storage.join(destination, name), b"mine")
    with pytest.raises(storage.AlreadyExistsError, match=f"{name} exists and .*; remedy: a dest"):
        run("models", "cp", source, destination, catch_exceptions=False)
    assert [file.name for file in storage.list_files(destination)] == [name]
    assert storage.read_bytes(storage.join(destination, name)) == b"mine"


def test_an_interrupted_copy_is_resumed(addresses: dict[str, str], tmp_path: Path) -> None:
    source, copy = Path(addresses["classification"]), tmp_path / "copy"
    copy.mkdir()
    shutil.copy(source / "model.safetensors", copy)
    assert "good: " in run("models", "cp", str(source), str(copy)).stdout


def test_a_copy_and_its_source_are_apart(
    addresses: dict[str, str], s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(addresses["classification"], tmp_path / "runs" / "lm")
    (tmp_path / "link").symlink_to("runs/lm")
    pairs = [("runs/lm", "runs/lm/copy"), ("link", "runs/lm/a/b"), ("runs/lm", "runs")]
    for source, destination in [*pairs, ("s3://gptj/a/lm", "s3://gptj/a/lm/copy")]:
        with pytest.raises(ValueError, match=r" is inside .*a copy needs a folder of its own"):
            run("models", "cp", source, destination, catch_exceptions=False)
    assert run("models", "cp", "runs/lm", "runs/lm2").exit_code == 0
    assert run("verify", "runs/lm").exit_code == 0


def test_a_damaged_folder_is_neither_copied_nor_verified(
    addresses: dict[str, str], tmp_path: Path
) -> None:
    source, copy = tmp_path / "model", tmp_path / "copy"
    assert run("models", "cp", addresses["classification"], str(source)).exit_code == 0
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for words in (["verify", str(source)], ["models", "cp", str(source), str(copy)]):
        with pytest.raises(CheckpointError, match=r"model.safetensors was altered"):
            run(*words, catch_exceptions=False)
    assert not (copy / "manifest.json").exists()


def test_a_second_up_prints_no_secrets(tmp_path: Path) -> None:
    here = Process.of(os.getpid())
    Local(here, {}, "http://s3", "http://ray", {"RAY_AUTH_TOKEN": "hidden"}).write(tmp_path)
    shown = run("up", "--folder", str(tmp_path)).stdout
    assert "Already running." in shown and f"source {tmp_path / 'env'}" in shown
    assert "hidden" not in shown


def test_down_stops_what_up_started_and_nothing_else(tmp_path: Path) -> None:
    """Even if the supervisor was killed, or its process id was reused."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    part, stranger = subprocess.Popen(sleeper), subprocess.Popen(sleeper)
    try:
        other = Process.of(stranger.pid)
        # Of that number, long ago.
        gone = Process(
            other.number, other.created - 1000, re.sub(r"\d+$", "7", other.identity or "")
        )
        sessions = tmp_path / "gptj-ray-x"
        sessions.mkdir()
        (sessions / "log").touch()
        parts = {"Ray": Process.of(part.pid)}
        state = Local(gone, parts, "http://s3", "http://ray", {"A": "b c"}, str(sessions))
        state.write(tmp_path)
        assert (tmp_path / "env").read_text().endswith("\nexport A='b c'\n")
        assert (tmp_path / "env").stat().st_mode & 0o077 == 0
        assert not is_up(tmp_path)
        assert down(tmp_path)
        assert part.poll() is not None
        assert stranger.poll() is None
        assert not sessions.exists()
        assert not down(tmp_path)
    finally:
        for process in (part, stranger):
            process.kill()
            process.wait()


def moved_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set after a state file was written: start times, as psutil has them, move."""
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_clock_that_is_set_hides_nothing_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    supervisor, part = subprocess.Popen(sleeper), subprocess.Popen(sleeper)
    try:
        parts = {"Ray": Process.of(part.pid)}
        Local(Process.of(supervisor.pid), parts, "http://s3", "http://ray", {}).write(tmp_path)
        moved_clock(monkeypatch)
        assert is_up(tmp_path)
        assert down(tmp_path)
        assert supervisor.poll() is not None and part.poll() is not None
    finally:
        for process in (supervisor, part):
            process.kill()
            process.wait()


def test_state_files_of_earlier_versions_are_understood(tmp_path: Path) -> None:
    number = os.getpid()
    old = {"number": number, "created": psutil.Process(number).create_time()}
    state = {"supervisor": old, "parts": {}, "s3": "http://s3", "dashboard": "http://ray"}
    (tmp_path / "up.json").write_text(json.dumps(state))
    assert is_up(tmp_path)
    state["supervisor"] = old | {"created": old["created"] - 1000}
    (tmp_path / "up.json").write_text(json.dumps(state))
    assert not is_up(tmp_path)


@pytest.mark.parametrize("described", [True, False])
def test_down_forgets_nothing_while_a_supervisor_runs(tmp_path: Path, described: bool) -> None:
    """One that cannot be told from another program, as by an earlier version's state file."""
    if described:
        other = Process(os.getpid(), 1.0)
        Local(other, {}, "http://s3", "http://ray", {"A": "b"}).write(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with FileLock(tmp_path / "lock") as lock:
        assert lock.try_take()
        with pytest.raises(SystemExit, match=r"holds .*lock, but .*up.json does not describe it"):
            main(["down", "--folder", str(tmp_path)])
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "lock"])
    assert run("down", "--folder", str(tmp_path)).exit_code == 0
    assert not (tmp_path / "up.json").exists()
