"""The routes of the server, as an ASGI application.

    app = make_app(model, service, settings, metrics, log, keys)

Every route answers in OpenAI's shapes, errors too. Bodies are read and checked here and not by
FastAPI, which would take what JSON does not allow and has an error object of its own; FastAPI knows
the routes and writes /openapi.json. Its pages /docs and /redoc are off: they load from elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmnorm.config.serving import ServingSettings
from llmnorm.machine.doctor import version
from llmnorm.serving import asking
from llmnorm.serving import metrics as metrics_module
from llmnorm.serving.access import AccessLog
from llmnorm.serving.answers import Answers
from llmnorm.serving.asking import Asked, Model
from llmnorm.serving.documented import ANSWERING, PLAIN, describe, write_document
from llmnorm.serving.edge import RECORD, App, Edge, Receive, Record, internal
from llmnorm.serving.event_stream import EventStream, pieces
from llmnorm.serving.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    Fields,
    TokenizeFields,
    read_fields,
)
from llmnorm.serving.json_body import ClientGone, parse_body, read_body
from llmnorm.serving.keys import Keys
from llmnorm.serving.metrics import Metrics
from llmnorm.serving.page import add_page
from llmnorm.serving.refusals import Refusal
from llmnorm.serving.service import Service, Ticket
from llmnorm.serving.tokens import detokenize, tokenize, tokenizer_info

if TYPE_CHECKING:
    from fastapi import FastAPI


def make_app(
    model: Model,
    service: Service,
    settings: ServingSettings,
    metrics: Metrics,
    log: AccessLog,
    keys: Keys,
) -> App:
    """The application; its lifespan starts and stops the engine's thread.

    Args:
        model: what is served.
        service: not started.
        metrics: of this app; the service's engine is watched by it.
    """
    from fastapi import FastAPI

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="llmnorm",
        version=version(),
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    metrics.watch(service)
    _refuse(app)
    _answering(app, model, service, settings)
    _about_tokens(app, model, settings)
    _about_the_server(app, model, service, metrics)
    add_page(app)
    write_document(app, settings.root_path, keys=bool(keys))
    whole: App = Edge(app, keys, metrics, log, settings.root_path)
    if settings.cors:
        whole = CORSMiddleware(
            whole,
            allow_origins=settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return whole


def _refuse(app: "FastAPI") -> None:
    """Errors of every kind in one shape."""

    def refused(request: Request, refusal: Refusal, **headers: str) -> JSONResponse:
        request.scope[RECORD].error = refusal.code
        return JSONResponse(refusal.body(), refusal.status, refusal.headers() | headers)

    @app.exception_handler(Refusal)
    async def of_ours(request: Request, error: Refusal) -> JSONResponse:
        return refused(request, error)

    @app.exception_handler(HTTPException)
    async def of_routing(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:80]
        if error.status_code == 405:
            message = f"{path} does not take {request.method[:20]}"
            return refused(
                request, Refusal(405, message, "method_not_allowed"), **(error.headers or {})
            )
        return refused(request, Refusal(404, f"there is no {path}", "not_found"))

    @app.exception_handler(Exception)
    async def of_a_defect(request: Request, error: Exception) -> JSONResponse:
        return refused(request, internal(request.scope[RECORD].id))  # Edge prints the trace


def _answering(app: "FastAPI", model: Model, service: Service, settings: ServingSettings) -> None:
    async def answer(
        request: Request,
        fields: CompletionFields | ChatFields,
        asked: Asked,
    ) -> Response:
        record: Record = request.scope[RECORD]
        ticket = service.open(asked.requests)
        record.ticket, record.stream = ticket, fields.stream
        record.prompt_tokens = asked.prompt_tokens
        answers = Answers(model, fields, asked)
        if fields.stream:
            usage = fields.stream_options is not None and fields.stream_options.include_usage
            return EventStream(pieces(ticket, answers, record, usage=usage), ticket)
        with ticket:
            await _unless_gone(_collect(ticket, answers), request.receive)
            return JSONResponse(answers.whole(ticket))

    described = describe(
        "Continue a text", "Completion", *ANSWERING, body=CompletionFields, stream=True
    )

    @app.post("/v1/completions", **described)
    async def completions(request: Request) -> Response:
        fields = await _fields(CompletionFields, request, settings, service)
        return await answer(request, fields, await asking.completions(model, fields))

    described = describe(
        "Answer messages", "ChatCompletion", *ANSWERING, body=ChatFields, stream=True
    )

    @app.post("/v1/chat/completions", **described)
    async def chat(request: Request) -> Response:
        fields = await _fields(ChatFields, request, settings, service)
        return await answer(request, fields, await asking.chat(model, fields))


def _about_tokens(app: "FastAPI", model: Model, settings: ServingSettings) -> None:
    @app.post("/tokenize", **describe("The tokens of a text", "Tokens", body=TokenizeFields))
    async def tokenize_(request: Request) -> Response:
        return JSONResponse(await tokenize(model, await _fields(TokenizeFields, request, settings)))

    @app.post("/detokenize", **describe("The text of tokens", "Text", body=DetokenizeFields))
    async def detokenize_(request: Request) -> Response:
        return JSONResponse(detokenize(model, await _fields(DetokenizeFields, request, settings)))

    described = describe("The tokenizer's special tokens, for lm-eval", "TokenizerInfo")

    @app.get("/tokenizer_info", **described)
    async def info(request: Request) -> Response:
        return JSONResponse(tokenizer_info(model))


def _about_the_server(app: "FastAPI", model: Model, service: Service, metrics: Metrics) -> None:
    card = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llmnorm",
        "max_model_len": model.context,
    }

    @app.get("/v1/models", **describe("The models that are served", "Models"))
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    described = describe("A model that is served", "Model", 404, parameter="name")

    @app.get("/v1/models/{name:path}", **described)
    async def named(request: Request) -> Response:
        model.check_name(Fields(model=request.path_params["name"]))
        return JSONResponse(card)

    @app.get("/health", **describe("Whether the engine lives", "Status", 503, key=False))
    async def health(request: Request) -> Response:
        if service.dead:
            service.check_open()
        return JSONResponse({"status": "ok"})

    @app.get("/ready", **describe("Whether requests are taken", "Status", 503, key=False))
    async def ready(request: Request) -> Response:
        service.check_open()
        return JSONResponse({"status": "ok"})

    @app.get("/version", **describe("The version of the server", "Version", key=False))
    async def about(request: Request) -> Response:
        return JSONResponse({"version": version()})

    described = describe("Metrics", "In Prometheus' text format.", kind=PLAIN, key=False)

    @app.get("/metrics", **described)
    async def measured(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics_module.CONTENT_TYPE)


async def _fields(
    cls: type[Any],
    request: Request,
    settings: ServingSettings,
    service: Service | None = None,
) -> Any:
    """The fields of a request's body; a service that takes no more refuses before it is read.

    Raises:
        Refusal: they are not valid.
    """
    if service is not None:
        service.check_open()
    length = request.headers.get("content-length")
    raw = await read_body(request.receive, length, settings.body_limit)
    fields: Fields = read_fields(cls, parse_body(raw))
    request.scope[RECORD].unknown = fields.unknown
    return fields


async def _collect(ticket: Ticket, answers: Answers) -> None:
    async for gained in ticket.events():
        for number, event in gained:
            answers.take(number, event)


async def _unless_gone(work: Awaitable[None], receive: Receive) -> None:
    """Wait for an answer, as long as its client does.

    Raises:
        ClientGone: the client has closed the connection.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
