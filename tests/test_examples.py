"""The examples of a page: what runs, and what is said to be printed."""

import sys
import types
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "docs"))
from examples import Example, examples, outputs, written

PAGE = """
```jsonl rows.jsonl
{"x": 1}
```

```python
from pathlib import Path
x = Path("rows.jsonl").read_text()
print(x.strip())
```
```text
{"x": 1}
```

Prose between, so that the next block is no output.

```text
not an output
```

```python
print(len(x))
```

```text sampled
old
```

```python
y = 1
```
"""


def test_a_page_has_files_and_code_with_its_output() -> None:
    file, first, second, third = examples(PAGE)
    assert file == ("rows.jsonl", '{"x": 1}\n')
    assert isinstance(first, Example)
    assert (first.said, first.sampled) == ('{"x": 1}\n', False)
    assert isinstance(second, Example)
    assert (second.said, second.sampled) == ("old\n", True)
    assert isinstance(third, Example)
    assert third.said is None


def test_examples_share_their_names_and_a_folder_of_their_own() -> None:
    before = Path.cwd()
    assert [out for _, out in outputs(PAGE, "page")] == ['{"x": 1}\n', "9\n", ""]
    assert Path.cwd() == before


def test_a_page_is_written_with_what_its_examples_print() -> None:
    assert written(PAGE, "page") == PAGE.replace("old", "9")


def test_a_command_that_fails_is_an_error() -> None:
    page = "```bash\npip install nothing\ncrossfade generate hello\n```\n"
    with pytest.raises(RuntimeError, match="crossfade generate hello ended with 2"):
        list(outputs(page, "page"))


def test_a_page_has_modules_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another page, or a program, may have modules of the same names."""
    monkeypatch.setitem(sys.modules, "numbers_", types.ModuleType("numbers_"))
    code = (
        "import sys\nsys.path[:0] = ['']\nimport numbers_\ndel sys.path[0]\nprint(numbers_.ONE)\n"
    )
    for value in (1, 2):
        page = f"```py numbers_.py\nONE = {value}\n```\n\n```python\n{code}```\n"
        assert [out for _, out in outputs(page, "page")] == [f"{value}\n"]
        assert "numbers_" not in sys.modules
