"""The playground in headless Chromium, against the real services over real HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from http_server import listening
from playwright.sync_api import Locator, Page, Route, expect
from serving_client import complete
from serving_models import KEY, mounted
from starlette.requests import Request
from starlette.responses import StreamingResponse

from gptj.serving.app import add_health, new_app
from gptj.serving.pages import playground

pytest_plugins = ["serving_fixtures", "browser"]
pytestmark = pytest.mark.slow

Open = Callable[..., Page]
PHONE = {"width": 360, "height": 740}
TABS = ("generate", "chat", "classify", "ask")
expect.set_options(timeout=20_000)


def part(page: Page, tab: str, name: str) -> Locator:
    return page.locator(f"#{tab}-panel [data-part={name}]")


def text(locator: Locator) -> str:
    """As it is, and not as it is shown, without white space."""
    content = locator.evaluate("each => each.textContent")
    assert isinstance(content, str)
    return content


def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        page.fill(f"#{name}", value)


def generate(page: Page, **fields: str) -> str:
    """The completion of a prompt, when it has ended."""
    fill(page, **fields)
    part(page, "generate", "submit").click()
    expect(part(page, "generate", "status")).to_contain_text("Done")
    shown = text(part(page, "generate", "tokens"))
    return shown.removeprefix(fields["prompt"])


def use_every_tab(page: Page) -> None:
    """A result in each of them, with the code shown."""
    for tab in TABS:
        page.click(f"#{tab}")
        part(page, tab, "submit").click()
        expect(part(page, tab, "result")).to_be_visible()
        page.click(f"#{tab}-panel summary")
    page.click("#generate")
    expect(part(page, "generate", "status")).to_contain_text("Done")


def test_the_page_shows_the_services_completion(open_page: Open, service: str) -> None:
    """Including emoji and halves of characters: offsets count characters, not UTF-16 units."""
    page = open_page()
    for prompt in ("東京 is far away. 😀 Anna", "The tower"):
        expected = complete(service, prompt=prompt, max_tokens=40)["choices"][0]["text"]
        sampling = {"prompt": prompt, "temperature": "0", "max_tokens": "40"}
        page.check("#logprobs")
        assert generate(page, **sampling) == expected
        expect(part(page, "generate", "status")).to_contain_text("40 tokens, ")
        page.uncheck("#logprobs")
        assert generate(page, **sampling) == expected
        expect(page.locator(".token")).to_have_count(0)


def test_seed_and_stop_reach_the_service(open_page: Open, service: str) -> None:
    page = open_page()
    fields: dict[str, Any] = {"prompt": "x", "seed": 7, "temperature": 1.5, "top_k": 30}
    whole = complete(service, **fields, max_tokens=30)["choices"][0]["text"]
    given = {name: str(value) for name, value in fields.items()}
    assert generate(page, **given, max_tokens="30") == whole
    stop = next(each for each in whole[3:] if each.isalpha())
    expected = complete(service, **fields, max_tokens=30, stop=stop)["choices"][0]["text"]
    assert generate(page, **given, max_tokens="30", stop=stop) == expected
    expect(part(page, "generate", "status")).to_contain_text("the text has ended")


# Stops a stream from within the page: a click from outside may take longer than a whole stream.
STOPPER = """() => {
  const panel = document.querySelector("#generate-panel");
  const stop = panel.querySelector("[data-part=stop]");
  const status = panel.querySelector("[data-part=status]");
  const observer = new MutationObserver(() => {
    const tokens = document.querySelectorAll(".token").length;
    if (tokens > 5 && !stop.disabled && /Generating.*tokens\\/s/.test(status.textContent)) {
      observer.disconnect();
      stop.click();
    }
  });
  observer.observe(panel, {subtree: true, childList: true, characterData: true, attributes: true});
}"""


def test_a_stream_is_shown_live_and_can_be_stopped(open_page: Open, service: str) -> None:
    page = open_page()
    fields: dict[str, Any] = {"prompt": "x", "temperature": 1}
    seed = next(  # of an output that does not end before
        seed
        for seed in range(1, 100)
        if complete(service, **fields, seed=seed, max_tokens=200)["usage"]["completion_tokens"]
        == 200
    )
    page.evaluate(STOPPER)
    fill(page, prompt="x", temperature="1", seed=str(seed), max_tokens="2000")
    part(page, "generate", "submit").click()
    stop = part(page, "generate", "stop")
    status = part(page, "generate", "status")
    expect(status).to_contain_text("Stopped.")
    expect(stop).to_be_disabled()
    expect(part(page, "generate", "submit")).to_be_focused()
    assert 5 < page.locator(".token").count() < 1999
    assert generate(page, prompt="The tower", max_tokens="3")


@contextmanager
def scripted(
    stream: Callable[[], AsyncIterator[bytes]],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a service with this stream, and the bodies of its requests."""
    bodies: list[dict[str, Any]] = []
    app = new_app("generation", pages=playground())
    add_health(app, lambda: True, "never")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": name, "chat_template": True} for name in ("a-model", "loaded")]}

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def answer(request: Request) -> StreamingResponse:
        bodies.append(await request.json())
        return StreamingResponse(stream(), media_type="text/event-stream")

    with listening(app) as address:
        yield address, bodies


def event(text: str) -> bytes:
    """A chunk of a completion, and of a chat."""
    choice = {"index": 0, "text": text, "delta": {"content": text}, "finish_reason": None}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


async def loses_its_connection() -> AsyncIterator[bytes]:
    yield event("visible")
    await asyncio.sleep(0.1)
    raise ConnectionError("its machine is gone")


async def lacks_its_end() -> AsyncIterator[bytes]:
    yield event("visible")


async def ends_in_an_error() -> AsyncIterator[bytes]:
    yield event("visible")
    yield b'data: {"error": {"message": "the replica died", "param": null}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (loses_its_connection, "The connection was lost"),
        (lacks_its_end, "The stream ended early"),
        (ends_in_an_error, "the replica died"),
    ],
)
def test_an_answer_that_breaks_off_is_not_called_none(
    open_page: Open, stream: Callable[[], AsyncIterator[bytes]], reason: str
) -> None:
    with scripted(stream) as (address, _):
        page = open_page(address, refused=("404", "net::ERR_INCOMPLETE_CHUNKED_ENCODING"))
        for tab in ("generate", "chat"):
            page.click(f"#{tab}")
            part(page, tab, "submit").click()
            error = part(page, tab, "error")
            expect(error.locator("strong")).to_have_text("The answer was interrupted.")
            expect(error).to_contain_text(reason)
        assert text(part(page, "generate", "tokens")).endswith("visible")
        expect(part(page, "generate", "status")).to_contain_text("Interrupted.")


def test_any_adapter_can_be_chosen_by_its_name(open_page: Open) -> None:
    """The service lists only those that the replica which answers has in memory."""

    async def stream() -> AsyncIterator[bytes]:
        yield event("text") + b"data: [DONE]\n\n"

    def send(tab: str, typed: str) -> Any:
        field = page.get_by_role("combobox", name="Model").locator("visible=true")
        field.focus()
        page.keyboard.press("Control+A")
        page.keyboard.press("Delete")
        page.keyboard.type(typed)
        code = part(page, tab, "code")
        expect(code.locator("pre").nth(0)).to_contain_text(f'"model":"{typed or "a-model"}"')
        expect(code.locator("pre").nth(1)).to_contain_text(f'model="{typed or "a-model"}"')
        page.keyboard.press("Control+Enter")
        expect(part(page, tab, "status")).to_contain_text("Done")
        return bodies[-1]["model"]

    with scripted(stream) as (address, bodies):
        page = open_page(address, refused=("404",))
        for tab in ("generate", "chat"):
            page.click(f"#{tab}")
            page.click(f"#{tab}-panel summary")
            suggested = page.locator(f"#{tab}-panel datalist option")
            names = suggested.evaluate_all("all => all.map(({ value }) => value)")
            assert names == ["a-model", "loaded"]
            assert send(tab, "team/not-loaded") == "team/not-loaded"
            if tab == "chat":
                page.fill("#message", "again")
            assert send(tab, "") == "a-model"


def test_a_model_that_does_not_exist_is_an_error_at_its_field(open_page: Open) -> None:
    page = open_page(refused=("404",))
    fill(page, model="team/nothing", max_tokens="3")
    part(page, "generate", "submit").click()
    expect(part(page, "generate", "error")).to_contain_text("team/nothing")
    expect(page.locator("#model")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#model")).to_be_focused()
    assert generate(page, prompt="The tower", model="generation")


def test_alternatives_are_shown_on_hover_and_by_the_arrow_keys(
    open_page: Open, service: str
) -> None:
    page = open_page()
    reply = complete(service, prompt="The tower", max_tokens=8, logprobs=5)
    expected = reply["choices"][0]["logprobs"]["top_logprobs"]
    generate(page, prompt="The tower", temperature="0", max_tokens="8")
    shown = part(page, "generate", "alternatives")
    expect(shown).to_be_hidden()
    visible = [
        index
        for index in range(page.locator(".token").count())
        if text(page.locator(".token").nth(index))
    ]
    page.locator(".token").nth(visible[2]).hover()
    expect(shown).to_be_visible()
    expect(shown.locator("li")).to_have_count(len(expected[visible[2]]))
    expect(shown.locator(".chosen")).to_have_count(1)
    page.mouse.move(0, 0)
    expect(shown).to_be_hidden()
    part(page, "generate", "tokens").focus()
    for index in visible[:3]:
        page.keyboard.press("ArrowRight")
        expect(shown.locator("li")).to_have_count(len(expected[index]))
        expect(page.locator(".token.current")).to_have_text(
            text(page.locator(".token").nth(index)), use_inner_text=False
        )
    page.keyboard.press("Tab")
    expect(shown).to_be_hidden()


def test_alternatives_stay_under_the_pointer_and_close_on_escape(open_page: Open) -> None:
    """WCAG 1.4.13: content on hover or focus is hoverable, dismissible and persistent."""
    page = open_page()
    generate(page, prompt="The tower", temperature="0", max_tokens="40")
    shown = part(page, "generate", "alternatives")
    token = page.locator(".token:not(:empty)").first
    token.hover()
    expect(shown).to_be_visible()
    (start, end) = (token.bounding_box(), shown.bounding_box())
    assert start and end
    page.mouse.move(end["x"] + 5, start["y"] + start["height"] - 1)
    page.mouse.move(end["x"] + 5, end["y"] + end["height"] / 2, steps=40)
    expect(shown).to_be_visible()
    expect(token).to_have_class("token current")
    page.mouse.down()  # the tokens lose the focus, if they have it
    page.mouse.up()
    expect(shown).to_be_visible()
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    part(page, "generate", "tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(shown).to_be_visible()
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    expect(part(page, "generate", "tokens")).to_be_focused()


def say(page: Page, message: str) -> list[str]:
    """All turns of the chat, when the message is answered."""
    page.fill("#message", message)
    part(page, "chat", "submit").click()
    expect(page.locator("#message")).to_have_value("")
    expect(part(page, "chat", "status")).to_contain_text("Done")
    return [text(each) for each in part(page, "chat", "turns").locator(".said").all()]


def test_a_chat_continues_turn_by_turn(open_page: Open, service: str) -> None:
    page = open_page("/#chat")
    fill(page, **{"chat-temperature": "0", "chat-max_tokens": "9", "system": "The year 1907."})
    messages = [{"role": "system", "content": "The year 1907."}]
    for message in ("Who wrote the book? 😀", "東京 is <b>far</b>"):
        turns = say(page, message)
        messages.append({"role": "user", "content": message})
        body = {"messages": messages, "temperature": 0, "max_tokens": 9}
        reply = httpx.post(f"{service}/v1/chat/completions", json=body, timeout=30).json()
        messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        assert turns == [each["content"] for each in messages[1:]]
    page.fill("#chat-max_tokens", "1500")
    page.fill("#message", "x")
    part(page, "chat", "submit").click()
    expect(part(page, "chat", "turns").locator(".said").nth(5)).not_to_be_empty()
    part(page, "chat", "stop").click()
    expect(part(page, "chat", "status")).to_contain_text("Stopped.")
    part(page, "chat", "clear").click()
    expect(part(page, "chat", "turns").locator("li")).to_have_count(0)
    expect(page.locator("#message")).to_be_focused()
    fill(page, **{"chat-max_tokens": "9"})
    assert len(say(page, "x")) == 2


def test_a_new_chat_forgets_a_reply_being_written(open_page: Open) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield event("An answer")
        if len(bodies) == 1:
            await asyncio.sleep(60)  # until the client has left
        yield b"data: [DONE]\n\n"

    with scripted(stream) as (address, bodies):
        page = open_page(f"{address}/#chat", refused=("404",))
        part(page, "chat", "submit").click()
        expect(page.locator(".said").last).to_have_text("An answer")
        part(page, "chat", "clear").click()
        expect(part(page, "chat", "submit")).to_have_attribute("aria-disabled", "false")
        expect(page.locator("#message")).to_have_value("")  # it was sent
        expect(part(page, "chat", "result")).to_be_hidden()
        expect(part(page, "chat", "error")).to_be_hidden()
        assert say(page, "Anew") == ["Anew", "An answer"]
    assert [each["content"] for each in bodies[-1]["messages"]] == ["Anew"]


# What a screen reader announces of a live region: additions outside of what is hidden from it.
LISTENER = """() => {
  window.heard = [];
  const log = document.querySelector("[role=log]");
  new MutationObserver((changes) => {
    for (const { addedNodes } of changes)
      for (const node of addedNodes)
        if (!(node.closest ? node : node.parentElement)?.closest("[aria-hidden=true]"))
          window.heard.push(node.textContent);
  }).observe(log, { subtree: true, childList: true, characterData: true });
}"""


def test_a_screen_reader_hears_each_turn_once_when_it_is_complete(open_page: Open) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for word in ("One", " two", " three"):
            yield event(word)
            await asyncio.sleep(0.1)
        yield b"data: [DONE]\n\n"

    with scripted(stream) as (address, _):
        page = open_page(f"{address}/#chat", refused=("404",))
        page.evaluate(LISTENER)
        for message in ("Hello", "Again"):
            say(page, message)
    whole = "ModelOne two three"
    assert page.evaluate("heard") == ["YouHello", whole, "YouAgain", whole]


def test_a_model_without_a_template_has_no_chat_tab(open_page: Open) -> None:
    page = open_page("/guarded/#chat", refused=("401", "404"))
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.reload()
    expect(part(page, "chat", "unavailable")).to_contain_text("no chat template")
    expect(part(page, "chat", "submit")).to_be_disabled()


def test_classification_shows_its_labels_as_bars(open_page: Open, service: str) -> None:
    page = open_page("/#classify")
    page.fill("#inputs", "The tower stands in Paris")
    (labels,) = httpx.post(
        f"{service}/classification", json={"inputs": "The tower stands in Paris"}
    ).json()
    part(page, "classify", "submit").click()
    rows = part(page, "classify", "bars").locator("li")
    expect(rows).to_have_count(len(labels))
    for row, label in zip(rows.all(), labels, strict=True):
        expect(row).to_contain_text(label["label"])
        share = row.locator(".bar").evaluate("bar => bar.style.getPropertyValue('--share')")
        assert float(share) == pytest.approx(label["score"])
    expect(part(page, "classify", "status")).to_contain_text(labels[0]["label"])
    page.select_option("#function_to_apply", "none")
    page.fill("#classify-top_k", "2")
    part(page, "classify", "submit").click()
    expect(rows).to_have_count(2)


def test_each_answer_is_marked_in_its_context(open_page: Open, service: str) -> None:
    """Behind an emoji, which is one character to the service and two to JavaScript."""
    page = open_page("/#ask")
    inputs = {"question": "Who wrote it?", "context": "😀 Anna wrote the book in the year 1907."}
    body = {"inputs": inputs, "parameters": {"top_k": 3}}
    answers = httpx.post(f"{service}/question-answering", json=body).json()
    fill(page, **inputs)
    part(page, "ask", "submit").click()
    buttons = part(page, "ask", "answers").locator("button")
    expect(buttons).to_have_count(3)
    for button, answer in zip(buttons.all(), answers, strict=True):
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")
        expect(page.locator("mark")).to_have_text(answer["answer"], use_inner_text=False)
        before = page.locator("mark").evaluate("mark => mark.previousSibling.textContent")
        assert before == inputs["context"][: answer["start"]]
    assert text(part(page, "ask", "context")) == inputs["context"]


WRONG = [
    ("generate", "max_tokens", "5000", "context is 2048 tokens"),
    ("generate", "top_p", "2", "top_p must be in [0, 1]"),
    ("generate", "seed", "1.5", "valid integer"),
    ("generate", "temperature", "1e", "valid number"),
    ("chat", "chat-max_tokens", "0", "max_tokens must be 1 or more"),
    ("chat", "chat-seed", "1.5", "valid integer"),
    ("classify", "inputs", "", "inputs is empty"),
    ("classify", "classify-top_k", "0", "top_k must be 1 or more"),
    ("ask", "question", " ", "must not be empty"),
    ("ask", "max_answer_len", "0", "max_answer_len must be in"),
]


def test_an_error_is_shown_at_its_field(open_page: Open) -> None:
    page = open_page(refused=("400", "422"))
    page.fill("#max_tokens", "3")
    for tab, name, value, reason in WRONG:
        page.click(f"#{tab}")
        field = page.locator(f"#{name}")
        before = field.input_value()
        field.fill("")
        field.press_sequentially(value)
        part(page, tab, "submit").click()
        expect(part(page, tab, "error")).to_contain_text(reason)
        expect(field).to_have_attribute("aria-invalid", "true")
        expect(field).to_be_focused()
        described = field.get_attribute("aria-describedby")
        assert described
        expect(page.locator(f"#{described.split()[-1]}")).to_contain_text(reason)
        field.fill(before or "1")
        expect(field).not_to_have_attribute("aria-invalid", "true")
        part(page, tab, "submit").click()
        expect(part(page, tab, "error")).to_be_hidden()
        expect(part(page, tab, "result")).to_be_visible()
        expect(part(page, tab, "submit")).to_have_attribute("aria-disabled", "false")


@contextmanager
def full(service: str) -> Iterator[None]:
    """/guarded with a running stream and a waiting one, which fill it.

    Whenever one ends, another follows: a page on a busy machine takes its time.
    """
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    url = f"{service}/guarded/v1/completions"
    ended = threading.Event()
    with httpx.Client(headers=headers, timeout=30) as client:

        def keep_asking() -> None:
            while not ended.is_set():
                try:
                    refused = client.post(url, json=body).status_code == 429
                except httpx.HTTPError:
                    return  # the client was closed, as it should be
                if refused:
                    time.sleep(0.05)

        with client.stream("POST", url, json=body) as first:
            lines = first.iter_lines()  # by a name, since its end would be the stream's
            assert next(lines).startswith("data: ")
            for _ in range(2):
                threading.Thread(target=keep_asking, daemon=True).start()
            yield
            ended.set()


def test_a_key_is_requested_and_kept_only_in_this_tab(open_page: Open) -> None:
    page = open_page("/guarded/", refused=("401", "404"))
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("only to requests with a key")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("did not accept this key")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model")).to_have_attribute("placeholder", "org/guarded")
    assert generate(page, prompt="The tower", max_tokens="3")
    stored = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert stored == [[KEY], 0, ""]
    page.click("#generate-panel summary")
    code = part(page, "generate", "code")
    expect(code).to_contain_text("$GPTJ_API_KEY")
    assert KEY not in page.content()
    page.reload()
    expect(page.locator("#model")).to_have_attribute("placeholder", "org/guarded")
    page.click("#key-button")
    page.click("#key-forget")
    assert page.evaluate("sessionStorage.length") == 0
    expect(dialog).to_contain_text("only to requests with a key")
    page.keyboard.press("Escape")
    part(page, "generate", "submit").click()
    expect(dialog).to_be_visible()
    page.fill("#key", KEY)
    page.keyboard.press("Enter")  # and what was refused is asked again
    expect(part(page, "generate", "status")).to_contain_text("Done")


def test_late_refusals_leave_a_key_being_typed_and_one_in_use(open_page: Open) -> None:
    """Two tabs load the models: without a key, each is refused in its own time."""
    asked: list[Route] = []

    def hold_third(route: Route) -> None:
        asked.append(route)
        if len(asked) != 3:  # the generation tab, the chat tab twice; and later ones with the key
            route.continue_()

    def release_third(page: Page) -> None:
        with page.expect_response("**/v1/models") as reply:
            asked[2].continue_()
        reply.value.finished()
        page.wait_for_timeout(100)  # for the page to read it

    def open_held() -> Page:
        asked.clear()
        route = "**/v1/models"
        page = open_page("/guarded/", ("401", "404"), lambda page: page.route(route, hold_third))
        expect(page.get_by_role("dialog")).to_be_visible()
        while len(asked) < 3:
            page.wait_for_timeout(20)
        page.fill("#key", KEY)
        return page

    page = open_held()
    release_third(page)
    expect(page.locator("#key")).to_have_value(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_attribute("placeholder", "org/guarded")

    page = open_held()
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_attribute("placeholder", "org/guarded")
    release_third(page)
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_busy_service_is_retried_after_its_retry_after(open_page: Open, service: str) -> None:
    page = open_page("/guarded/", refused=("401", "404", "429"))
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_attribute("placeholder", "org/guarded")
    page.fill("#max_tokens", "3")
    error = part(page, "generate", "error")
    with full(service):
        for _ in range(20):  # until the second stream waits
            part(page, "generate", "submit").click()
            expect(part(page, "generate", "submit")).to_have_attribute("aria-disabled", "false")
            if error.is_visible():
                break
        expect(error).to_contain_text("The service is busy.")
        expect(error).to_contain_text("You can try again in 1 s")
    again = error.get_by_role("button")
    expect(again).to_be_enabled()
    again.click()
    expect(part(page, "generate", "status")).to_contain_text("Done")


def test_a_tab_without_an_application_says_so_until_it_answers(open_page: Open) -> None:
    healthy = False
    generation = new_app("generation", pages=playground())
    add_health(generation, lambda: True, "never")

    @generation.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "a-model"}]}

    classification = new_app("classification")
    add_health(classification, lambda: healthy, "the model makes no progress")
    with listening(mounted({"/": generation, "/classification": classification})) as address:
        page = open_page(
            f"{address}/#classify",
            refused=("404", "503", "net::ERR_CONNECTION_REFUSED"),
            before=lambda page: page.clock.install(),
        )
        notice = part(page, "classify", "unavailable")
        expect(notice).to_contain_text("Unavailable: the model makes no progress")
        expect(part(page, "classify", "submit")).to_be_disabled()
        expect(page.locator("#inputs")).to_be_disabled()
        page.click("#ask")
        expect(part(page, "ask", "unavailable")).to_contain_text("no application of this kind")
        page.click("#generate")
        expect(part(page, "generate", "unavailable")).to_be_hidden()
        healthy = True
        page.clock.fast_forward(11_000)
        page.click("#classify")
        expect(notice).to_be_hidden()
        expect(page.locator("#inputs")).to_be_enabled()
    part(page, "classify", "submit").click()
    expect(part(page, "classify", "error")).to_contain_text("does not answer")


def test_everything_can_be_done_by_keyboard(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_attribute("placeholder", "generation")
    for _ in range(3):  # past the link and the key
        page.keyboard.press("Tab")
    expect(page.locator("#generate")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#ask")).to_be_focused()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#classify")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Tab")
    expect(page.locator("#inputs")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("The river")
    page.keyboard.press("Control+Enter")
    expect(part(page, "classify", "status")).to_contain_text("The likeliest label is")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    expect(page.locator("#prompt")).to_be_focused()
    page.fill("#max_tokens", "2000")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".token").nth(3)).to_be_attached()
    page.keyboard.press("Escape")
    expect(part(page, "generate", "status")).to_contain_text("Stopped.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_state_is_accessible(open_page: Open, scheme: Any) -> None:
    """axe-core's rules, contrast of colours among them."""
    page = open_page(refused=("400",), color_scheme=scheme)
    use_every_tab(page)
    page.locator(".token:not(:empty)").first.hover()
    axe = Axe()

    def check(state: str) -> None:
        found = axe.run(page)
        assert found.violations_count == 0, f"{state}: {found.generate_report()}"

    for tab in TABS:
        page.click(f"#{tab}")
        check(tab)
    page.fill("#max_answer_len", "0")
    part(page, "ask", "submit").click()
    expect(part(page, "ask", "error")).to_be_visible()
    check("an error")
    page.click("#key-button")
    check("the key")
    page.keyboard.press("Escape")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert red > 200 if scheme == "light" else red < 60


def test_a_phone_scrolls_in_one_direction_only(open_page: Open) -> None:
    page = open_page(viewport=PHONE, is_mobile=True, has_touch=True)
    page.fill("#max_tokens", "20")
    page.click("#ask")
    page.fill("#context", "a-very-long-word" * 20)
    use_every_tab(page)
    page.locator(".token:not(:empty)").last.tap()
    for tab in TABS:
        page.click(f"#{tab}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], tab


@pytest.mark.parametrize("tab", TABS)
def test_the_code_examples_do_what_the_form_does(open_page: Open, tab: str) -> None:
    page = open_page(f"/#{tab}")
    awkward = 'It\'s "odd" \\ $HOME\n`x` 😀'
    places = {"generate": "prompt", "chat": "message", "classify": "inputs", "ask": "context"}
    page.fill(f"#{places[tab]}", awkward)
    if tab == "chat":
        expect(page.locator("#chat-model")).to_have_attribute("placeholder", "generation")
        fill(page, **{"chat-temperature": "0", "chat-max_tokens": "5"})
    if tab == "generate":
        expect(page.locator("#model")).to_have_attribute("placeholder", "generation")
        fill(page, temperature="0", max_tokens="5", repetition_penalty="1.1")
        page.uncheck("#logprobs")
    page.click(f"#{tab}-panel summary")
    curl, python = (text(each) for each in part(page, tab, "code").locator("pre").all())
    part(page, tab, "submit").click()
    expect(part(page, tab, "result")).to_be_visible()
    replies = [
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        for command in (["bash", "-c", f"{curl} --silent"], [sys.executable, "-c", python])
    ]
    if tab == "generate":
        expect(part(page, tab, "status")).to_contain_text("Done")
        shown = text(part(page, tab, "tokens")).removeprefix(awkward)
        assert replies[1].removesuffix("\n") == shown
        assert replies[0].count("data: ") > 1
        return
    if tab == "chat":
        expect(part(page, tab, "status")).to_contain_text("Done")
        assert replies[1].removesuffix("\n") == text(page.locator(".said").last)
        assert replies[0].count("data: ") > 1
        return
    status = text(part(page, tab, "status"))
    for reply in replies:
        assert any(name in reply for name in status.replace("“", " ").replace("”", " ").split())


def test_the_documents_page_shows_the_operations(open_page: Open) -> None:
    page = open_page("/docs")
    expect(page.locator(".opblock")).to_have_count(8)
    page = open_page("/classification/docs")
    expect(page.locator(".opblock")).to_have_count(2)
