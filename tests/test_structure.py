"""What the README says about the code is checked against the code: reading order, commands, packages, house rules."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "docs/README.zh.md").read_text(encoding="utf-8")
ALLOWED = {"torch", "numpy", "PIL", "tqdm", "regex", "safetensors", "open_clip", "huggingface_hub"}


def product_files():
    return sorted(path.relative_to(ROOT) for folder in ("", "nanomind", "data_prep", "data_prep/demo") for path in (ROOT / folder).glob("*.py")
                  if path.stat().st_size)


def reading_order(readme=README, title="## Reading order"):
    """The files of the README's table, in its order."""
    table = readme[readme.index(title):]
    return [name for line in table.splitlines() if line.startswith("| ") for name in re.findall(r"`([\w/]+\.py)`", line.split("|")[1])]


def imports(path):
    """Modules of this project that a file imports, anywhere in it, as paths; and the top-level names of all other packages."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            file = ROOT / (name.replace(".", "/") + ".py")
            package = ROOT / name.replace(".", "/") / "__init__.py"
            if file.is_file() or (package.is_file() and package.stat().st_size):
                ours.add(str((file if file.is_file() else package).relative_to(ROOT)))
            elif not name.startswith(("nanomind", "data_prep")):
                others.add(name.split(".")[0])
    return ours, others


def test_reading_order_is_the_order_of_imports():
    """Each file uses only what stands above it in the README's table, so the table can be read from top to bottom."""
    order = reading_order()
    assert sorted(order) == [str(path) for path in product_files()], "the table and the files differ"
    for place, name in enumerate(order):
        later = imports(name)[0] - set(order[:place + 1])
        assert not later, f"{name} uses {later}, which the README lists below it"


def test_only_the_agreed_packages():
    """A from-scratch project that needs 31 packages is not one."""
    for path in product_files():
        foreign = imports(path)[1] - set(sys.stdlib_module_names) - ALLOWED
        assert not foreign, f"{path} imports {foreign}"


def test_every_file_says_what_it_does_and_where_to_go_on():
    for path in product_files():
        text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
        assert re.search(r"\nNext: \S+", text), f"{path}: the docstring does not name the next file"
        order = reading_order() + ["tests/"]
        assert re.search(r"\nNext: (\S+)", text).group(1) == order[order.index(str(path)) + 1], f"{path}: not the next file of the README's table"
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 350, f"{path} is two files"


def test_the_loop_knows_no_stage():
    """Eight trainers with the same loop had each bug eight times; one loop with stage names in it is the way back there."""
    from nanomind.stages import STAGES
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)} - {ast.get_docstring(tree, clean=False)}
    assert not [text for text in texts for stage in STAGES if re.search(rf"\b{stage}\b", text)]


def bash_blocks(readme):
    return re.findall(r"```bash\n(.*?)```", readme, re.S)


def test_the_translation_has_kept_up():
    """A translation is forgotten first: it shows the same commands in the same order, the same files to read and the other's address."""
    assert bash_blocks(CHINESE) == bash_blocks(README)
    assert reading_order(CHINESE, "## 阅读顺序") == reading_order()
    assert "(docs/README.zh.md)" in README and "(../README.md)" in CHINESE


def commands():
    """Of both READMEs, each once."""
    parts = [part.strip() for block in bash_blocks(README) + bash_blocks(CHINESE) for line in block.splitlines()
             for part in re.split(r"&&|\|", line.split("  #")[0])]
    return [part for part in dict.fromkeys(parts) if part.startswith(("python train.py", "python sample.py", "python bpe.py", "python -m data_prep"))]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_are_understood(command):
    """A README whose commands have been renamed away is the first thing a newcomer meets."""
    words = command.split()[1:]
    script = words[0] if words[0] != "-m" else words[1].replace(".", "/")
    text = subprocess.run([sys.executable, *words[:2 if words[0] == "-m" else 1], *(["train"] if words[:2] == ["bpe.py", "train"] else []), "--help"],
                          cwd=ROOT, capture_output=True, text=True).stdout
    unknown = [word for word in words if word.startswith("--") and not re.search(rf"{re.escape(word)}(?![\w-])", text)]
    assert text and not unknown, f"{script} does not know {unknown}"
