"""A hook of mkdocs: a link that leaves docs/ becomes plain text, since the site holds no source files.

``tests/docs/test_pages.py`` checks that the files behind such links exist.
"""

import re
from pathlib import PurePosixPath
from typing import Any

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>(?!\w+:)[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text without links to files outside docs/."""
    folder = PurePosixPath(page.file.src_uri).parent
    return LINK.sub(lambda link: link["text"] if leaves(folder, link["target"]) else link[0], markdown)


def leaves(folder: PurePosixPath, target: str) -> bool:
    """Whether a relative link from a folder within docs/ points outside docs/."""
    depth = len(folder.parts)
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False
