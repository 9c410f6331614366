"""Parse a YAML document, with one kind of error for all problems."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeAlias

import yaml

# The keys of a mapping whose values are text: True, or those keys of theirs.
TextKeys: TypeAlias = "Mapping[str, Texts]"
Texts: TypeAlias = "Literal[True] | TextKeys"

_TAG = "tag:yaml.org,2002:"
_STRING, _NULL, _MERGE = f"{_TAG}str", f"{_TAG}null", f"{_TAG}merge"
_OTHERS = {f"{_TAG}{name}" for name in ("bool", "int", "float", "timestamp", "value", "merge")}


def parse_yaml(content: bytes | str, texts: Texts | None = None) -> Any:
    """The value of a document.

    Args:
        texts: where the document has text rather than numbers, truth values or dates: scalars there
            stay as they are written, such as 007, 1e5 or no, also in lists and mappings. True: all
            of it is text. A null stays one, except for the word in a list or a mapping.

    Raises:
        yaml.YAMLError: if it is not valid YAML, repeats a key, or has numbers too long or nesting
            too deep for Python.
    """
    loader = _UniqueKeysLoader(content)  # a safe loader
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        return loader.construct_document(node if texts is None else _with_texts(node, texts))
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses duplicate keys, where PyYAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is repeated", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _with_texts(node: yaml.Node, texts: Texts) -> yaml.Node:
    """The node with strings in the places of `texts`.

    A copy: elsewhere an alias of a node may be a number.
    """
    if texts is True:
        return node if node.tag == _NULL else _as_text(node, {})
    if isinstance(node, yaml.SequenceNode):  # what << merges, otherwise an error
        return _like(node, [_with_texts(each, texts) for each in node.value])
    if not isinstance(node, yaml.MappingNode):
        return node
    pairs = []
    for key, value in node.value:
        if key.tag == _MERGE:
            pairs.append((key, _with_texts(value, texts)))
            continue
        inner = texts.get(key.value) if isinstance(key, yaml.ScalarNode) else None
        pairs.append((_as_text(key, {}), value if inner is None else _with_texts(value, inner)))
    return _like(node, pairs)


def _as_text(node: yaml.Node, done: dict[yaml.Node, yaml.Node]) -> yaml.Node:
    """A copy whose numbers, truth values, dates and words for null are strings.

    Args:
        done: nodes' copies: aliases share a node, and may be in it.
    """
    if node in done:
        return done[node]
    if isinstance(node, yaml.ScalarNode):
        is_word = node.tag == _NULL and node.value.isalpha()
        done[node] = node
        if node.tag in _OTHERS or is_word:
            done[node] = yaml.ScalarNode(
                _STRING, node.value, node.start_mark, node.end_mark, node.style
            )
        return done[node]
    assert isinstance(node, yaml.CollectionNode)
    copy = done[node] = _like(node, [])
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key if key.tag == _MERGE else _as_text(key, done)
            copy.value.append((name, _as_text(value, done)))
    else:
        copy.value.extend(_as_text(each, done) for each in node.value)
    return copy


def _like(node: yaml.CollectionNode, value: list[Any]) -> yaml.Node:
    """A sequence or a mapping with another value."""
    return type(node)(node.tag, value, node.start_mark, node.end_mark, node.flow_style)
