"""What docs/data.md shows runs."""

import re
from pathlib import Path

from PIL import Image

TEXT = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()


def test_the_examples_of_own_data_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, classes in (("train", ("cat", "dog")), ("val", ("dog",))):
        for name in classes:
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (40, 30)).save(tmp_path / f"photos/{split}/{name}/{i}.png")
    rows = [f"2021-{d // 28 + 1:02d}-{d % 28 + 1:02d} {h:02d}:00,{h}"
            for d in range(28) for h in range(24)]  # fmt: skip
    (tmp_path / "load.csv").write_text("\n".join(["time,load", *rows]))
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["task"].class_weights == (1.0, 1.0)
    assert names["data"].train[0]["target"].shape == (24, 1)
    for word in ("ImageFolder", "Arrays", "Tfds", "Table"):
        assert word in TEXT
