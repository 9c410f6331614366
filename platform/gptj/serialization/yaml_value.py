"""A YAML document in, its value out, or one kind of error whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


def parse_yaml(content: bytes | str) -> Any:
    """The value of a document.

    Raises:
        yaml.YAMLError: if it is none, has a key twice, or numbers of thousands of digits or a depth
            that Python cannot hold.
    """
    try:
        return yaml.load(content, _UniqueKeysLoader)  # a safe loader
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)
