"""README.md and README.zh-CN.md say the same: what a machine can compare of them is equal.

Both are cut into blocks (headings, paragraphs, list items, table rows, code). The two must have the
same kinds of blocks in the same order, and a block and its translation the same figures in the same
order, the same links and the same code. Code blocks are equal to the letter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
OTHER_README = {"README.md": "README.zh-CN.md", "README.zh-CN.md": "README.md"}

CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A word with a digit: 22,146 or 86% or -100 or 16-128 or H100 or Qwen3-0.6B or a commit.
FIGURE = re.compile(r"(?<![A-Za-z0-9])-?[A-Za-z0-9]+(?:[.,-][A-Za-z0-9]+)*%?")
HAN = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Block:
    """A piece of a README that is translated as a whole."""

    kind: str
    text: str


def split_blocks(markdown: str) -> list[Block]:
    """Cut a README into blocks. The lines of a paragraph are joined: each language has its own."""
    blocks: list[Block] = []
    paragraph: list[str] = []
    code: list[str] | None = None  # the lines of the code block that is open

    def end_paragraph() -> None:
        if paragraph:
            item = re.match(r"- |\d+\. ", paragraph[0])
            kind = f"item {item.group().strip()}" if item else "paragraph"
            text = " ".join(paragraph)
            blocks.append(Block(kind, text[item.end() :] if item else text))
            paragraph.clear()

    for line in markdown.splitlines():
        if code is not None:
            code.append(line)
            if line == "```":
                blocks.append(Block("code", "\n".join(code)))
                code = None
        elif line.startswith("```"):
            end_paragraph()
            code = [line]
        elif heading := re.match(r"(#+) ", line):
            end_paragraph()
            blocks.append(Block(f"heading {len(heading[1])}", line[heading.end() :]))
        elif line.startswith("|"):
            end_paragraph()
            num_cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            blocks.append(Block(f"row of {num_cells} cells", line))
        elif not line.strip():
            end_paragraph()
        else:
            if re.match(r"- |\d+\. ", line):
                end_paragraph()
            paragraph.append(line.strip())
    end_paragraph()
    assert code is None, "a code block does not end"
    return blocks


def anchors(blocks: list[Block]) -> list[str]:
    """What a link to each heading is, in order, as GitHub makes it."""
    headings = [block.text for block in blocks if block.kind.startswith("heading")]
    return ["#" + re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]


def comparable(block: Block, own_anchors: list[str]) -> dict[str, list[str]]:
    """Everything about a block that its translation must have as well."""
    if block.kind == "code":
        return {"kind": ["code"], "code": [block.text]}
    targets = []
    for target in LINK.findall(block.text):
        if target in OTHER_README:
            target = "the other README"
        elif target.startswith("#"):
            assert target in own_anchors, f"there is no heading {target}"
            target = f"heading {own_anchors.index(target)} of this file"
        targets.append(target)
    prose = CODE_SPAN.sub(" ", LINK.sub("]", block.text))
    words = [word for word in FIGURE.findall(prose) if re.search(r"\d", word)]
    return {
        "kind": [block.kind],
        "figures": [re.sub(r"(?<=\d)s$", "", word) for word in words],  # H200s are H200 in Chinese
        "links": sorted(targets),  # the order of words is each language's own
        "code": sorted(set(CODE_SPAN.findall(block.text))),
    }


def differences(english: str, chinese: str) -> list[str]:
    """What one README says and the other does not; each with the heading above it."""
    english_blocks = split_blocks(english)
    chinese_blocks = split_blocks(chinese)
    english_anchors = anchors(english_blocks)
    chinese_anchors = anchors(chinese_blocks)
    section = ""
    found = []
    nothing = Block("nothing", "")
    for ours, theirs in zip_longest(english_blocks, chinese_blocks, fillvalue=nothing):
        if ours.kind.startswith("heading"):
            section = ours.text
        our_facts = comparable(ours, english_anchors)
        their_facts = comparable(theirs, chinese_anchors)
        if our_facts["kind"] != their_facts["kind"]:
            # All that follows is compared with something else, so it would say nothing.
            return [*found, f"in {section!r}: {ours} is beside {theirs}"]
        for name, values in our_facts.items():
            if values != their_facts[name]:
                found.append(f"in {section!r}, {name}: {values} is {their_facts[name]} in Chinese")
    return found


def test_the_readmes_say_the_same() -> None:
    assert differences(ENGLISH, CHINESE) == []


# What somebody might change in one of them alone.
CHANGES: dict[str, Callable[[str], str]] = {
    "two figures of a row in the other order": lambda text: re.sub(
        r"\((\d+)%\) \| ([\d,]+) \((\d+)%\)", r"(\3%) | \2 (\1%)", text, count=1
    ),
    "a row removed": lambda text: re.sub(r"\n\| `text` .*", "", text, count=1),
    "a row added": lambda text: re.sub(r"(\n\| `text` .*)", r"\1\1", text, count=1),
    "a cell removed": lambda text: re.sub(r"\n\| `token_ids` \|", "\n|", text, count=1),
    "a section removed": lambda text: re.sub(r"\n## .*?(?=\n## )", "", text, count=1, flags=re.S),
    "a heading of another level": lambda text: text.replace("\n## ", "\n### ", 1),
    "a paragraph added": lambda text: text + "\nOne more.\n",
    "an item removed": lambda text: re.sub(r"\n- [^\n]*(\n  [^\n]*)*", "", text, count=1),
    "an item with another number": lambda text: text.replace("\n2. ", "\n3. ", 1),
    "another picture": lambda text: text.replace("(docs/flow.svg)", "(docs/architecture.svg)"),
    "a link removed": lambda text: re.sub(r"\[([^]]*)\]\(https:[^)]*\)", r"\1", text, count=1),
    "a link to another heading": lambda text: re.sub(
        r"\]\(#[^)]*\)", f"]({anchors(split_blocks(text))[1]})", text, count=1
    ),
    "a line of code removed": lambda text: text.replace('    print(outputs[0]["text"])\n', ""),
    "a comment in code": lambda text: text.replace("  # the best beam", "  # a beam"),
    "another name in a sentence": lambda text: text.replace("`wake_up()`", "`wake()`"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_one_alone_is_found(name: str) -> None:
    change = CHANGES[name]
    assert change(ENGLISH) != ENGLISH and change(CHINESE) != CHINESE, "nothing was changed"
    assert differences(change(ENGLISH), CHINESE)
    assert differences(ENGLISH, change(CHINESE))


@pytest.mark.parametrize("changed", ["English", "Chinese"])
def test_no_figure_changes_alone(changed: str) -> None:
    """Of each line that has digits the first is changed, and then the last."""
    lines = (ENGLISH if changed == "English" else CHINESE).splitlines()
    other = CHINESE if changed == "English" else ENGLISH
    unnoticed = []
    for number, line in enumerate(lines):
        digits = list(re.finditer(r"\d", line))
        for digit in digits[:1] + digits[1:][-1:]:
            another = str((int(digit.group()) + 1) % 10)
            new_line = line[: digit.start()] + another + line[digit.end() :]
            text = "\n".join([*lines[:number], new_line, *lines[number + 1 :]])
            pair = (text, other) if changed == "English" else (other, text)
            if not differences(*pair):
                unnoticed.append(new_line)
    assert unnoticed == []


def test_each_is_in_its_language() -> None:
    """A paragraph that was pasted and never translated has all the right figures."""
    pairs = zip(split_blocks(ENGLISH), split_blocks(CHINESE), strict=True)
    for number, (ours, theirs) in enumerate(pairs):
        if ours.kind == "code":
            continue
        prose = CODE_SPAN.sub(" ", LINK.sub("]", ours.text))
        translated = CODE_SPAN.sub(" ", LINK.sub("]", theirs.text))
        if number > 1:  # after the line that leads to the Chinese one
            assert not HAN.search(prose), ours
            if len(re.findall(r"\b[a-z]{2,}\b", prose)) >= 3:
                assert HAN.search(translated), theirs
        assert not re.search(r"(?:\b[a-z]+ ){5}", translated), theirs


def test_each_leads_to_the_other() -> None:
    assert OTHER_README["README.md"] in LINK.findall(split_blocks(ENGLISH)[1].text)
    assert OTHER_README["README.zh-CN.md"] in LINK.findall(split_blocks(CHINESE)[1].text)


@pytest.mark.parametrize("path", ["README.md", "README.zh-CN.md", "docs/OPTIONS.md"])
def test_links_lead_somewhere(path: str) -> None:
    """Files, and headings in them, are there. (Nothing is fetched: other sites are not asked.)"""
    page = ROOT / path
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            assert f"#{heading}" in anchors(split_blocks(file.read_text("utf-8"))), target


def test_the_code_is_as_long_as_stated() -> None:
    """Lines of the core, the kernels and the rest, to a tenth."""
    package = ROOT / "nanovllm"
    core = [package / f"{name}.py" for name in ("llm", "config", "sampling_params", "outputs")]
    core += [package / "models/qwen3.py"]
    for folder in ("engine", "layers", "utils"):
        core += (package / folder).glob("*.py")
    kernels = list((package / "kernels").glob("*.py"))
    rest = set(package.rglob("*.py")) - set(core) - set(kernels)
    stated = re.findall(r"some (\d+,\d+)", ENGLISH)[:3]
    for files, number in zip((core, kernels, rest), stated, strict=True):
        lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
        assert lines == pytest.approx(int(number.replace(",", "")), rel=0.1)
