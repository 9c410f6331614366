"""A run's tokenizer: its checkpoint's, the settings' or a new one trained on its data."""

from __future__ import annotations

from gptj import storage
from gptj.chat import read_template, template_of
from gptj.checkpoints.manifest import FolderWriter, Manifest
from gptj.data.prepared import Prepared
from gptj.data.rows import DataError, Row
from gptj.errors import NoTokenizerError
from gptj.tokenizer import GPTJTokenizer
from gptj.training.dataset import training_rows
from gptj.training.model_config import new_config
from gptj.training.settings import Settings, SettingsError
from gptj.training.state import latest_checkpoint


def prepare_tokenizer(settings: Settings) -> GPTJTokenizer:
    """The run's tokenizer; a new one is trained and saved in the run's folder.

    It is retrained as long as no checkpoint depends on it.

    Raises:
        storage.StorageError, gptj.data.sources.DataError: if the training data cannot be read.
    """
    if settings.model.checkpoint or settings.tokenizer.address:
        return load_tokenizer(settings)
    if _is_prepared(settings):
        if "vocab_size" in settings.tokenizer.model_fields_set:
            raise SettingsError(
                f"tokenizer.vocab_size has no effect on data.train={settings.train_data}, which "
                f"is prepared and has a tokenizer beside it: leave it out"
            )
        return load_tokenizer(settings)
    folder = storage.join(settings.folder, "tokenizer")
    if latest_checkpoint(settings.folder) is None:
        storage.delete_folder(folder)  # left by a run that died before its first checkpoint
    if Manifest.read(folder) is None:
        # Read all of the task's columns, to report missing ones early.
        texts = (text for row in training_rows(settings) for text in _texts(settings, row))
        tokenizer = GPTJTokenizer.train(texts, settings.tokenizer.vocab_size)
        tokenizer.model_max_length = new_config(settings)["n_positions"]
        with FolderWriter(folder) as writer:
            for name, content in tokenizer.files().items():
                writer.write(name, content)
    return load_tokenizer(settings)


def _texts(settings: Settings, row: Row) -> list[str]:
    """A row's texts; none if it is bad and such rows are skipped."""
    try:
        return settings.task_definition.texts(row)
    except DataError:
        if settings.data.bad_rows == "refuse":
            raise
        return []


def load_tokenizer(settings: Settings) -> GPTJTokenizer:
    """Load the tokenizer that `prepare_tokenizer` provided.

    Without a padding token, as in the published one, it pads with eos, so that the exported model
    supports batches.
    """
    tokenizer = _stored_tokenizer(settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.tokenizer.chat_template:
        tokenizer.chat_template = read_template(settings.tokenizer.chat_template)
        template_of(tokenizer)  # ChatTemplateError if it is not valid
    return tokenizer


def _stored_tokenizer(settings: Settings) -> GPTJTokenizer:
    checkpoint, address = settings.model.checkpoint, settings.tokenizer.address
    if checkpoint:
        try:
            own = GPTJTokenizer.from_pretrained(
                checkpoint, revision=settings.model.revision or None
            )
        except NoTokenizerError as error:
            if not address:
                raise SettingsError(f"{error}; remedy: tokenizer.address=") from error
        else:
            if address:
                raise SettingsError(
                    f"tokenizer.address={address} conflicts with model.checkpoint={checkpoint}, "
                    f"which has its own tokenizer: leave it out"
                )
            return own
    if not address and _is_prepared(settings):
        address = settings.train_data  # the tokenizer is stored with the shards
    return GPTJTokenizer.from_pretrained(address or storage.join(settings.folder, "tokenizer"))


def _is_prepared(settings: Settings) -> bool:
    return Prepared.at(settings.train_data) is not None
