"""`GET /v1/tuneloom/limits`: what holds for whoever asks, and what is left of it."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneloom.domain import Principal
from tuneloom.serve.limits import Limits


class OwnLimitsApi:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def routes(self) -> list[Route]:
        return [Route("/v1/tuneloom/limits", self.show, methods=["GET"])]

    async def show(self, request: Request) -> Response:
        """For any key. Looking takes nothing, but for the request itself."""
        principal: Principal = request.state.principal
        caller, rates = await self._limits.standing(principal, self._limits.addresses.of(request.scope))
        spent = await self._limits.policies.spent(caller)
        shown = caller.allowance.model_dump(mode="json")
        return JSONResponse(
            {
                "object": "tuneloom.limits",
                "owner": principal.owner,
                "limits": shown,
                "rates": rates,
                "month": {
                    "tokens": spent.input_tokens + spent.output_tokens + spent.trained_tokens,
                    "cost": spent.cost,
                    "tokens_limit": caller.allowance.tokens_per_month,
                    "cost_limit": caller.allowance.budget_per_month,
                },
                "is_shared": self._limits.is_shared,
            }
        )
