"""Parse a YAML document, with one kind of error for all problems."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def parse_yaml(content: bytes | str) -> Any:
    """The value of a document.

    Raises:
        yaml.YAMLError: if it is not valid YAML, repeats a key, or has numbers too long or nesting
            too deep for Python.
    """
    try:
        return yaml.load(content, _UniqueKeysLoader)  # a safe loader
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


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
