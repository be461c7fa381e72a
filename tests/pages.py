"""The pages that people read, as tests see them: code blocks and links.

A page's Python blocks are run in order in one namespace, which starts with the names of
:func:`prelude`. A comment on the line above a block says what is special about it:

    <!-- needs lightning, timm -->   skipped where these modules are missing
    <!-- needs a GPU -->             run by the tests marked `gpu`; elsewhere only compiled
    <!-- raises ValueError -->       the block must end in this error

A block of the language ``output`` is what the Python block before it prints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent


@contextlib.contextmanager
def example_module(name: str) -> Iterator[Any]:
    """A file of examples/ as a module, which can be imported for as long as the block lasts."""
    path = REPOSITORY / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


DOCS = REPOSITORY / "docs"

GPU = "a GPU"
_FENCE = re.compile(r"(`{3,}|~{3,})\s*(\S*)")
_COMMENT = re.compile(r"<!-- (needs|raises) (.*) -->")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page's file.
        line: Number of the line after the fence.
        language: What stands behind the fence.
        needs: Modules, or ``GPU``.
        raises: Name of the error in which it ends, or empty.
        text: The lines between the fences.
    """

    page: Path
    line: int
    language: str
    needs: tuple[str, ...]
    raises: str
    text: str

    def code(self) -> Any:
        """The block compiled, with the page's name and line numbers."""
        return compile("\n" * (self.line - 1) + self.text, str(self.page), "exec")


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a Markdown page, in order."""
    lines = page.read_text().splitlines()
    i = 0
    while i < len(lines):
        fence = _FENCE.match(lines[i])
        if fence is None:
            assert not lines[i].lstrip().startswith("```"), f"{page}:{i + 1}: an indented fence"
            i += 1
            continue
        end = next(k for k in range(i + 1, len(lines)) if lines[k].startswith(fence[1]))
        comment = _COMMENT.fullmatch(lines[i - 1]) if i > 0 else None
        said = {comment[1]: comment[2]} if comment else {}
        needs = tuple(said["needs"].split(", ")) if "needs" in said else ()
        text = "\n".join(lines[i + 1 : end]) + "\n"
        yield Block(page, i + 2, fence[2], needs, said.get("raises", ""), text)
        i = end + 1


def text_of(page: Path) -> str:
    """A Markdown page without its fenced blocks and its code within lines."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1\s*$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"`[^`]*`", "", text)


def links(page: Path) -> list[str]:
    """Where a Markdown page's links and pictures lead."""
    return _LINK.findall(text_of(page))


def prelude() -> dict[str, Any]:
    """The names that the pages use without making them: a model, its data, the pair."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    inputs, targets = torch.randn(32, 4), torch.randint(2, (32,))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=8
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {
        "__name__": "page",
        "model": model,
        "loader": loader,
        "batches": list(loader),
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "sgd": sgd,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, T_0=10),
    }


def run(page: Path, names: dict[str, Any], *, with_gpu: bool = False) -> None:
    """Runs the Python blocks of a page, and compares what they print where the page says it.

    Args:
        page: A Markdown page.
        names: The namespace; start with :func:`prelude`.
        with_gpu: Run the blocks that need a GPU as well.
    """
    printed = ""
    for block in blocks(page):
        if block.language == "output":
            assert printed.strip() == block.text.strip(), f"{page}:{block.line}"
        if block.language != "python":
            continue
        code = block.code()
        if GPU in block.needs and not with_gpu:
            continue
        for module in block.needs:
            if module != GPU:
                pytest.importorskip(module)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(code, names)
            except Exception as error:
                if type(error).__name__ != block.raises:
                    raise
                print(error)
            else:
                assert not block.raises, f"{page}:{block.line}: no {block.raises}"
        printed = out.getvalue()
