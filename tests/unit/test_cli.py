from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_spherical import cli
from sglang_spherical.errors import EXIT_CODE


def test_a_wrong_value_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "gpt5"]) == EXIT_CODE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: model gpt5: expected smollm2, tiny or the path of a .gguf file\n"
    )


@pytest.mark.parametrize("tool", ["demo", "serve"])
def test_a_missing_model_names_the_flag(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([tool, "--model", "/no/such/model"]) == EXIT_CODE
    assert "--model /no/such/model: expected a model directory" in capsys.readouterr().err


def test_help_lists_every_tool(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {tool} " in shown for tool in cli.TOOLS)


def test_an_unknown_tool_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serv"])
    assert end.value.code == EXIT_CODE
    assert "invalid choice: 'serv'" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_sglang(repo_root: Path) -> None:
    code = (
        "import sys; from sglang_spherical import cli\n"
        "try: cli.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'sglang', 'transformers', 'openai'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True, capture_output=True)
