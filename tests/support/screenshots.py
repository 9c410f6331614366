"""The README's pictures of the playground: python tests/support/screenshots.py [FOLDER]

Tiny models that learn a text by heart in some seconds, the real services in this process, and
Chromium; a picture of each tab, in light and dark.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
import torch
from browser import chromium
from playwright.sync_api import Page, expect, sync_playwright
from serving_models import TEMPLATE, Models, make_models, served_in_process
from torch import Tensor, nn

from gptj import GPTJTokenizer
from gptj.data.windows import windows

FOLDER = Path(__file__).resolve().parents[2] / ".github" / "pictures"
VIEW = {"width": 860, "height": 600}  # and as high as a page is
STORY = """In a shocking finding, scientists have discovered a herd of unicorns that lives in a \
remote valley of the Andes. Even more surprising was that the unicorns spoke perfect English, and \
that they had kept a diary since the year 1632. The valley had natural fountains, and silver snow \
on its peaks. In a shocking finding, scientists have shown that the river runs uphill in spring."""
CHAT = {
    "What have the scientists found?": "A herd of unicorns, in a remote valley of the Andes.",
    "Do the unicorns speak?": "Yes, perfect English. They have kept a diary since 1632.",
}
FILMS = {
    "A fine film, from its first minute to its last.": 2,
    "A warm and clever film that nobody should miss.": 2,
    "It is neither good nor bad: two hours go by.": 1,
    "A film of two halves, with a good one in it.": 1,
    "A dull film, and a long one.": 0,
    "Nothing in it works, and the end is a bore.": 0,
}
CONTEXT = "Anna wrote the book in the year 1907, in a house by the river that runs through Paris."
QUESTIONS = {
    "Who wrote the book?": "Anna",
    "When was it written?": "1907",
    "Which river is it?": "the river that runs through Paris",
}


def learn(parameters: list[nn.Parameter], loss: Callable[[], Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def learned() -> Models:
    torch.set_num_threads(1)  # for tiny models more only wait for each other
    models = make_models(texts=[STORY, _chat(), *FILMS, CONTEXT, *QUESTIONS] * 3, vocab_size=700)
    tokenizer = models.tokenizer
    written = [torch.tensor([tokenizer.encode(text)]) for text in (STORY, _chat())]
    language = models.generation
    learn(
        [each for name, each in language.named_parameters() if name != "lm_head.bias"],
        lambda: sum(language(ids, labels=ids).loss for ids in written),  # type: ignore[arg-type, return-value]
        steps=60,
    )
    films = [torch.tensor([tokenizer.encode(text)]) for text in FILMS]
    judge = models.classification
    learn(
        list(judge.parameters()),
        lambda: sum(  # type: ignore[arg-type, return-value]
            judge(ids, labels=torch.tensor([label])).loss
            for ids, label in zip(films, FILMS.values(), strict=True)
        ),
        steps=5,
    )
    spans = [_span(tokenizer, question, answer) for question, answer in QUESTIONS.items()]
    reader = models.question_answering
    learn(
        list(reader.parameters()),
        lambda: sum(  # type: ignore[arg-type, return-value]
            reader(ids, start_positions=start, end_positions=end).loss for ids, start, end in spans
        ),
        steps=16,
    )
    return models


def _chat() -> str:
    """The whole chat as the model sees it."""
    turns = [("user", "assistant"), *CHAT.items()]
    messages = [
        {"role": role, "content": content}
        for turn in turns[1:]
        for role, content in zip(turns[0], turn, strict=True)
    ]
    return jinja2.Template(TEMPLATE).render(messages=messages, add_generation_prompt=False) + ">"


def _span(tokenizer: GPTJTokenizer, question: str, answer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Question and context as the service joins them, and the answer's first and last token."""
    (window,) = windows(tokenizer, question, CONTEXT, 64, 0)
    begin = CONTEXT.index(answer)
    places = [
        place
        for place, offsets in enumerate(window.offsets)
        if offsets and offsets[0] < begin + len(answer) and offsets[1] > begin
    ]
    return torch.tensor([window.input_ids]), torch.tensor(places[:1]), torch.tensor(places[-1:])


def take(page: Page, folder: Path, scheme: str) -> None:
    def picture(tab: str) -> None:
        page.locator(f"#{tab}-panel [data-part=submit]").evaluate("button => button.blur()")
        page.screenshot(path=folder / f"{tab}-{scheme}.png", full_page=True)

    page.fill("#max_tokens", "48")
    page.fill("#temperature", "0.7")
    page.fill("#top_p", "0.9")
    page.fill("#seed", "3")
    page.click("#generate-panel [data-part=submit]")
    expect(page.locator("#generate-panel [data-part=status]")).to_contain_text("Done")
    likely = [
        float(each.evaluate("token => token.style.getPropertyValue('--likely')"))
        for each in page.locator(".token").all()[:20]
    ]
    page.locator(".token").nth(likely.index(min(likely))).hover()
    picture("generate")
    page.click("#chat")
    page.fill("#chat-temperature", "0")
    for number, message in enumerate(CHAT, 1):
        page.fill("#message", message)
        page.click("#chat-panel [data-part=submit]")
        expect(page.locator("#chat-panel .said").nth(2 * number - 1)).not_to_be_empty()
        expect(page.locator("#chat-panel [data-part=status]")).to_contain_text("Done")
    picture("chat")
    for tab, shown in (("classify", ".bars li"), ("ask", "mark")):
        page.click(f"#{tab}")
        page.click(f"#{tab}-panel [data-part=submit]")
        expect(page.locator(shown).first).to_be_visible()
        picture(tab)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with served_in_process(learned()) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), chromium_sandbox=False)
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=VIEW, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(address)
            take(page, folder, scheme)
        browser.close()


if __name__ == "__main__":
    main()
