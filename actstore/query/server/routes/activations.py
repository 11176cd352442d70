"""Route of activations of prompts, of which the server computes what a store lacks."""

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from actstore.query.documents import PromptList, PromptPlaces, PromptsRequest
from actstore.query.problem import Problem
from actstore.query.server.routes.parameters import StoreName
from actstore.query.server.sending.error_replies import error_responses
from actstore.query.server.sending.reply import document
from actstore.query.server.sharing.scans import Look
from actstore.query.server.state import scope_of, state_of, store_of
from actstore.recall.answers import Limits, StoredPrompts

router = APIRouter(tags=["activations"])


@router.post(
    "/v1/stores/{store}/activations",
    response_model=PromptList,
    responses=error_responses(404, 409, 500, 502),
)
async def compute_activations(request: Request, store: StoreName, prompts: PromptsRequest) -> Response:
    """Compute the activations of prompts that the store lacks, add them to it, and say where it has all of them.

    The values are read with `select` or `slice`, by these sequences. Only a server with `--compute` does this.
    """
    state, client = state_of(request), scope_of(request).client
    opened = await run_in_threadpool(store_of, request, store)
    computing, settings = state.computing, state.settings
    if computing is None:
        raise Problem(
            422,
            "invalid",
            "this server only reads; ask whoever runs it to start it with --compute MODEL, or use actstore.activations "
            "with the model and the store itself",
        )
    given = prompts.texts or prompts.tokens or []
    limits = Limits(settings.compute_tokens, settings.compute_limit)
    n_known = 0 if prompts.tokens is None else sum(map(len, prompts.tokens))
    limits.check_tokens(max(n_known, len(given)))
    model, queue = computing

    def compute(_look: Look) -> bytes:
        places = model.places(opened.url, list(given), list(prompts.hooks), limits)
        state.catalog.look(store)  # so that the next request for these sequences finds them
        return _document(places)

    body = await queue.run(request, client, (opened.url, prompts.model_dump_json()), compute)
    return await run_in_threadpool(document, request, body)


def _document(found: StoredPrompts) -> bytes:
    """The reply; hooks that are in the same sequences are together."""
    hooks_in: dict[tuple[int, ...], list[str]] = {}
    for hook, sequences in found.sequences.items():
        hooks_in.setdefault(tuple(sequences.tolist()), []).append(hook)
    places = tuple(PromptPlaces(hooks=tuple(hooks), sequences=rows) for rows, hooks in hooks_in.items())
    return PromptList(lengths=tuple(found.lengths.tolist()), places=places).model_dump_json().encode()
