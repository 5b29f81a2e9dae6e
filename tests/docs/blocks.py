"""Code blocks, links and quoted messages of the project's Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), PROJECT / "data" / "README.md"]
    if path.is_file()
)

_BLOCK = re.compile(r"^(?P<fence>```+)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)\s*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: first word behind the fence.
        mark: the second: `gpu`, `hub`, `other`, or nothing.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(PROJECT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Shell commands: without comments, continued lines joined."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        found = (re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ") for line in lines)
        return [command for command in found if command]


def blocks(*languages: str) -> Iterator[Block]:
    """All blocks in these languages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            words = match["info"].split()
            if words and words[0] in languages:
                line = text.count("\n", 0, match.start()) + 1
                yield Block(page, line, words[0], " ".join(words[1:]), match["text"])


def shown_under(heading: str) -> list[str]:
    """The Python blocks below a heading of CONTRIBUTING.md."""
    page = PROJECT / "CONTRIBUTING.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(f"## {heading}\n")
    first = before.count("\n")
    last = first + rest.partition("\n## ")[0].count("\n")
    return [block.text for block in blocks("python") if block.page == page and first < block.line <= last + 1]


def links(page: Path) -> list[str]:
    """Targets of links and pictures outside of code."""
    text = re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    return [target or picture for target, picture in _LINK.findall(text)]


def anchors(page: Path) -> set[str]:
    """What headings are called in a link, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
