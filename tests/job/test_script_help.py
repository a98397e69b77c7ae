"""``--help`` of the fine-tuning script."""

import re
import subprocess
import sys
from pathlib import Path

from nemo_tiedlora.job.script_help import help_text, read

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "conf" / "megatron_gpt_finetuning_config.yaml"


def test_a_setting_has_the_default_and_the_comments_of_its_lines():
    text = (
        'a:\n  # one,\n  # two\n  b: [x, "#y"] # three\n  c: "# no comment"\nd: 1\n# of e\ne: # and more\n  f: {g: 1}\n'
    )
    settings = {name: tuple(setting) for name, setting in read(text).items()}
    assert settings == {
        "a": ("", ""),
        "a.b": ('[x, "#y"]', "one, two three"),
        "a.c": ('"# no comment"', ""),
        "d": ("1", ""),
        "e": ("", "of e and more"),
        "e.f": ("{g: 1}", ""),
    }


def test_help_of_the_script_lists_its_settings_and_imports_neither_torch_nor_nemo():
    script = ROOT / "examples" / "megatron_gpt_finetuning.py"
    code = (
        f"import sys, runpy; sys.argv = [{str(script)!r}, '--help']; runpy.run_path(sys.argv[0], run_name='__main__');"
        "sys.exit('torch' in sys.modules or 'nemo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Fine-tune a NeMo GPT") and f"All settings: {CONFIG}" in done.stdout


def test_help_says_what_the_config_says(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text("Tune.", "python tune.py", CONFIG)
    assert max(map(len, text.splitlines()[:-3])) <= 100
    words = re.sub(r"\s+", " ", text)
    assert "Usage: python tune.py [SETTING=VALUE ...]" in words
    assert "model.peft.tied_lora_tuning: one pair of factors shared by all layers" in words
    assert "preset=TL6 TL1 to TL6, VeRA or LoRA: what is trained" in words
    assert "max_steps=2000 (built-in task: 300)" in words
    conditional = words[words.index("model.peft.cond_lora_tuning") : words.index("model.peft.dyna_lora_tuning")]
    assert "init_A=kaiming_uniform" in conditional  # another default than above
    assert "and, as above, target_modules, rank," in conditional and "rank=8" not in conditional
