"""Every error that a person or a client can meet, with its HTTP status and stable code.

    TuneloomError                     500 server_error
    ├── InvalidRequest                400 a field is wrong; `param` names it
    │   ├── MissingParameter          400 missing_required_parameter
    │   ├── UnknownParameter          400 unknown_parameter
    │   ├── UnsupportedParameter      400 unsupported_parameter
    │   ├── InvalidType               400 invalid_type
    │   ├── ContextLengthExceeded     400 context_length_exceeded
    │   ├── InvalidFile               400 invalid_training_file
    │   └── AdapterRejected           400 adapter_rejected
    ├── Unauthenticated               401 invalid_api_key
    ├── PermissionDenied              403 insufficient_permissions
    ├── NotFound                      404 unknown or foreign, alike
    │   └── ModelNotFound             404 model_not_found
    ├── Conflict                      409 a state forbids it; never retried by clients
    ├── TooLarge                      413 request_too_large
    ├── Unprocessable                 422 idempotency key reused for another request
    ├── RateLimited                   429 rate_limit_exceeded, type `requests`; try again after `retry_after_s`
    │   ├── TokensLimited             429 the same of tokens, type `tokens`
    │   ├── InsufficientQuota         429 insufficient_quota; not retried by clients
    │   └── QueueFull                 429 too_many_queued_jobs; not retried by clients
    └── Overloaded                    503 overloaded; retry after `retry_after_s`

They cross process boundaries by pickle, so every argument but the message is optional and kept in the state.
"""

from typing import Any


class TuneloomError(Exception):
    """An error with an answer on the wire. The message says what was wrong and what to do."""

    status = 500
    type = "server_error"
    code: str | None = None
    should_retry: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code

    def __reduce__(self) -> Any:
        return (type(self), (self.message,), self.__dict__)

    def body(self) -> dict[str, Any]:
        """The OpenAI error object: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(TuneloomError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class MissingParameter(InvalidRequest):
    code = "missing_required_parameter"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class InvalidType(InvalidRequest):
    code = "invalid_type"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidFile(InvalidRequest):
    code = "invalid_training_file"


class AdapterRejected(InvalidRequest):
    code = "adapter_rejected"


class Unauthenticated(InvalidRequest):
    status = 401
    code = "invalid_api_key"


class PermissionDenied(InvalidRequest):
    status = 403
    code = "insufficient_permissions"


class NotFound(InvalidRequest):
    status = 404
    code = None


class ModelNotFound(NotFound):
    code = "model_not_found"

    @classmethod
    def named(cls, name: str) -> "ModelNotFound":
        """The one answer for absent and foreign names."""
        return cls(f"The model `{name}` does not exist or you do not have access to it.", param="model")


class Conflict(InvalidRequest):
    status = 409
    code = "conflict"
    should_retry = False


class TooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class Unprocessable(InvalidRequest):
    status = 422
    code = "idempotency_key_reused"


class RateLimited(TuneloomError):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class TokensLimited(RateLimited):
    type = "tokens"


class InsufficientQuota(RateLimited):
    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False


class QueueFull(RateLimited):
    code = "too_many_queued_jobs"
    should_retry = False


class Overloaded(TuneloomError):
    status = 503
    code = "overloaded"
