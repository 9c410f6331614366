"""Hugging Face's Jinja chat templates, which turn messages into a model's prompt."""

from gptj.chat.errors import ChatTemplateError, SlowTemplateError
from gptj.chat.sources import READY, read_template
from gptj.chat.template import ChatTemplate, Message
from gptj.chat.turns import EncodedChat, encode_chat, template_of

__all__ = [
    "READY",
    "ChatTemplate",
    "ChatTemplateError",
    "EncodedChat",
    "Message",
    "SlowTemplateError",
    "encode_chat",
    "read_template",
    "template_of",
]
