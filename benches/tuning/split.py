"""Splits the names of calibration/emoji-captions.txt into prompts to tune with and prompts of other names to judge by.

    python benches/tuning/split.py OUT

Writes OUT/learn.txt (600 prompts) and OUT/judge.txt (64 names that neither learn.txt nor the calibration's emoji-varied.txt has).
Run it at the top of the project. The split is the same on every machine.
"""

import hashlib
import pathlib
import re
import sys


def lines(path):
    return [line.strip() for line in open(path, encoding="utf-8") if line.strip() and not line.startswith("#")]


def name(prompt):
    return re.sub(r"^(an emoji of|a picture of) (an? )?", "", prompt).rstrip("!").strip().lower()


def order(text):
    return hashlib.sha256(text.encode()).hexdigest()


captions = lines("calibration/emoji-captions.txt")
calibrated = {name(line) for line in lines("calibration/emoji-varied.txt")}
names = sorted({name(line) for line in captions} - calibrated, key=order)
judged = set(names[:64])
of_judged = {}
for line in sorted(captions, key=order):
    if name(line) in judged:
        of_judged.setdefault(name(line), line)
learned = sorted((line for line in captions if name(line) not in judged), key=order)[:600]

out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
(out / "judge.txt").write_text("".join(of_judged[each] + "\n" for each in names[:64]), encoding="utf-8")
(out / "learn.txt").write_text("".join(line + "\n" for line in learned), encoding="utf-8")
