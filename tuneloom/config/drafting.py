"""Drafting of training rows: which providers there are, what they cost, and how much may run."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tuneloom.config.section import Section


class DraftProviderSettings(Section):
    """One endpoint of a language model. Its key, if it needs one, is in the environment or in a file."""

    kind: Literal["gemini", "openai"] = Field(description="Google's API, or one that speaks OpenAI's, such as ours")
    base_url: str | None = Field(None, description="needed for `openai`, up to and with `/v1`; None: Google's")
    models: tuple[str, ...] = Field(min_length=1, description="those that may be chosen; the first is the default")
    project: str | None = Field(
        None,
        min_length=1,
        description="`gemini`: through Vertex AI of this Google Cloud project, by the machine's identity",
    )
    location: str = Field("global", pattern=r"[a-z0-9-]+", description="with `project`: Vertex AI's region")
    api_key_env: str | None = Field(None, description="the variable that holds the key")
    api_key_file: Path | None = Field(None, description="or the file that does")
    timeout_s: float = Field(120.0, gt=0, description="for one call")
    attempts: int = Field(4, ge=1, le=10, description="of a call that meets 408, 429, 5xx or no answer")
    retry_delay_s: float = Field(1.0, gt=0, description="before the second attempt; it doubles")
    max_output_tokens: int = Field(8192, ge=64, description="longest reply that is asked for")
    thinking_budget: int | None = Field(None, ge=0, description="`gemini`: tokens of thinking; None: the model's own")
    input_price: float | None = Field(None, ge=0, description="of a million tokens, in `train.currency`; both or none")
    output_price: float | None = Field(None, ge=0, description="the same of what it writes")

    @model_validator(mode="after")
    def _agree(self) -> "DraftProviderSettings":
        if self.kind == "openai" and self.base_url is None:
            raise ValueError("a provider of the kind `openai` needs `base_url`")
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give `api_key_env` or `api_key_file`, not both")
        if self.project is not None and self.kind != "gemini":
            raise ValueError("`project` is for a provider of the kind `gemini`")
        if self.project is None and self.location != "global":
            raise ValueError("`location` needs `project`")
        if self.project is not None and (self.api_key_env is not None or self.api_key_file is not None):
            raise ValueError("with `project`, Application Default Credentials are used: leave the key out")
        if self.api_key_env is not None and self.api_key_env.startswith(("TUNELOOM_", "RAY_")):
            raise ValueError("`api_key_env`: a cluster does not inherit variables that begin with TUNELOOM_ or RAY_")
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("give `input_price` and `output_price`, or neither")
        return self


class DraftingSettings(Section):
    providers: dict[str, DraftProviderSettings] = Field({}, description="by name; the first is the default")
    max_tasks: int = Field(8, ge=1, description="drafters that run at once, each a process of about 170 MB; more wait")
    num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray counts for each: they mostly wait")
    keep_days: int = Field(90, ge=1, description="how long a draft is kept after its end; its File stays")
    max_drafts_per_owner: int = Field(2, ge=1, description="drafts of one owner that have not ended")
    max_rows: int = Field(1000, ge=10, le=1000, description="rows of one draft")
    max_drafters: int = Field(50, ge=1, le=50, description="drafters of one draft")
    max_time_s: float = Field(3600.0, gt=0, description="longest time limit of a draft, and the default")
    max_losses: int = Field(3, ge=0, description="times that a drafter's process may be lost")
    heartbeat_s: float = Field(3.0, gt=0, description="how often a drafter says that it lives")
    heartbeat_timeout_s: float = Field(30.0, gt=0, description="silence after which it counts as lost")
